"""Importance of the searched keys for a sweep's metric: PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.results import Trial
from densenet_dist.sweep.space import contains, encode

FEWEST_TRIALS: Final = 4


class Importance(NamedTuple):
    """The importance of each key.

    Attributes:
        shares: by key, the largest first; their sum is 1. Empty if there is a `reason`.
        trials: number of trials compared.
        reason: a sentence about why it could not be computed.
    """

    shares: Mapping[str, float]
    trials: int
    reason: str | None = None


def importance(sweep: Sweep, trials: Sequence[Trial]) -> Importance:
    """Compute the importance of each key from the settings of the best trials and of all trials.

    Args:
        sweep: what was searched.
        trials: the trials to compare; all have a value of the metric.
    """
    if sweep.settings.scheduler.name == "pbt":
        return Importance({}, 0, "Population based training changes a trial's settings on the way.")
    rows = [
        (encode({key: trial.overrides[key] for key in sweep.space}), trial.metric)
        for trial in trials
        if contains(sweep.space, trial.overrides) and trial.metric is not None
    ]
    if len(rows) < FEWEST_TRIALS:
        return Importance({}, len(rows), f"It needs {FEWEST_TRIALS} trials with a figure, and there are {len(rows)}.")
    if len({metric for _, metric in rows}) == 1:
        return Importance({}, len(rows), f"All {len(rows)} trials came to the same figure.")
    if all(row == rows[0][0] for row, _ in rows):
        return Importance({}, len(rows), f"All {len(rows)} trials had the same settings.")
    return Importance(_shares(sweep, rows), len(rows))


def _shares(sweep: Sweep, rows: Sequence[tuple[dict[str, Any], float]]) -> dict[str, float]:
    import optuna

    distributions = {key: domain.distribution() for key, domain in sweep.space.items()}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction="maximize" if sweep.settings.maximise else "minimize")
    finally:
        optuna.logging.set_verbosity(verbosity)
    # Optuna's default, the best tenth of all trials, is one or two of a small sweep: too few to tell keys apart.
    best = max(0.1, min(0.5, 5 / len(rows)))
    with warnings.catch_warnings(action="ignore"):  # values off a step; few trials, about which the page warns
        study.add_trials(
            [optuna.trial.create_trial(params=row, distributions=distributions, value=metric) for row, metric in rows]
        )
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=best)
        return optuna.importance.get_param_importances(study, evaluator=evaluator)

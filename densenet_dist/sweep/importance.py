"""Importance of the searched keys for a sweep's metric: PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Final

from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.results import Trial
from densenet_dist.sweep.space import contains, encode

MIN_TRIALS: Final = 4


def importance(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, float]:
    """Compute the importance of each key from the settings of the best trials and of all trials.

    Args:
        sweep: what was searched.
        trials: the trials to compare; all have a value of the metric.

    Returns:
        The share of each key, the largest first; their sum is 1. Empty unless `MIN_TRIALS` trials differ in their
        settings and in their metric.
    """
    rows = [
        (encode({key: trial.overrides[key] for key in sweep.space}), trial.metric)
        for trial in trials
        if contains(sweep.space, trial.overrides) and trial.metric is not None
    ]
    is_constant = all(row == rows[0][0] for row, _ in rows) or all(metric == rows[0][1] for _, metric in rows)
    if len(rows) < MIN_TRIALS or is_constant:
        return {}
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

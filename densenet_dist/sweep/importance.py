"""Which searched keys decide a sweep's metric: functional ANOVA (Hutter, Hoos and Leyton-Brown 2014)."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.results import Trial
from densenet_dist.sweep.space import Choice, Domain

FEWEST_TRIALS: Final = 4


class Importance(NamedTuple):
    """How much each key decides alone.

    Attributes:
        shares: of the metric's variance over the whole space, by key, the largest first; they add up to 1 at most, and
            what is missing is due to keys acting together. Empty where `reason` says why.
        trials: how many it rests on.
        reason: why there is none, as a sentence.
    """

    shares: Mapping[str, float]
    trials: int
    reason: str | None = None


def importance(sweep: Sweep, trials: Sequence[Trial], *, log: bool = False) -> Importance:
    """Judge each key by a random forest that is fitted to the trials.

    Args:
        sweep: what was searched.
        trials: those to learn from; all have a metric.
        log: explain the metric's logarithm: one diverged trial would be all of a loss' variance.
    """
    if sweep.settings.scheduler.name == "pbt":
        return Importance({}, 0, "Population based training changes a trial's settings on the way.")
    rows = [(row, trial.metric) for trial in trials if (row := _row(sweep, trial)) and trial.metric is not None]
    if len(rows) < FEWEST_TRIALS:
        return Importance({}, len(rows), f"It needs {FEWEST_TRIALS} trials with a figure, and there are {len(rows)}.")
    values = [math.log(metric) if log else metric for _, metric in rows]
    if max(values) == min(values):
        return Importance({}, len(rows), f"All {len(rows)} trials came to the same figure.")
    if all(row == rows[0][0] for row, _ in rows):
        return Importance({}, len(rows), f"All {len(rows)} trials had the same settings.")
    try:
        shares = _shares(sweep.space, [row for row, _ in rows], values)
    except RuntimeError:  # no tree of the forest found anything to split
        return Importance({}, len(rows), f"No key tells the {len(rows)} trials apart.")
    order = sorted(sweep.space, key=lambda key: -shares[key])
    return Importance({key: shares[key] for key in order}, len(rows))


def _shares(space: Mapping[str, Domain], rows: Sequence[dict[str, Any]], values: Sequence[float]) -> dict[str, float]:
    with _quiet_optuna():
        import optuna

        distributions = {key: _distribution(domain) for key, domain in space.items()}
        study = optuna.create_study()
        study.add_trials(
            [
                optuna.trial.create_trial(params=row, distributions=distributions, value=value)
                for row, value in zip(rows, values, strict=True)
            ]
        )
        trees = max(16, min(64, 6400 // len(rows)))  # their cost grows with the trials, their disagreement shrinks
        shares = optuna.importance.FanovaImportanceEvaluator(n_trees=trees, seed=0).evaluate(study)
        return {key: float(share) for key, share in shares.items()}


def _row(sweep: Sweep, trial: Trial) -> dict[str, Any] | None:
    """A trial's values as the forest takes them; None where one is not of the space."""
    row = {key: _coordinate(domain, trial.overrides.get(key)) for key, domain in sweep.space.items()}
    return None if None in row.values() else row


def _coordinate(domain: Domain, value: Any) -> Any:
    if isinstance(domain, Choice):
        text = _text(value)
        return text if text in map(_text, domain.values) else None
    if not isinstance(value, (int, float)) or not domain.low <= value <= domain.high:
        return None
    return math.log(value) if domain.log else float(value)


def _distribution(domain: Domain) -> Any:
    # Optuna's forest measures a logarithmic range by its values, so that the lower half of what was drawn would count
    # for nearly nothing; it gets the logarithms themselves.
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if isinstance(domain, Choice):
        return CategoricalDistribution([_text(value) for value in domain.values])
    low, high = (math.log(end) if domain.log else float(end) for end in (domain.low, domain.high))
    return FloatDistribution(low, high)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)

"""Write the page of a sweep: one HTML file that contains its figures.

The figures are SVG that takes its colors from the page's style sheet.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from densenet_dist.pages import printable, render
from densenet_dist.pages.figures import (
    PAGE,
    STATUSES,
    color,
    drawing,
    new_figure,
    set_epoch_axes,
    set_logarithmic,
    shortened,
    to_svg,
)
from densenet_dist.run_folder import RunFolder, join_location
from densenet_dist.sweep.definition import Sweep, SweepConfig
from densenet_dist.sweep.display import short, shown
from densenet_dist.sweep.results import BEST_FILE, PAGE_FILE, Trial, best_trial, ranked
from densenet_dist.sweep.space import Choice, Domain, encode

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MIN_TRIALS: Final = 4
"""For the importance of keys."""
_MAX_KEYS: Final = 12
_MAX_TICKS: Final = 8


def write_page(folder: RunFolder, sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Write sweep.html: the best trial, all trials as a table, plots, and the sweep's settings.

    Raises:
        StorageError: it cannot be written.
    """
    settings = sweep.settings
    best = best_trial(trials, settings.maximize)
    counts: Counter[str] = Counter(trial.status for trial in trials)
    started = [trial for trial in trials if trial.history]
    compared = [trial for trial in trials if trial.metric is not None and trial.status != "failed"]
    shares = importance(sweep, compared)
    curves_limit = _limit(settings, [list(trial.history.values()) for trial in started])
    dots_limit = _limit(settings, [[trial.metric] for trial in compared if trial.metric is not None])
    drawn = list(shares or sweep.space)[:_MAX_KEYS]
    with drawing(PAGE):
        curves = _curves(settings, started, best, curves_limit) if started else None
        dots = _dots(sweep, drawn, compared, best, dots_limit) if compared else None
        bars = _bars(settings, shares) if shares else None
    page = render(
        "sweep.html",
        title=settings.name,
        trials=ranked(trials, settings.maximize),
        planned=max(sweep.trials, len(trials)),
        counts=[f"{counts[status]} {status}" for status in STATUSES if counts[status]],
        sweep=settings,
        metric=_label(settings),
        best=best,
        key_columns=[(short(key), all(map(_is_number, domain.ends))) for key, domain in sweep.space.items()],
        keys=list(sweep.space),
        show=shown,
        location=folder.location,
        best_file=join_location(folder.location, BEST_FILE),
        can_resume=bool(counts["interrupted"] or counts["running"] or len(trials) < sweep.trials),
        has_tests=any("test/top1" in trial.metrics for trial in trials),
        has_errors=any(trial.error for trial in trials),
        legend=_legend,
        curves=curves,
        started=started,
        curves_limit=curves_limit,
        dots=dots,
        compared=compared,
        drawn=len(drawn),
        dots_limit=dots_limit,
        bars=bars,
        needed=_MIN_TRIALS,
        settings=sweep.to_yaml(),
    )
    folder.write(PAGE_FILE, page)


def _curves(settings: SweepConfig, trials: Sequence[Trial], best: Trial | None, limit: float | None) -> str:
    """Draw the metric against the epoch, a line per trial."""
    from matplotlib.collections import LineCollection

    curves = {
        trial.name: [(epoch, value * settings.unit) for epoch, value in sorted(trial.history.items())]
        for trial in trials
    }
    figure = new_figure(7.5, 4)
    axes = figure.add_subplot()
    thin = len(trials) > 60
    for status in STATUSES:
        lines = [curves[trial.name] for trial in trials if trial.status == status and trial is not best]
        axes.add_collection(LineCollection(lines, colors=color(status), linewidths=0.8 if thin else 1.4, alpha=0.5))
        size = 18 if status == "failed" else 8 if thin else 16
        _mark(axes, [line[-1] for line in lines], status, size, "x" if status == "failed" else "o")
    if best is not None and best.name in curves:
        axes.plot(*zip(*curves[best.name], strict=True), color=color("best"), linewidth=2.2, zorder=3.5)
        _mark(axes, curves[best.name][-1:], "best", 110, "*")
    axes.set_xlim(0, 1.05 * max(line[-1][0] for line in curves.values()))
    set_epoch_axes(axes, _label(settings))
    if limit is not None:
        axes.set_ylim(0, limit)
    return to_svg(figure, f"{settings.metric} against epoch")


def _dots(sweep: Sweep, keys: Sequence[str], trials: Sequence[Trial], best: Trial | None, limit: float | None) -> str:
    """Draw the metric against each key, a dot per trial."""
    columns = min(3, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = new_figure(3.6 * columns, 2.9 * rows)
    scores = {trial.name: (trial.metric or 0.0) * sweep.settings.unit for trial in trials}
    for i, key in enumerate(keys):
        axes = figure.add_subplot(rows, columns, i + 1)
        points = _values(axes, sweep.space[key], {trial.name: trial.overrides[key] for trial in trials})
        for status in STATUSES:
            names = [trial.name for trial in trials if trial.status == status and trial is not best]
            _mark(axes, [(points[name], scores[name]) for name in names], status, 16, "o")
        if best is not None:
            _mark(axes, [(points[best.name], scores[best.name])], "best", 90, "*")
        axes.set(xlabel=key, ylabel=_label(sweep.settings) if i % columns == 0 else "")
        if limit is not None:
            axes.set_ylim(0, limit)
    return to_svg(figure, f"{sweep.settings.metric} against each searched key")


def _values(axes: Axes, domain: Domain, values: Mapping[str, Any]) -> dict[str, float]:
    """Set up the horizontal axis of a key; return the position of each value."""
    if isinstance(domain, Choice):
        choices = list(domain.values)
        ticks = range(0, len(choices), math.ceil(len(choices) / _MAX_TICKS))
        labels = [shortened(printable(shown(choices[i]))) for i in ticks]
        axes.set_xticks(ticks, labels)
        axes.tick_params(axis="x", rotation=30 if sum(map(len, labels)) > 30 else 0)
        axes.set_xlim(-0.5, len(choices) - 0.5)
        return {name: choices.index(value) for name, value in values.items()}
    if domain.log:
        set_logarithmic(axes.xaxis, (1, 2, 5) if domain.high < 100 * domain.low else (1,))
    return {name: float(value) for name, value in values.items()}


def _bars(settings: SweepConfig, shares: Mapping[str, float]) -> str:
    """Draw the importance of each key."""
    keys = list(shares)[::-1]
    figure = new_figure(6.2, 0.9 + 0.34 * len(keys))
    axes = figure.add_subplot()
    bars = axes.barh(keys, [100 * shares[key] for key in keys], height=0.62, color=color("finished"))
    axes.bar_label(bars, fmt="%.0f %%", padding=5)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.margins(x=0.14)
    axes.set_xlabel(f"relative importance for {settings.metric} (%)")
    return to_svg(figure, f"Importance of each key for {settings.metric}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mark(axes: Axes, points: Iterable[tuple[float, float]], role: str, size: float, marker: str) -> None:
    x, y = zip(*points, strict=True) if (points := list(points)) else ((), ())
    axes.scatter(x, y, s=size, c=color(role), marker=marker, alpha=0.8, zorder=4 if role == "best" else 3)


def _limit(settings: SweepConfig, curves: Sequence[Sequence[float]]) -> float | None:
    """Return where to cut off losses that exploded, which would flatten all others; None if nothing is cut off."""
    if settings.is_accuracy or not curves:
        return None
    limit = 10 * statistics.median(map(min, curves))
    return limit if 0 < limit < max(map(max, curves)) else None


def _label(settings: SweepConfig) -> str:
    return f"{settings.metric} (%)" if settings.is_accuracy else settings.metric


def _legend(trials: Sequence[Trial], best: Trial | None) -> list[tuple[str, str, str]]:
    counts = {status: sum(trial.status == status for trial in trials) for status in STATUSES}
    signs = [(status, "✕" if status == "failed" else "●", f"{status} ({n})") for status, n in counts.items() if n]
    return [*signs, *([("best", "★", f"best: {best.name}")] if best is not None else [])]


def importance(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, float]:
    """Compute the importance of each key from the settings of the best trials and of all trials.

    Args:
        sweep: what was searched.
        trials: the trials to compare; all have a value of the metric.

    Returns:
        The share of each key, the largest first; their sum is 1. Empty if there are too few trials, or if they do not
        differ in their settings or in their metric.
    """
    rows = [(encode(trial.overrides), trial.metric) for trial in trials if trial.metric is not None]
    is_constant = all(row == rows[0][0] for row, _ in rows) or all(metric == rows[0][1] for _, metric in rows)
    if len(rows) < _MIN_TRIALS or is_constant:
        return {}
    import optuna

    distributions = {key: domain.distribution() for key, domain in sweep.space.items()}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize" if sweep.settings.maximize else "minimize")
    optuna.logging.set_verbosity(verbosity)
    # Optuna's default, the best tenth of all trials, is one or two of a small sweep: too few to tell keys apart.
    best = max(0.1, min(0.5, 5 / len(rows)))
    with warnings.catch_warnings(action="ignore"):  # values off a step; few trials, about which the page warns
        study.add_trials(
            [optuna.trial.create_trial(params=row, distributions=distributions, value=metric) for row, metric in rows]
        )
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=best)
        return optuna.importance.get_param_importances(study, evaluator=evaluator)

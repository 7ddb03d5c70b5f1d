"""Draw the figures of a sweep's page, as SVG that takes its colours from the page's style sheet."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from densenet_dist.pages.figures import STATUSES, colour, drawing, new_figure, shortened, to_svg
from densenet_dist.pages.render import printable
from densenet_dist.sweep.console import shown as format_value
from densenet_dist.sweep.definition import Sweep, SweepConfig
from densenet_dist.sweep.importance import MIN_TRIALS, importance
from densenet_dist.sweep.results import Trial
from densenet_dist.sweep.space import Choice, Domain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_POINTS: Final = 6_000
"""Points of all curves together: each takes about 12 bytes of the page."""
_MAX_KEYS: Final = 12
_MAX_TICKS: Final = 8


@dataclass(frozen=True)
class Plot:
    """One section of the page.

    Attributes:
        title: heading.
        caption: how to read the picture and what it leaves out; without a picture, the reason.
        pictures: SVG elements.
        legend: for each marker the name of its colour, the marker and its meaning.
    """

    title: str
    caption: str
    pictures: tuple[str, ...] = ()
    legend: tuple[tuple[str, str, str], ...] = ()


def draw_plots(sweep: Sweep, trials: Sequence[Trial], best: Trial | None) -> list[Plot]:
    """Draw the curves of the trials, their settings against the metric, and the importance of each key."""
    ranked = [trial for trial in trials if trial.metric is not None and trial.status != "failed"]
    shares = importance(sweep, ranked)
    with drawing():
        return [
            _curves(sweep.settings, trials, best),
            _settings(sweep, ranked, list(shares or sweep.space), len(trials) - len(ranked), best),
            _importance(sweep.settings, shares, len(ranked)),
        ]


def _curves(settings: SweepConfig, trials: Sequence[Trial], best: Trial | None) -> Plot:
    from matplotlib.collections import LineCollection
    from matplotlib.ticker import MaxNLocator

    title = "Metric against epoch"
    drawn = [trial for trial in trials if trial.history]
    if not drawn:
        return Plot(title, "Not shown: no trial finished its first epoch.")
    every = math.ceil(sum(len(trial.history) for trial in drawn) / _MAX_POINTS)
    curves = {trial.name: _points(settings, trial, every) for trial in drawn}
    figure = new_figure(7.5, 4)
    axes = figure.add_subplot()
    thin = len(drawn) > 60
    for status in STATUSES:
        lines = [curves[trial.name] for trial in drawn if trial.status == status and trial is not best]
        axes.add_collection(LineCollection(lines, colors=colour(status), linewidths=0.8 if thin else 1.4, alpha=0.5))
        size = 18 if status == "failed" else 8 if thin else 16
        _mark(axes, [line[-1] for line in lines], status, size, "x" if status == "failed" else "o")
    if best is not None and best.name in curves:
        axes.plot(*zip(*curves[best.name], strict=True), color=colour("best"), linewidth=2.2, zorder=3.5)
        _mark(axes, curves[best.name][-1:], "best", 110, "*")
    axes.set_xlim(0, 1.05 * max(line[-1][0] for line in curves.values()))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.set(xlabel="epoch", ylabel=_label(settings))
    limit = _cut(axes, settings, [list(trial.history.values()) for trial in drawn])
    caption = f"One line per trial: {settings.metric} after each epoch, the last epoch marked."
    caption += f" One epoch in {every} is drawn." if every > 1 else ""
    caption += limit + _left_out(len(trials) - len(drawn), "that finished no epoch")
    picture = to_svg(figure, f"{settings.metric} against epoch")
    return Plot(title, caption, (picture,), _legend(drawn, best))


def _points(settings: SweepConfig, trial: Trial, every: int) -> list[tuple[int, float]]:
    """Return the metric after each ``every``-th epoch and the last one, as points of a curve."""
    epochs = sorted(trial.history)
    kept = [*epochs[:-1:every], epochs[-1]]
    return [(epoch, trial.history[epoch] * settings.unit) for epoch in kept]


def _settings(sweep: Sweep, trials: Sequence[Trial], keys: Sequence[str], left_out: int, best: Trial | None) -> Plot:
    title = "Metric against each key"
    if not trials:
        return Plot(title, "Not shown: every trial failed or has no value of the metric.")
    drawn = keys[:_MAX_KEYS]
    columns = min(3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = new_figure(3.6 * columns, 2.9 * rows)
    for i, key in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, i + 1)
        points = _values(axes, sweep.space[key], {trial.name: trial.overrides.get(key) for trial in trials})
        scores = {trial.name: (trial.metric or 0.0) * sweep.settings.unit for trial in trials}
        for status in STATUSES:
            names = [trial.name for trial in trials if trial.status == status and trial is not best]
            _mark(axes, [(points[name], scores[name]) for name in names if name in points], status, 16, "o")
        if best is not None and best.name in points:
            _mark(axes, [(points[best.name], scores[best.name])], "best", 90, "*")
        axes.set(xlabel=key, ylabel=_label(sweep.settings) if i % columns == 0 else "")
        limit = _cut(axes, sweep.settings, [[trial.metric] for trial in trials if trial.metric is not None])
    caption = "One dot per trial, with the metric of its best epoch; all other keys vary too."
    if len(keys) > _MAX_KEYS:
        caption += f" Shown are {_MAX_KEYS} of {len(keys)} keys."
    caption += limit + _left_out(left_out, "that failed or have no value of the metric")
    picture = to_svg(figure, f"{sweep.settings.metric} against each searched key")
    return Plot(title, caption, (picture,), _legend(trials, best))


def _values(axes: Axes, domain: Domain, values: Mapping[str, Any]) -> dict[str, float]:
    """Set up the horizontal axis of a key; return the position of each value, without values that have none."""
    from matplotlib.ticker import LogLocator

    if isinstance(domain, Choice):
        choices = [_as_json(value) for value in domain.values]
        shown = range(0, len(choices), math.ceil(len(choices) / _MAX_TICKS))
        labels = [shortened(printable(format_value(domain.values[i]))) for i in shown]
        axes.set_xticks(shown, labels)
        axes.tick_params(axis="x", rotation=30 if sum(map(len, labels)) > 30 else 0)
        axes.set_xlim(-0.5, len(choices) - 0.5)
        return {name: choices.index(_as_json(value)) for name, value in values.items() if _as_json(value) in choices}
    points = {name: float(value) for name, value in values.items() if is_number(value)}
    if domain.log and all(value > 0 for value in points.values()):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if domain.high < 100 * domain.low else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")  # the default formatter needs math text, which pages turn off
        axes.minorticks_off()
    return points


def _importance(settings: SweepConfig, shares: Mapping[str, float], trials: int) -> Plot:
    title = "Importance of each key"
    if not shares:
        needed = f"{MIN_TRIALS} trials that differ in their settings and in {settings.metric}"
        return Plot(title, f"Not shown: it needs {needed}.")
    keys = list(shares)[::-1]
    figure = new_figure(6.2, 0.9 + 0.34 * len(keys))
    axes = figure.add_subplot()
    bars = axes.barh(keys, [100 * shares[key] for key in keys], height=0.62, color=colour("finished"))
    axes.bar_label(bars, fmt="%.0f %%", padding=5)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.margins(x=0.14)
    axes.set_xlabel(f"relative importance for {settings.metric} (%)")
    caption = (
        f"How much the settings of the best of {trials} trials differ from those of all, key by key (PED-ANOVA, "
        "Watanabe et al. 2023). A trial that was stopped early counts with the metric it had by then, which makes keys "
        "that decide the first epochs look more important than they are; failed trials are left out."
    )
    caption += " With so few trials this is a hint at most." if trials < 10 * len(keys) else ""
    return Plot(title, caption, (to_svg(figure, f"Importance of each key for {settings.metric}"),))


def is_number(value: Any) -> bool:
    """Return whether a value can be placed on an axis of numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mark(axes: Axes, points: Iterable[tuple[float, float]], role: str, size: float, marker: str) -> None:
    x, y = zip(*points, strict=True) if (points := list(points)) else ((), ())
    axes.scatter(x, y, s=size, c=colour(role), marker=marker, alpha=0.8, zorder=4 if role == "best" else 3)


def _cut(axes: Axes, settings: SweepConfig, curves: Sequence[Sequence[float]]) -> str:
    """Cut off losses that exploded, which would flatten all others; return a sentence about it."""
    middle, highest = statistics.median(map(min, curves)), max(map(max, curves))
    if settings.is_accuracy or not 0 < 10 * middle < highest:
        return ""
    axes.set_ylim(0, 10 * middle)
    return f" Losses above {10 * middle:.3g} are beyond the upper edge."


def _label(settings: SweepConfig) -> str:
    return f"{settings.metric} (%)" if settings.is_accuracy else settings.metric


def _legend(trials: Sequence[Trial], best: Trial | None) -> tuple[tuple[str, str, str], ...]:
    counts = {status: sum(trial.status == status for trial in trials) for status in STATUSES}
    signs = [(status, "✕" if status == "failed" else "●", f"{status} ({n})") for status, n in counts.items() if n]
    return (*signs, *([("best", "★", f"best: {best.name}")] if best is not None else []))


def _left_out(count: int, why: str) -> str:
    return f" Left out: {count} trial{'s' * (count > 1)} {why}." if count else ""


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)

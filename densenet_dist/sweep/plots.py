"""The plots of a sweep's page, as SVG that takes its colours from the page's style sheet."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from densenet_dist.pages.figures import SHADES, STATUSES, colour, drawing, new_figure, to_svg
from densenet_dist.pages.render import time_unit
from densenet_dist.sweep.axes import ROUND, Axis, axis_of, is_number, number_axis, number_ticks
from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.importance import Importance, importance
from densenet_dist.sweep.metric import Metric
from densenet_dist.sweep.results import Trial, ranked
from densenet_dist.sweep.space import Choice, Domain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_POINTS: Final = 12_000
_GROWTH: Final = "model.growth_rate"

Points: TypeAlias = list[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """One section of the page.

    Attributes:
        title: its heading.
        caption: how to read it and what it leaves out; where there is no picture, why.
        pictures: as SVG, side by side where the page is wide enough.
        legend: signs, each with the name of its colour, the sign and its meaning.
    """

    title: str
    caption: str
    pictures: tuple[str, ...] = ()
    legend: tuple[tuple[str, str, str], ...] = ()


def draw_plots(sweep: Sweep, trials: Sequence[Trial], best: Trial | None) -> list[Plot]:
    """All plots, in the order in which they are to be read."""
    metric = Metric(sweep.settings.metric, sweep.settings.maximise)
    judged = [trial for trial in trials if trial.metric is not None and trial.status != "failed"]
    shares = importance(sweep, judged)
    with drawing():
        return [
            _curves(metric, trials, best),
            _parallel(sweep, metric, judged, len(trials) - len(judged), best),
            _importance(metric, shares),
            _against_key(sweep, metric, judged, shares, best),
        ]


def has_numbers(domain: Domain) -> bool:
    """Whether all values are numbers."""
    return all(map(is_number, domain.ends))


def _curves(metric: Metric, trials: Sequence[Trial], best: Trial | None) -> Plot:
    title = "Metric against epoch and time"
    shown = [trial for trial in trials if trial.history]
    if not shown:
        return Plot(title, "Not shown: no trial finished its first epoch.")
    every = math.ceil(sum(len(trial.history) for trial in shown) / _MOST_POINTS)
    timed = [trial for trial in shown if trial.seconds > 0 and trial.epochs > 0]
    top = _top(metric, shown)
    unit, divisor = time_unit(max((trial.seconds for trial in timed), default=0.0))
    by_epoch = [(trial, _points(metric, trial, every)) for trial in shown]
    by_time = [(trial, _points(metric, trial, every, trial.seconds / trial.epochs / divisor)) for trial in timed]
    pictures = [_curve(metric, by_epoch, best, top, "epoch")]
    pictures += [_curve(metric, by_time, best, top, f"training time ({unit})")] if timed else []
    caption = (
        f"One line per trial: {metric.name} after each epoch, the last epoch marked. Training time is without "
        "evaluation and counts all epochs of a trial as equally long."
    )
    caption += f" One epoch in {every} is drawn." if every > 1 else ""
    caption += f" Losses above {top:.3g} are beyond the upper edge." if top is not None else ""
    caption += _left_out(len(trials) - len(shown), "that finished no epoch")
    legend = [
        (status, "✕" if status == "failed" else "●", f"{status} ({count})")
        for status in STATUSES
        if (count := sum(trial.status == status for trial in shown))
    ]
    legend += [("best", "★", f"best: {best.name}")] if best is not None else []
    return Plot(title, caption, tuple(pictures), tuple(legend))


def _top(metric: Metric, trials: Sequence[Trial]) -> float | None:
    """Where to cut losses that exploded; None where none did."""
    middle = statistics.median([min(trial.history.values()) for trial in trials])
    highest = max(max(trial.history.values()) for trial in trials)
    return None if metric.percent or not 0 < 10 * middle < highest else 10 * middle


def _curve(
    metric: Metric, curves: Sequence[tuple[Trial, Points]], best: Trial | None, top: float | None, x: str
) -> str:
    from matplotlib.collections import LineCollection
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(5.9, 3.8)
    axes = figure.add_subplot()
    crowded = len(curves) > 60
    for status in STATUSES:
        lines = [points for trial, points in curves if trial.status == status and trial is not best]
        width = 0.8 if crowded else 1.4
        axes.add_collection(LineCollection(lines, colors=colour(status), linewidths=width, alpha=0.5), autolim=True)
        size = 18 if status == "failed" else 8 if crowded else 16
        _dots(axes, [line[-1] for line in lines], status, size, "x" if status == "failed" else "o")
    for points in [points for trial, points in curves if trial is best]:
        axes.plot(*zip(*points, strict=True), color=colour("best"), linewidth=2.2, zorder=3.5)
        _dots(axes, points[-1:], "best", 90, "*")
    axes.autoscale_view()
    axes.set_xlim(0, 1.05 * max(points[-1][0] for _, points in curves))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=ROUND, integer=x == "epoch", min_n_ticks=1))
    axes.set(xlabel=x, ylabel=metric.label)
    _metric_axis(axes, metric, [value for trial, _ in curves for value in trial.history.values()], top)
    return to_svg(figure, f"{metric.name} against {x}")


def _points(metric: Metric, trial: Trial, every: int, scale: float = 1.0) -> Points:
    """The metric after every so many epochs and the last one; an epoch is `scale` long on the axis."""
    epochs = sorted(trial.history)
    kept = [epoch for i, epoch in enumerate(epochs) if i % every == 0 or i == len(epochs) - 1]
    return [(epoch * scale, metric.scaled(trial.history[epoch])) for epoch in kept]


def _dots(axes: Axes, points: Sequence[tuple[float, float]], role: str, size: float, marker: str) -> None:
    above = 4 if role == "best" else 3
    x, y = [x for x, _ in points], [y for _, y in points]
    axes.scatter(x, y, s=size, c=colour(role), marker=marker, alpha=1.0 if above == 4 else 0.8, zorder=above)


def _metric_axis(axes: Axes, metric: Metric, values: Sequence[float], top: float | None = None) -> None:
    log = metric.log(values)
    if log:
        axes.set_yscale("log")
    if top is not None:
        low = min(values)
        axes.set_ylim(low / 1.1 if log else low - 0.05 * (top - low), top)
    if log:
        ticks = number_ticks(*axes.get_ylim(), log=True)
        axes.set_yticks([tick for tick, _ in ticks], [text for _, text in ticks])
        axes.minorticks_off()


def _parallel(sweep: Sweep, metric: Metric, judged: Sequence[Trial], left_out: int, best: Trial | None) -> Plot:
    title = "Settings and metric"
    if not judged:
        return Plot(title, "Not shown: no trial that did not fail has a value of the metric.")
    values = [metric.scaled(trial.metric) for trial in judged if trial.metric is not None]
    scale = number_axis(min(values), max(values), metric.log(values))
    rows = [
        [*(trial.overrides.get(key) for key in sweep.space), metric.scaled(trial.metric or 0.0)] for trial in judged
    ]
    axes = [axis_of(domain, [row[i] for row in rows]) for i, domain in enumerate(sweep.space.values())] + [scale]
    groups = [key.rpartition(".") for key in sweep.space]
    names = [f"{group}{dot}\n{last}" for group, dot, last in groups]
    names.append(f"{metric.label}\n{'highest' if metric.maximise else 'lowest'} is best")
    caption = (
        f"One line per trial, through its value of each key to its {metric.name} on the right; the stronger the "
        "colour, the better its rank. Ranges that were searched on a logarithmic scale have logarithmic axes."
    )
    if sweep.settings.scheduler.name == "pbt":
        caption += " Settings changed during training: these are the last ones."
    caption += _left_out(left_out, "that failed or has no value of the metric")
    legend = (("best", "━", f"best: {best.name}"),) if best is not None else ()
    return Plot(title, caption, (_parallel_picture(metric, judged, rows, axes, names, best),), legend)


def _parallel_picture(
    metric: Metric,
    judged: Sequence[Trial],
    rows: Sequence[list[Any]],
    axes: Sequence[Axis],
    names: Sequence[str],
    best: Trial | None,
) -> str:
    from matplotlib.collections import LineCollection

    inches, right, height = max(1.45, min(2.3, 9.5 / len(axes))), 0.75, 4.4
    left = max(0.2 + 0.075 * axes[0].width, 0.75)
    width = left + inches * (len(axes) - 1) + right
    figure = new_figure(width, height, layout=None)
    canvas = figure.add_axes((left / width, 0.06, 1 - (left + right) / width, 0.76))
    canvas.set(xlim=(0, len(axes) - 1), ylim=(0, 1))
    canvas.axis("off")
    for x, (axis, name) in enumerate(zip(axes, names, strict=True)):
        canvas.plot([x, x], [0, 1], color=colour("muted"), linewidth=1, clip_on=False, zorder=2)
        canvas.text(x, 1.06, name, ha="center", va="bottom", linespacing=1.3)
        for place, text in axis.ticks:
            canvas.plot([x - 0.02, x], [place, place], color=colour("muted"), linewidth=1, clip_on=False, zorder=2)
            canvas.text(x - 0.04, place, text, ha="right", va="center", fontsize=8, zorder=5)
    crowded = len(judged) > 60
    lines: dict[str, list[list[tuple[float, float]]]] = {}
    ranks = {trial.name: rank for rank, trial in enumerate(ranked(judged, metric.maximise))}
    for trial, row in zip(judged, rows, strict=True):
        places = [(float(x), axis.place(value)) for x, (axis, value) in enumerate(zip(axes, row, strict=True))]
        shade = SHADES - 1 - ranks[trial.name] * SHADES // len(judged)
        role = "best" if trial is best else f"shade{shade}"
        lines.setdefault(role, []).append([point for point in places if not math.isnan(point[1])])
    for order, role in enumerate([*(f"shade{i}" for i in range(SHADES)), "best"]):
        canvas.add_collection(
            LineCollection(
                lines.get(role, []),
                colors=colour(role),
                linewidths=2.6 if role == "best" else 0.8 if crowded else 1.4,
                alpha=0.3 + 0.1 * order if crowded else 1.0,
                clip_on=False,
                zorder=4 + order / 10,
            ),
            autolim=False,
        )
    return to_svg(figure, f"Searched settings and {metric.name} of each trial")


def _importance(metric: Metric, found: Importance) -> Plot:
    title = "Importance of each key"
    if found.reason is not None:
        return Plot(title, f"Not shown. {found.reason}")
    keys = list(found.shares)[::-1]
    figure = new_figure(6.2, 0.9 + 0.34 * len(keys))
    axes = figure.add_subplot()
    shares = [100 * found.shares[key] for key in keys]
    axes.barh(range(len(keys)), shares, height=0.62, color=colour("finished"))
    for y, share in enumerate(shares):
        axes.annotate(f"{share:.0f} %", (share, y), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(keys)), keys)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set(xlim=(0, max(*shares, 1.0) * 1.14), xlabel=f"relative importance for {metric.name} (%)")
    caption = (
        f"How much the settings of the best of {found.trials} trials differ from those of all, key by key (PED-ANOVA, "
        "Watanabe et al. 2023). A trial that was stopped early counts with the metric it had by then, which makes keys "
        "that decide the first epochs look more important than they are; failed trials are left out."
    )
    caption += " With so few trials this is a hint at most." if found.trials < 10 * len(keys) else ""
    return Plot(title, caption, (to_svg(figure, f"Importance of each key for {metric.name}"),))


def _against_key(sweep: Sweep, metric: Metric, judged: Sequence[Trial], shares: Importance, best: Trial | None) -> Plot:
    ordered = list(shares.shares or sweep.space)
    numbers = [key for key in ordered if has_numbers(sweep.space[key])]
    keys = [key for key in numbers if any(is_number(trial.overrides.get(key)) for trial in judged)]
    key = _GROWTH if _GROWTH in keys else keys[0] if keys else None
    title = "Accuracy and cost against growth rate" if _GROWTH in sweep.space else "Metric against a key"
    if key is None:
        return Plot(
            title, f"Not shown: {'no trial has a value of the metric' if numbers else 'no searched key is a number'}."
        )
    shown = [trial for trial in judged if is_number(trial.overrides.get(key))]
    domain = sweep.space[key]
    log = (
        min(domain.ends) > 0 and max(domain.ends) > 50 * min(domain.ends) if isinstance(domain, Choice) else domain.log
    )
    scores = [(trial, metric.scaled(trial.metric or 0.0)) for trial in shown]
    pictures = [_scatter(key, log, scores, metric.label, best, metric)]
    caption = "One dot per trial; where trials share values, a line joins the medians. "
    if key == _GROWTH:
        sizes = [(trial, float(trial.parameters)) for trial in shown if trial.parameters]
        times = [(trial, trial.seconds / trial.epochs) for trial in shown if trial.epochs and trial.seconds > 0]
        for cost, label in ((sizes, "trainable parameters"), (times, "training time of an epoch (s)")):
            pictures += [_scatter(key, log, cost, label, best)] if cost else []
        caption += "All other keys vary too, and trials that shared processors with others took longer."
    else:
        title = f"Metric against {key}"
        why = "the most important key that is a number" if shares.shares else "the first key that is a number"
        caption += f"Shown is {why}; all other keys vary too."
    caption += " Trials stopped early count with the metric they had by then; failed ones are left out."
    marks = [
        (status, "●", status)
        for status in STATUSES
        if any(trial.status == status for trial in shown if trial is not best)
    ]
    marks += [("best", "★", f"best: {best.name}")] if best in shown and best is not None else []
    return Plot(title, caption, tuple(pictures), tuple(marks))


def _scatter(
    key: str,
    log: bool,
    values: Sequence[tuple[Trial, float]],
    label: str,
    best: Trial | None,
    metric: Metric | None = None,
) -> str:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = new_figure(3.95, 3.4)
    axes = figure.add_subplot()
    by_value: dict[float, list[float]] = {}
    for trial, y in values:
        by_value.setdefault(float(trial.overrides[key]), []).append(y)
    for status in STATUSES:
        dots = [(trial.overrides[key], y) for trial, y in values if trial.status == status and trial is not best]
        _dots(axes, dots, status, 22, "o")
    _dots(axes, [(trial.overrides[key], y) for trial, y in values if trial is best], "best", 110, "*")
    if 1 < len(by_value) <= min(12, len(values) / 2):
        medians = [(x, statistics.median(ys)) for x, ys in sorted(by_value.items())]
        axes.plot(*zip(*medians, strict=True), color=colour("muted"), linewidth=1.4, zorder=2)
    if log:
        axes.set_xscale("log")
        axes.minorticks_off()
    if 1 < len(by_value) <= 7:
        axes.set_xticks(sorted(by_value), [f"{x:g}" for x in sorted(by_value)])
    elif log:
        ticks = number_ticks(*axes.get_xlim(), log=True)
        axes.set_xticks([tick for tick, _ in ticks], [text for _, text in ticks])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=ROUND, integer=all(x.is_integer() for x in by_value)))
    axes.set(xlabel=key, ylabel=label)
    if metric is not None:
        _metric_axis(axes, metric, [y for _, y in values])
    else:
        axes.set_ylim(0, 1.08 * max(y for _, y in values))
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    return to_svg(figure, f"{label} against {key}")


def _left_out(count: int, why: str) -> str:
    return f" Left out: {count} trial{'s' * (count > 1)} {why}." if count else ""

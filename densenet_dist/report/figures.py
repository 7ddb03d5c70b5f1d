"""The pictures of a run's page, as SVG that takes its colours from the page's style sheet."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from densenet_dist.pages.confusion import confusion_figure, printed, printed_confusion
from densenet_dist.pages.render import time_unit
from densenet_dist.pages.svg import SHADES, colour, drawing, new_figure, to_svg
from densenet_dist.train.results import BINS, Calibration, Counts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from densenet_dist.pages.picture import Picture

_SIZE: Final = (3.95, 3.1)
_RESULTS: Final = (
    ("top1", "top-1 accuracy (%)", 100.0),
    ("loss", "cross-entropy (nats)", 1.0),
    ("top5", "top-5 accuracy (%)", 100.0),
)
"""Metric, label and unit."""
_PRINTED: Final = {"train": "tab:blue", "val": "tab:orange", "test": "tab:red"}

Records = Sequence[dict[str, Any]]
Points = list[tuple[float, float]]


def result_pictures(epochs: Records, test: dict[str, Any] | None) -> tuple[str, ...]:
    """Top-1, loss and top-5 of training and validation over the epochs, the test result as a star."""
    with drawing():
        return tuple(_result(*result, epochs, test) for result in _RESULTS)


def progress_pictures(epochs: Records) -> tuple[str, ...]:
    """Learning rate over the epochs; throughput, data wait and goodput over the time spent."""
    ends = list(itertools.accumulate(float(record.get("seconds", 0.0)) for record in epochs))
    unit, divisor = time_unit(ends[-1])
    times = [end / divisor for end in ends]
    curves = [
        ("perf/images_per_s", 1.0, "training images/s"),
        ("perf/data_wait", 100.0, "waiting for data (% of time)"),
    ]
    if any("goodput/ratio" in record for record in epochs):
        curves.append(("goodput/ratio", 100.0, "goodput (% of time)"))
    with drawing():
        return (
            _progress([float(record["epoch"]) for record in epochs], epochs, "lr", 1.0, "epoch", "learning rate"),
            *(_progress(times, epochs, key, scale, f"time ({unit})", label) for key, scale, label in curves),
        )


def points_of(epochs: Records, key: str, unit: float) -> Points:
    """A figure of the epochs that have it, where it is a number."""
    return [(float(r["epoch"]), r[key] * unit) for r in epochs if key in r and math.isfinite(r[key])]


def curves_figure(epochs: Records, test: dict[str, Any] | None, title: str) -> Picture:
    """Top-1 and loss as in `result_pictures`, side by side; ``curves.png``."""
    figure = new_figure(11, 4.2)
    for axes, heading, result in zip(figure.subplots(1, 2), ("Accuracy", "Loss"), _RESULTS, strict=False):
        _draw_result(axes, *result, epochs, test, _PRINTED)
        axes.set_title(heading)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    return figure


def _result(name: str, label: str, unit: float, epochs: Records, test: dict[str, Any] | None) -> str:
    figure = new_figure(*_SIZE)
    colours = {role: colour(role) for role in _PRINTED}
    _draw_result(figure.add_subplot(), name, label, unit, epochs, test, colours)
    return to_svg(figure, f"{label} against epoch")


def _draw_result(
    axes: Axes,
    name: str,
    label: str,
    unit: float,
    epochs: Records,
    test: dict[str, Any] | None,
    colours: Mapping[str, str],
) -> None:
    values: list[float] = []
    for split, text in (("train", "training"), ("val", "validation")):
        points = points_of(epochs, f"{split}/{name}", unit)
        line(axes, points, colours[split], label=text)
        values += [y for _, y in points]
    value = math.nan if test is None else test.get(f"test/{name}", math.nan) * unit
    if test is not None and math.isfinite(value):
        text = f"test {value:.2f} %" if unit == 100.0 else f"test {value:.3f}"
        axes.scatter(test["epoch"], value, s=110, c=colours["test"], marker="*", zorder=4, label=text)
        values.append(value)
    if name == "loss" and values and min(values) > 0 and max(values) > 5 * statistics.median(values):
        logarithmic(axes)  # one bad epoch must not flatten all the others
    whole_epochs(axes)
    axes.set(xlabel="epoch", ylabel=label)


def line(axes: Axes, points: Points, color: str, label: str | None = None) -> None:
    """A line, with dots where there are few of them."""
    if points:
        dots = "o" if len(points) < 40 else ""
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.8, marker=dots, markersize=3, label=label)


def whole_epochs(axes: Axes) -> None:
    """Ticks at whole epochs only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))


def logarithmic(axes: Axes) -> None:
    """A logarithmic scale with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def _progress(places: Sequence[float], epochs: Records, key: str, unit: float, xlabel: str, label: str) -> str:
    figure = new_figure(*_SIZE)
    axes = figure.add_subplot()
    points = [(x, r[key] * unit) for x, r in zip(places, epochs, strict=True) if math.isfinite(r.get(key, math.nan))]
    line(axes, points, colour("train"))
    values = [y for _, y in points] or [0.0]
    if key == "lr" and min(values) > 0 and max(values) > 100 * min(values):
        logarithmic(axes)
    else:
        axes.set_ylim(0, 1.08 * max(values) or 1.0)
    if xlabel == "epoch":
        whole_epochs(axes)
    else:
        axes.set_xlim(0, 1.03 * places[-1] or 1.0)
    axes.set(xlabel=xlabel, ylabel=label)
    return to_svg(figure, f"{label} against {xlabel}")


def calibration_pictures(found: Calibration) -> tuple[str, ...]:
    """The reliability diagram, and how many images there are at each confidence."""
    with drawing():
        figure = new_figure(4.3, 3.7)
        axes = figure.add_subplot()
        middles = (np.arange(BINS) + 0.5) / BINS * 100
        some = found.images > 0
        axes.bar(middles[some], found.accuracy[some] * 100, width=92 / BINS, color=colour("train"))
        axes.plot([0, 100], [0, 100], color=colour("muted"), linewidth=1.4, linestyle="--")
        axes.scatter(found.confidence[some] * 100, found.accuracy[some] * 100, s=16, c=colour("test"), zorder=4)
        axes.set(xlim=(0, 100), ylim=(0, 102), xlabel="confidence (%)", ylabel="accuracy (%)")
        reliability = to_svg(figure, "accuracy against confidence")
        figure = new_figure(4.3, 3.7)
        axes = figure.add_subplot()
        axes.bar(middles, found.images, width=92 / BINS, color=colour("train"))
        if max(found.images) > 20 * statistics.median(found.images[some].tolist()):
            logarithmic(axes)
            axes.set_ylim(bottom=0.8)  # a single image is to be seen
        axes.set(xlim=(0, 100), xlabel="confidence (%)", ylabel="test images")
        return reliability, to_svg(figure, "test images against confidence")


def confusion_picture(confusion: Counts, names: Sequence[str]) -> str:
    """The confusion matrix for the page; cells without images are left out."""
    with drawing():
        shades = [colour(f"shade{i}") for i in range(SHADES)]
        figure = confusion_figure(confusion, names, shades, [colour("ink")] * SHADES)
        return to_svg(figure, "confusion matrix")


def titled_confusion(confusion: Counts, names: Sequence[str], title: str) -> Picture:
    """The confusion matrix as a figure; ``confusion.png``."""
    with printed():
        figure = printed_confusion(confusion, names)
        figure.suptitle(title)
        return figure

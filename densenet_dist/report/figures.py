"""The figures of a run, as SVG for its report and as matplotlib figures for `Result`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from densenet_dist.pages.figures import (
    PAGE,
    PRINTED,
    SHADES,
    color,
    confusion_figure,
    drawing,
    new_figure,
    set_epoch_axes,
    set_logarithmic,
    to_svg,
)
from densenet_dist.train.results import BINS, Calibration, Counts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE: Final = (3.95, 3.1)
_RESULTS: Final = (
    ("top1", "top-1 accuracy (%)", 100.0),
    ("loss", "cross-entropy (nats)", 1.0),
    ("top5", "top-5 accuracy (%)", 100.0),
)
"""Metric, label and unit."""
_PRINTED_COLORS: Final = {"train": "tab:blue", "val": "tab:orange", "test": "tab:red"}

Records: TypeAlias = Sequence[dict[str, Any]]
Points: TypeAlias = list[tuple[float, float]]


def result_figures(epochs: Records, test: dict[str, Any] | None) -> list[str]:
    """Plot top-1, loss and top-5 of training and validation against the epoch, with the test result as a star."""
    colors = {role: color(role) for role in _PRINTED_COLORS}
    figures = []
    with drawing(PAGE):
        for name, label, unit in _RESULTS:
            if not any(f"train/{name}" in record for record in epochs):
                continue  # top-5 of few classes
            figure = new_figure(*_SIZE)
            _plot_result(figure.add_subplot(), name, label, unit, epochs, test, colors)
            figures.append(to_svg(figure, f"{label} against epoch"))
    return figures


def curves_figure(epochs: Records, test: dict[str, Any] | None, title: str) -> Figure:
    """Plot top-1 and loss as in `result_figures`, side by side, for `Result.plot`."""
    figure = new_figure(11, 4.2)
    for axes, heading, result in zip(figure.subplots(1, 2), ("Accuracy", "Loss"), _RESULTS, strict=False):
        _plot_result(axes, *result, epochs, test, _PRINTED_COLORS)
        axes.set_title(heading)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    return figure


def _plot_result(
    axes: Axes,
    name: str,
    label: str,
    unit: float,
    epochs: Records,
    test: dict[str, Any] | None,
    colors: Mapping[str, str],
) -> None:
    values: list[float] = []
    for split, text in (("train", "training"), ("val", "validation")):
        points = metric_points(epochs, f"{split}/{name}", unit)
        line(axes, points, colors[split], label=text)
        values += [y for _, y in points]
    value = math.nan if test is None else test.get(f"test/{name}", math.nan) * unit
    if test is not None and math.isfinite(value):
        text = f"test {value:.2f} %" if unit == 100.0 else f"test {value:.3f}"
        axes.scatter(test["epoch"], value, s=110, c=colors["test"], marker="*", zorder=4, label=text)
        values.append(value)
    if name == "loss" and values and min(values) > 0 and max(values) > 5 * statistics.median(values):
        set_logarithmic(axes.yaxis)  # a single bad epoch must not flatten the others
    set_epoch_axes(axes, label)


def metric_points(epochs: Records, key: str, unit: float) -> Points:
    """Return the finite values of a metric, by epoch."""
    return [(float(r["epoch"]), r[key] * unit) for r in epochs if key in r and math.isfinite(r[key])]


def line(axes: Axes, points: Points, color: str, label: str | None = None) -> None:
    """Plot a line, with markers if there are few points."""
    if points:
        marker = "o" if len(points) < 40 else ""
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.8, marker=marker, markersize=3, label=label)


def calibration_svg(found: Calibration) -> str:
    """Plot the reliability diagram; the area of a dot is proportional to the number of its images."""
    centers = (np.arange(BINS) + 0.5) / BINS * 100
    used = found.images > 0
    with drawing(PAGE):
        figure = new_figure(4.3, 3.7)
        axes = figure.add_subplot()
        axes.bar(centers[used], found.accuracy[used] * 100, width=92 / BINS, color=color("train"))
        axes.plot([0, 100], [0, 100], color=color("muted"), linewidth=1.4, linestyle="--")
        areas = 8 + 120 * found.images[used] / found.images.max()
        axes.scatter(found.confidence[used] * 100, found.accuracy[used] * 100, s=areas, c=color("test"), zorder=4)
        axes.set(xlim=(0, 100), ylim=(0, 102), xlabel="confidence (%)", ylabel="accuracy (%)")
        return to_svg(figure, "accuracy against confidence")


def confusion_svg(confusion: Counts, names: Sequence[str]) -> str:
    """Draw the confusion matrix for the page."""
    shades, inks = [color(f"shade{i}") for i in range(SHADES)], [color("ink")] * SHADES
    with drawing(PAGE):
        return to_svg(confusion_figure(confusion, names, shades=shades, inks=inks), "confusion matrix")


def titled_confusion(confusion: Counts, names: Sequence[str], title: str) -> Figure:
    """Draw the confusion matrix for `Result.plot_confusion`."""
    with drawing(PRINTED):
        figure = confusion_figure(confusion, names)
        figure.suptitle(title)
        return figure

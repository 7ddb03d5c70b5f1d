"""curves.png: the notebook's plots of a run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from densenet_dist.pages.picture import Picture

CURVES_FILE = "curves.png"


def draw_curves(records: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the curves as a PNG file."""
    curves_figure(records, title).savefig(path, dpi=120)


def curves_figure(records: Sequence[dict[str, Any]], title: str) -> Picture:
    """Accuracy and loss of training and validation over the epochs, the test result as a star.

    Args:
        records: the lines of metrics.jsonl.
        title: of the figure.
    """
    from densenet_dist.pages.picture import Picture

    epochs = [record for record in records if "train/loss" in record]
    tests = [record for record in records if "test/loss" in record]
    figure = Picture(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _curves(left, epochs, tests, "top1", 100.0)
    left.set(title="Accuracy", xlabel="epoch", ylabel="top-1 accuracy (%)")
    _curves(right, epochs, tests, "loss", 1.0)
    right.set(title="Loss", xlabel="epoch", ylabel="cross-entropy")
    figure.suptitle(title)
    return figure


def _curves(axes: Axes, epochs: list[dict[str, Any]], tests: list[dict[str, Any]], name: str, unit: float) -> None:
    for split, label, colour in (("train", "training", "tab:blue"), ("val", "validation", "tab:orange")):
        points = [
            (record["epoch"], record[f"{split}/{name}"] * unit) for record in epochs if f"{split}/{name}" in record
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=colour, marker="." if len(points) < 40 else "")
    for record in tests[-1:]:
        value = record[f"test/{name}"] * unit
        shown = f"test {value:.2f} %" if unit == 100.0 else f"test {value:.3f}"
        axes.plot(record["epoch"], value, "*", label=shown, color="tab:red", markersize=15, zorder=3)
    if len(epochs) <= 12:
        axes.set_xticks([record["epoch"] for record in epochs])
    values = [value for line in axes.lines for value in np.atleast_1d(line.get_ydata())]
    if name == "loss" and values and min(values) > 0 and max(values) > 5 * statistics.median(values):
        axes.set_yscale("log")  # one bad epoch must not flatten all the others
    axes.grid(alpha=0.3)
    axes.legend()

"""The notebook's plots."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import imread

from densenet_dist.report.curves import draw_curves

COLOURS = {"training": (31, 119, 180), "validation": (255, 127, 14), "test": (214, 39, 40)}


def shown(tmp_path, lines):
    """Whose colours are in the left half and in the right half of the picture."""
    draw_curves(lines, "run", tmp_path / "curves.png")
    picture = (imread(tmp_path / "curves.png")[..., :3] * 255).round().astype(int)
    halves = np.array_split(picture, 2, axis=1)
    return [{name for name, c in COLOURS.items() if (np.abs(half - c).max(-1) < 8).sum() > 20} for half in halves]


@pytest.mark.parametrize("epochs", [1, 60])
def test_curves_and_star(tmp_path, epochs):
    lines = [{"epoch": e, "train/loss": 1 / e, "train/top1": 1 - 1 / (e + 1)} for e in range(1, epochs + 1)]
    assert shown(tmp_path, lines) == [{"training"}] * 2
    lines = [line | {"val/loss": 1.2 / line["epoch"], "val/top1": 0.5} for line in lines]
    assert shown(tmp_path, [*lines, {"epoch": epochs, "test/loss": 0.9, "test/top1": 0.6}]) == [set(COLOURS)] * 2

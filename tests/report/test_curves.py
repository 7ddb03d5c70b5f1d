"""The notebook's plots."""

from __future__ import annotations

import numpy as np
from matplotlib.image import imread

from densenet_dist.report.figures import curves_figure

COLOURS = {"training": (31, 119, 180), "validation": (255, 127, 14), "test": (214, 39, 40)}


def shown(path, epochs, test=None):
    """Whose colours are in the left half and in the right half of the picture."""
    curves_figure(epochs, test, "run").savefig(path)
    picture = (imread(path)[..., :3] * 255).round().astype(int)
    halves = np.array_split(picture, 2, axis=1)
    return [{name for name, c in COLOURS.items() if (np.abs(half - c).max(-1) < 8).sum() > 20} for half in halves]


def test_curves_and_star(tmp_path):
    epochs = 60
    records = [{"epoch": e, "train/loss": 1 / e, "train/top1": 1 - 1 / (e + 1)} for e in range(1, epochs + 1)]
    assert shown(tmp_path / "x.png", records) == [{"training"}] * 2
    records = [record | {"val/loss": 1.2 / record["epoch"], "val/top1": 0.5} for record in records]
    test = {"epoch": epochs, "test/loss": 0.9, "test/top1": 0.6}
    assert shown(tmp_path / "x.png", records, test) == [set(COLOURS)] * 2

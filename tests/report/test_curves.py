"""The notebook's plots."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.image import imread

from densenet_dist.report import plot_curves
from densenet_dist.run_folder import RunFolder

STAR = np.array([214, 39, 40])  # tab:red
CURVES = {"training": np.array([31, 119, 180]), "validation": np.array([255, 127, 14])}


def _draw(tmp_path, lines):
    run = RunFolder(str(tmp_path), "run")
    run.create()
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = imread(plot_curves(run))
    return (picture[..., :3] * 255).round().astype(int)


def _has(picture, colour):
    return int((np.abs(picture - colour).max(-1) < 8).sum())


def _epoch(number, **more):
    return {
        "global_step": number,
        "epoch": number,
        "train/loss": 1 / number,
        "train/top1": 1 - 1 / (number + 1),
        **more,
    }


@pytest.mark.parametrize("epochs", [1, 3, 60])
def test_curves_and_star(tmp_path, epochs):
    lines = [_epoch(e, **{"val/loss": 1.2 / e, "val/top1": 1 - 1.2 / (e + 1)}) for e in range(1, epochs + 1)]
    picture = _draw(tmp_path, [*lines, {"global_step": epochs, "epoch": epochs, "test/loss": 0.9, "test/top1": 0.6}])
    half = picture.shape[1] // 2
    for side in (picture[:, :half], picture[:, half:]):
        assert _has(side, STAR) > 50
        assert all(_has(side, colour) > 20 for colour in CURVES.values())


def test_without_validation_or_test(tmp_path):
    picture = _draw(tmp_path, [_epoch(1), _epoch(2)])
    assert _has(picture, CURVES["training"]) > 20
    assert _has(picture, CURVES["validation"]) == 0
    assert _has(picture, STAR) == 0

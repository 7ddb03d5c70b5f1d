"""Runs, a sweep and an export made at 4f7335e: tests/fixtures/runs_4f7335e.tar.xz."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

KEYS = ("epochs", "global_step", "test/loss", "test/top1", "test/top5")
ARCHIVE = Path(__file__).parents[1] / "fixtures" / "runs_4f7335e.tar.xz"


def test_earlier_runs_can_be_resumed_evaluated_reported_exported_and_used(command, tmp_path):
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(runs := tmp_path / "runs", filter="data")
    finished = json.loads((runs / "finished/summary.json").read_text())

    for run in ("interrupted", "finished"):  # the same settings
        assert command("train", "--resume", runs / run)[0] == 0
        summary = json.loads((runs / run / "summary.json").read_text())
        assert [summary[key] for key in KEYS] == pytest.approx([finished[key] for key in KEYS], rel=1e-3)
        code, out, _ = command("evaluate", runs / run, "--json")
        assert (code, json.loads(out)["top1"]) == (0, pytest.approx(finished["test/top1"], rel=1e-3))
        assert command("report", runs / run)[0] == 0
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(tmp_path / "image.png")
    for name in ("finished", "finished.safetensors"):
        code, out, _ = command("predict", runs / name, "image.png", "--json")
        top = json.loads(out)["top"][0]
        assert (code, top["class"], top["probability"]) == (0, "frame", pytest.approx(0.1270117, rel=1e-3))
    assert command("export", runs / "finished", "--out", "new.safetensors")[0] == 0

    (runs / "sweep/trial-001/summary.json").unlink()  # as if the command was killed then
    tune = [sys.executable, "-m", "densenet_dist", "tune", "--resume", str(runs / "sweep"), "--json"]
    subprocess.run(tune, check=True, stdout=subprocess.PIPE)
    assert (runs / "sweep/trial-001/summary.json").exists()
    assert (runs / "sweep/sweep.html").exists()

"""The parts of docs/extending.md train as its reader would do it; the example too."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
from pages import ROOT, blocks
from photos import write_photos

PAGE = ROOT / "docs" / "extending.md"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def test_the_parts_of_the_page_train(tmp_path):
    """On Ray, with two workers."""
    (tmp_path / "my_parts.py").write_text(blocks(PAGE, "python")[0].text)
    (tmp_path / "mine.yaml").write_text(blocks(PAGE, "yaml")[0].text)
    (block,) = blocks(PAGE, "bash")
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)[1:]
        small = ["options.dataset.images=100", "cluster.device=cpu"] if words[0] == "train" else []
        command = [sys.executable, "-m", "densenet_dist", *words, *small]
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "mine"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if "lr" in line] == pytest.approx([0.003, 0.002, 0.001])
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


def test_the_example_with_ones_own_pictures(tmp_path):
    small = ["data.image_size=16", "train.epochs=1", "train.global_batch_size=8", "model.num_layers=[1,1]"]
    write_photos(tmp_path / "photos", ("apple", "pear"), 20)
    command = [sys.executable, str(ROOT / "examples" / "my_dataset.py"), "photos", *small, "data.loader=torch"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "runs/my-dataset/report.html" in done.stdout
    assert "validation: {'loss'" in done.stdout
    assert (tmp_path / "runs" / "my-dataset" / "confusion.png").exists()

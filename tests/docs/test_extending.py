"""The changes of docs/extending.md work in a copy of the package, which trains with all of them; the example too."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from pages import ROOT, blocks
from photos import write_photos

PAGE = ROOT / "docs" / "extending.md"


@pytest.fixture
def changed(tmp_path):
    """A folder with a copy of the package that the page's changes were made to."""
    shutil.copytree(ROOT / "densenet_dist", tmp_path / "densenet_dist", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    changes = blocks(PAGE, "diff")
    assert len(changes) == 5
    for change in changes:
        command = ["git", "apply", "--whitespace=nowarn", "-"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, input=change.text, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{change.text}"
    return tmp_path


def test_the_changes_can_be_made(changed):
    assert (changed / "densenet_dist").is_dir()


@pytest.mark.nightly
def test_all_of_it_trains(changed):
    (block,) = blocks(PAGE, "bash")
    line = block.text.strip().removeprefix("densenet-dist ")
    small = "cluster.engine=local cluster.device=cpu data.limit=100 data.loader=torch train.global_batch_size=16"
    environment = os.environ | {"PYTHONPATH": str(changed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "densenet_dist", *shlex.split(f"{line} {small}")]
    done = subprocess.run(command, cwd=changed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = changed / "runs" / "extended"
    rates = [json.loads(line)["lr"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"lr"' in line]
    assert rates == pytest.approx([0.1, 0.0505])  # half of the way from the peak to the final rate
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


def test_the_example_with_ones_own_pictures(tmp_path):
    small = ["data.image_size=16", "train.epochs=1", "train.global_batch_size=8", "model.num_layers=[1,1]"]
    write_photos(tmp_path / "photos", ("apple", "pear"), 20)
    command = [sys.executable, str(ROOT / "examples" / "my_dataset.py"), "photos", *small, "data.loader=torch"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "runs/my-dataset/report.html" in done.stdout
    assert "validation: {'loss'" in done.stdout
    assert (tmp_path / "runs" / "my-dataset" / "confusion.png").exists()

"""A run on Ray whose data set lies on an object store: the origin is asked once, by the process that starts the run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from s3_store import Store

from densenet_dist.data.cifar import CIFAR10

CONFIG = Path(__file__).parents[2] / "configs/cifar10_small.yaml"
SMALL = ("data.limit=200", "data.loader=torch", "train.epochs=1", "model.growth_rate=4", "model.num_layers=1")


@pytest.mark.nightly
def test_workers_take_it_from_the_node(official_archive: Path, store: Store, cache: Path, tmp_path: Path) -> None:
    mirror = tmp_path / official_archive.name
    shutil.copyfile(official_archive, mirror)

    def train(name: str) -> None:
        place = [f"data.root={store.uri}", f"data.url={mirror.as_uri()}", f"storage={tmp_path}", f"name={name}"]
        command = [sys.executable, "-m", "densenet_dist", "train", str(CONFIG), *SMALL, *place, "cluster.workers=2"]
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads((tmp_path / name / "summary.json").read_text())["status"] == "finished"

    train("first")
    mirror.unlink()
    assert store.names() == {CIFAR10.archive}
    assert store.counter.count("GET", CIFAR10.archive) == 0
    (cache / "data").rename(cache / "gone")  # as on a node that is new
    train("second")
    pieces = store.counter.count("GET", CIFAR10.archive)
    assert 16 * 2**20 * (pieces - 1) < official_archive.stat().st_size <= 16 * 2**20 * pieces

"""A run on Ray whose data set lies on an object store: the origin is asked once, by the process that starts the run."""

import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from s3_store import Store

from densenet_dist.data.cifar import CIFAR10

CONFIG = Path(__file__).parents[2] / "configs/cifar10_small.yaml"
SMALL = ("data.limit=200", "data.loader=torch", "train.epochs=1", "model.growth_rate=4", "model.num_layers=1")


@pytest.mark.nightly
@pytest.mark.slow
def test_workers_take_it_from_the_node(official_archive: Path, store: Store, cache: Path, tmp_path: Path) -> None:
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    def train(name: str) -> None:
        place = [f"data.root={store.uri}", f"data.url={url}", f"storage={tmp_path}", f"name={name}"]
        command = [sys.executable, "-m", "densenet_dist", "train", str(CONFIG), *SMALL, *place, "cluster.workers=2"]
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads((tmp_path / name / "summary.json").read_text())["status"] == "finished"

    handler = functools.partial(Handler, directory=str(official_archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/{official_archive.name}"
        train("first")
        assert len(asked) == 1
        assert store.names() == {CIFAR10.archive}
        assert store.counter.count("GET", CIFAR10.archive) == 0
        (cache / "data").rename(cache / "gone")  # as on a node that is new
        train("second")
        assert len(asked) == 1
        pieces = store.counter.count("GET", CIFAR10.archive)
        assert 16 * 2**20 * (pieces - 1) < official_archive.stat().st_size <= 16 * 2**20 * pieces
        server.shutdown()

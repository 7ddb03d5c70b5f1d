"""The command on real CIFAR files: fetched and trained on."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from pathlib import Path

import pytest

from densenet_dist.cli import main

ROOT = Path(__file__).parent.parent
SMALL = (
    "data.limit=1000",
    "train.epochs=1",
    "train.global_batch_size=100",
    "cluster.engine=local",
    "model.growth_rate=4",
)


def test_downloads_and_trains(official_archive, tmp_path, capsys):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(official_archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/{official_archive.name}"
        places = [f"data.root={tmp_path / 'data'}", f"data.url={url}", f"storage={tmp_path / 'runs'}"]
        with pytest.raises(SystemExit) as stop:
            main(["train", str(ROOT / "configs/cifar10_small.yaml"), *SMALL, *places])
        server.shutdown()
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    assert "cifar10, 900 training and 100 validation images" in out
    assert (tmp_path / "data" / "cifar-10-batches-bin" / "test_batch.bin").is_file()
    summary = json.loads((tmp_path / "runs" / "cifar10_small" / "summary.json").read_text())
    assert 0 < summary["test/top1"] < summary["test/top5"] < 1

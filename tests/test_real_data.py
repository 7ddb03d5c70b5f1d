"""The command on real CIFAR files: fetched, trained on, and refused when they are not what they should be."""

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


def train(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.slow
def test_downloads_and_trains(official_archive, tmp_path, capsys):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(official_archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/{official_archive.name}"
        code = train(str(ROOT / "configs/cifar10_small.yaml"), *SMALL, f"data.root={tmp_path / 'data'}",
                     f"data.url={url}", f"storage={tmp_path / 'runs'}")  # fmt: skip
        server.shutdown()
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "cifar10, 900 training and 100 validation images" in out
    assert (tmp_path / "data" / "cifar-10-batches-bin" / "test_batch.bin").is_file()
    summary = json.loads((tmp_path / "runs" / "cifar10_small" / "summary.json").read_text())
    assert 0 < summary["test/top1"] < summary["test/top5"] < 1


@pytest.mark.slow
def test_cifar100_reports_top5_beside_top1(official, tmp_path, capsys):
    code = train(str(ROOT / "configs/cifar100_notebook.yaml"), *SMALL, "model.num_layers=1", f"data.root={official}",
                 f"storage={tmp_path}")  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("epoch")]
    assert line.count("top-5") == 2


def test_bad_data_is_refused_before_any_work(official, tmp_path, capsys):
    folder = tmp_path / "data" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for file in (official / folder.name).iterdir():
        (folder / file.name).symlink_to(file)
    damaged = folder / "data_batch_3.bin"
    content = bytearray(damaged.read_bytes())
    content[12345] ^= 1
    damaged.unlink()
    damaged.write_bytes(content)
    code = train(str(ROOT / "configs/cifar10_small.yaml"), *SMALL, f"data.root={tmp_path / 'data'}",
                 "data.download=false", f"storage={tmp_path / 'runs'}")  # fmt: skip
    err = capsys.readouterr().err
    assert code == 4, err
    assert "data_batch_3.bin" in err
    assert "densenet-dist data prepare cifar10" in err
    assert not (tmp_path / "runs" / "cifar10_small" / "metrics.jsonl").exists()

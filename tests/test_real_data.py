"""The command on real CIFAR files: fetched, trained on, and refused when they are not what they should be."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import tarfile
import threading
from collections.abc import Callable
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


def _linked(official: Path, root: Path) -> Path:
    """A folder whose files are those of CIFAR-10, to be replaced one by one."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for file in (official / folder.name).iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def _replace(file: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(file.read_bytes())
    change(content)
    file.unlink()
    file.write_bytes(content)


def flipped_byte(official: Path, archive: Path, root: Path) -> str:
    def flip(content: bytearray) -> None:
        content[12345] ^= 1

    _replace(_linked(official, root) / "data_batch_3.bin", flip)
    return "data_batch_3.bin"


def truncated_archive(official: Path, archive: Path, root: Path) -> str:
    root.mkdir()
    with open(archive, "rb") as source, open(root / archive.name, "wb") as target:
        target.write(source.read(50_000_000))
    return archive.name


def archive_with_a_way_out(official: Path, archive: Path, root: Path) -> str:
    root.mkdir()
    with tarfile.open(root / archive.name, "w:gz", compresslevel=1) as tar:
        tar.add(official / "cifar-10-batches-bin" / "batches.meta.txt", arcname="../escaped.txt")
    return "../escaped.txt"


def cifar100_given_as_cifar10(official: Path, archive: Path, root: Path) -> str:
    folder = root / "cifar-10-batches-bin"
    shutil.copytree(official / "cifar-100-binary", folder, copy_function=lambda a, b: Path(b).symlink_to(a))
    return "CIFAR-100"


MENDS = ("densenet-dist data prepare cifar10", "set data.name=cifar100", "get it from a source you trust")
BAD = [flipped_byte, truncated_archive, archive_with_a_way_out, cifar100_given_as_cifar10]


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_bad_data_is_refused_before_any_work(spoil, official, official_archive, tmp_path, capsys):
    root = tmp_path / "data"
    named = spoil(official, official_archive, root)
    code = train(str(ROOT / "configs/cifar10_small.yaml"), *SMALL, f"data.root={root}", "data.download=false",
                 f"storage={tmp_path / 'runs'}")  # fmt: skip
    err = capsys.readouterr().err
    assert code == 4, err
    assert named in err
    assert any(mend in err for mend in MENDS), err
    assert not (tmp_path / "escaped.txt").exists()
    assert not (tmp_path / "runs" / "cifar10_small" / "metrics.jsonl").exists()

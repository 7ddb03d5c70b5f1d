"""Pictures that become bad while a run uses them: one message says which and why, and a decoder never meets them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from image_loaders import NOTEBOOK, engine_of, eval_loader, train_loader, write_pictures
from PIL import Image

from densenet_dist.data.image_files import ImageFiles
from densenet_dist.errors import DataError


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def zeroed(path: Path) -> None:
    """Damage that leaves size and time as they were: DALI's decoder must never meet it."""
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2] + bytes(9) + b"\xff\xd9")


def another(path: Path) -> None:
    Image.new("RGB", (25, 25)).save(path)


HARMS: dict[Callable[[Path], None], str] = {
    cut_short: "cut short or damaged",
    zeroed: "not an image",
    corrupt: "damaged: Corrupt JPEG data: ",
    another: "no longer the image that was verified",
    Path.unlink: "cannot be read: it does not exist",
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_it_is_named(kind: str, tmp_path: Path, harm: Callable[[Path], None], training: bool) -> None:
    split = write_pictures(tmp_path / "pictures", 3, 14, image_size=24)
    assert isinstance(split.images, ImageFiles)
    path = split.images.path(23)  # a JPEG
    harm(path)
    engine = engine_of(kind, split)
    loader = (
        train_loader(engine, split, NOTEBOOK, batch=6).epoch(0) if training else eval_loader(engine, split, batch=6)
    )
    with pytest.raises(DataError) as raised:
        list(loader)
    assert raised.value.exit_code == 4
    assert str(raised.value).startswith(f"{path}: {HARMS[harm]}")
    assert "restore it, and resume the run" in str(raised.value)

"""Folders of pictures, scratched and strange: every file is a picture that can be shown, or is named as a bad one."""

from __future__ import annotations

import io
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from fuzz_budget import budget
from fuzz_bytes import scratched
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from densenet_dist.data.datasets import load_dataset
from densenet_dist.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".JPG", ".png", ".webp", ".gif", ".tiff", ".jfif")


def _pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    found = []
    for mode, channels in (("RGB", 3), ("L", 1), ("RGBA", 4)):
        picture = Image.fromarray(rng.integers(0, 256, (13, 9, channels), dtype=np.uint8).squeeze(), mode=None)
        assert picture.mode == mode
        few = {
            "JPEG": ({}, {"progressive": True}),
            "PNG": ({},),
            "WEBP": ({}, {"lossless": True}),
            "GIF": ({},),
            "TIFF": ({},),
        }
        for kind, options in few.items():
            for option in options if not (kind == "JPEG" and mode == "RGBA") else ():
                buffer = io.BytesIO()
                exif = Image.Exif()
                exif[0x0112] = 6
                picture.save(buffer, kind, **option, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
                found.append(buffer.getvalue())
    return found


PICTURES = _pictures()
NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
ODD = (
    "%s",
    "a\nb",
    "\x1b[31m",
    "<img src=x onerror=alert(1)>",
    "-rf",
    "a b",
    "'; --",
    '"',
    "..x",
    "é",
    "\u202egnp",
    "b" * 240,
)
RAW = (b"\xff\xfe", b"caf\xe9", b"\x80")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSENET_DIST_CACHE", str(folder / "cache"))
        yield folder


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, str, bytes]:
    """A name as the file system has it, what kind of thing is there, and its bytes."""
    stem = draw(NAMES.map(os.fsencode) | st.sampled_from(ODD).map(os.fsencode) | st.sampled_from(RAW))[:240]
    name = stem + draw(st.sampled_from(SUFFIXES)).encode()
    kind = draw(st.sampled_from(["scratched"] * 8 + ["random", "empty", "pipe", "socket", "link", "folder", "locked"]))
    content = draw(scratched(draw(st.sampled_from(PICTURES)))) if kind == "scratched" else b""
    return name, kind, draw(st.binary(max_size=60)) if kind == "random" else content


def put(folder: bytes, name: bytes, kind: str, content: bytes, target: str) -> None:
    path = os.path.join(folder, name)
    if os.path.lexists(path):
        return
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            here = os.getcwd()
            os.chdir(folder)  # a socket's path is short
            try:
                made.bind(b".socket")
                os.rename(b".socket", name)
            finally:
                os.chdir(here)
    elif kind == "link":
        os.symlink(target, path)
    elif kind == "folder":
        os.mkdir(path)
    else:
        Path(os.fsdecode(path)).write_bytes(content)
        os.chmod(path, 0 if kind == "locked" else 0o644)


# As an error a warning of damaged EXIF would pass for its absence, and only where filters are not those of the check.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@budget(60, 2500)
@given(
    st.lists(files(), min_size=1, max_size=4),
    st.sampled_from(["/dev/zero", "/dev/null", ".", "..", "nowhere", "good.png", "/etc/passwd"]),
    st.sampled_from(["a", "<img src=x onerror=alert(1)>", "caf\udce9"]),
)
def test_folders(place: Path, found: list[tuple[bytes, str, bytes]], target: str, name: str):
    root = place / "root"
    shutil.rmtree(os.fsencode(root), ignore_errors=True)
    for number, of in enumerate((name, "b")):
        (root / of).mkdir(parents=True)
        for which in range(3):
            (root / of / f"good{which}.png").write_bytes(PICTURES[2 if number else 7])
    for file in found:
        put(os.fsencode(root / name), *file, target)
    problem = None
    try:
        load_dataset("folder", root, image_size=8)
    except DataError as error:
        problem = str(error)
        assert "cannot be used" in problem
        assert not {"\x1b", "\u202e", "\0"} & set(problem.encode().decode())  # can be printed, and says nothing else
    dataset = load_dataset("folder", root, image_size=8, on_bad_image="skip")
    kept = [(split.images, row) for split in (dataset.train, dataset.test) for row in range(len(split.labels))]
    for images, row in kept:
        pixels = images.decode(row)
        assert list(pixels.shape[:0:-1]) == images.sizes[row].tolist()
        assert pixels.shape[0] == 3
        assert not pixels.dtype.is_floating_point
    assert (problem is None) == (not dataset.skipped)

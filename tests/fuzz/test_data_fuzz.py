"""Data sets, damaged and strange: refused as data errors with the place named, or what is read is right."""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from fuzzing import damaged, fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from toy_cifar import Toy, make_toy

from densenet_dist.data import cifar
from densenet_dist.data.cifar import SPECS
from densenet_dist.data.datasets import load_dataset
from densenet_dist.errors import DataError

TOYS = {name: make_toy(spec, 3) for name, spec in SPECS.items()}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        for name, toy in TOYS.items():
            patch.setitem(cifar.SPECS, name, toy.spec)
        yield tmp_path_factory.mktemp("cifar")


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder / "root", ignore_errors=True)
    (folder / "root").mkdir()
    return folder / "root"


@fuzz(1500)
@given(st.sampled_from(list(TOYS.values())), st.data())
def test_folders_of_cifar(toys: Path, toy: Toy, data: st.DataObject):
    root = fresh(toys)
    folder = toy.write_folder(root / toy.spec.folder)
    file = folder / data.draw(st.sampled_from(sorted(toy.files)))
    content = toy.files[file.name]
    other = toy.files[data.draw(st.sampled_from(sorted(toy.files)))]
    kind = data.draw(st.sampled_from(["damaged", "other file", "missing", "folder", "link"]))
    file.unlink()
    if kind in ("damaged", "other file"):
        file.write_bytes(data.draw(damaged(content)) if kind == "damaged" else other)
    elif kind == "folder":
        file.mkdir()
    elif kind == "link":
        file.symlink_to(data.draw(st.sampled_from(["/dev/zero", "/dev/null", file.name, "..", "/nowhere"])))
    if kind in ("damaged", "other file") and file.read_bytes() == content:
        assert len(load_dataset(toy.spec.name, root, download=False).train.labels) == 3 * len(toy.spec.train)
    else:
        with pytest.raises(DataError, match=re.escape(str(folder))):
            load_dataset(toy.spec.name, root, download=False)


@fuzz(1500)
@given(st.sampled_from(list(TOYS.values())), st.booleans(), st.data())
def test_archives_of_cifar(toys: Path, toy: Toy, inside: bool, data: st.DataObject):
    """Damaged as it is, or inside of the compression, where the headers of the members are."""
    root = fresh(toys)
    blob = toy.write_archive(toys / "whole.tar.gz").read_bytes()
    blob = gzip.compress(data.draw(damaged(gzip.decompress(blob))), 1) if inside else data.draw(damaged(blob))
    (root / toy.spec.archive).write_bytes(blob)
    try:
        load_dataset(toy.spec.name, root, download=False)
        assert {path.name: path.read_bytes() for path in (root / toy.spec.folder).iterdir()} == toy.files
    except DataError as error:
        if toy.spec.archive not in str(error):
            raise
        assert {path.name for path in root.iterdir()} == {toy.spec.archive, f".{toy.spec.name}.lock"}
    assert {path.name for path in toys.iterdir()} == {"root", "whole.tar.gz"}


ODD_NAMES = (
    *("%s", "a\nb", "\x1b[31m", "<img src=x onerror=alert(1)>", "-rf", "a b", "'; --", '"', "..x", "é", "\u202egnp"),
    *("b" * 240, "\udcff\udcfe", "caf\udce9"),
)
NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
SUFFIXES = (b".jpg", b".jpeg", b".JPG", b".png", b".webp", b".gif", b".tiff", b".jfif")
KINDS = (*["damaged"] * 8, "random", "empty", "pipe", "link", "folder", "locked")


def picture(form: str, mode: str, **options: bool) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (13, 9, len(mode)), dtype=np.uint8)
    buffer = io.BytesIO()
    if form in ("JPEG", "PNG", "WEBP"):
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        options |= {"exif": exif}
    Image.fromarray(noise.squeeze()).save(buffer, form, **options)
    return buffer.getvalue()


PICTURES = [
    *(picture("JPEG", mode, progressive=progressive) for mode in ("RGB", "L") for progressive in (False, True)),
    *(picture(form, mode) for form in ("PNG", "WEBP", "GIF", "TIFF") for mode in ("RGB", "L", "RGBA")),
    picture("WEBP", "RGBA", lossless=True),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSENET_DIST_CACHE", str(folder / "cache"))
        yield folder


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, str, bytes]:
    """A name as the file system has it, what kind of thing is there, and its bytes."""
    name = draw(NAMES | st.sampled_from(ODD_NAMES)).encode("utf-8", "surrogateescape")[:240]
    kind = draw(st.sampled_from(KINDS))
    content = draw(damaged(draw(st.sampled_from(PICTURES)))) if kind == "damaged" else b""
    return name + draw(st.sampled_from(SUFFIXES)), kind, draw(st.binary(max_size=60)) if kind == "random" else content


def put(folder: bytes, name: bytes, kind: str, content: bytes, target: str) -> None:
    path = os.path.join(folder, name)
    if os.path.lexists(path):
        return
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        os.symlink(target, path)
    elif kind == "folder":
        os.mkdir(path)
    else:
        Path(os.fsdecode(path)).write_bytes(content)
        os.chmod(path, 0 if kind == "locked" else 0o644)


# As an error a warning of damaged EXIF would pass for its absence, and only where filters are not those of the check.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@fuzz(2500)
@given(
    st.lists(files(), min_size=1, max_size=4),
    st.sampled_from(["/dev/zero", "/dev/null", ".", "..", "nowhere", "good.png", "/etc/passwd"]),
    st.sampled_from(["a", "<img src=x onerror=alert(1)>", "caf\udce9"]),
)
def test_folders_of_pictures(place: Path, found: list[tuple[bytes, str, bytes]], target: str, name: str):
    root = place / "root"
    shutil.rmtree(os.fsencode(root), ignore_errors=True)
    for label, content in ((name, picture("PNG", "RGB")), ("b", picture("PNG", "L"))):
        (root / label).mkdir(parents=True)
        for which in range(3):
            (root / label / f"good{which}.png").write_bytes(content)
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
    for split in (dataset.train, dataset.test):
        for row in range(len(split.labels)):
            pixels = split.images.decode(row)
            assert list(pixels.shape[:0:-1]) == split.images.sizes[row].tolist()
            assert pixels.shape[0] == 3
            assert not pixels.dtype.is_floating_point
    assert (problem is None) == (not dataset.skipped)

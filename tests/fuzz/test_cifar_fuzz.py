"""CIFAR files and archives, scratched: refused as data errors, or what is read is right; nothing appears beside."""

from __future__ import annotations

import gzip
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from fuzz_budget import budget
from fuzz_bytes import scratched
from hypothesis import given
from hypothesis import strategies as st
from toy_cifar import Toy, make_toy

from densenet_dist.data import cifar
from densenet_dist.data.cifar import SPECS, CifarSpec, parse_records
from densenet_dist.data.datasets import load_dataset
from densenet_dist.errors import DataError

TOYS = {name: make_toy(spec, 3) for name, spec in SPECS.items()}


@pytest.fixture(scope="module", autouse=True)
def toys():
    with pytest.MonkeyPatch.context() as patch:
        for name, toy in TOYS.items():
            patch.setitem(cifar.SPECS, name, toy.spec)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cifar")


def fresh(place: Path) -> Path:
    shutil.rmtree(place / "root", ignore_errors=True)
    (place / "root").mkdir()
    return place / "root"


@budget(30, 1500)
@given(st.sampled_from(list(SPECS.values())), st.data())
def test_records(spec: CifarSpec, data: st.DataObject):
    """Without the checksum in front of it, the parser takes whole records with labels of the set, and nothing else."""
    count = data.draw(st.integers(0, 3))
    labels = data.draw(st.lists(st.integers(0, 255) | st.integers(0, 9), min_size=count, max_size=count))
    filling = data.draw(st.integers(0, 255))
    blob = b"".join(bytes([0] * (spec.label_bytes - 1) + [label]) + bytes([filling]) * 3072 for label in labels)
    extra = data.draw(st.sampled_from([0, 0, 0, 1, -1, spec.record_bytes - 1, 3072]))
    blob = blob[:extra] if extra < 0 else blob + bytes(extra)
    if len(blob) % spec.record_bytes or any(label >= spec.num_classes for label in labels):
        with pytest.raises(DataError):
            parse_records(spec, blob, source="it")
        return
    images, found = parse_records(spec, blob, source="it")
    assert found.tolist() == labels + [0] * (len(found) - len(labels))
    assert images.shape == (len(found), 32, 32, 3)
    assert (images[: len(labels)] == filling).all()


@budget(30, 1500)
@given(st.sampled_from(list(TOYS.values())), st.data())
def test_folders(place: Path, toy: Toy, data: st.DataObject):
    root = fresh(place)
    folder = toy.write_folder(root / toy.spec.folder)
    name = data.draw(st.sampled_from(sorted(toy.files)))
    found = data.draw(st.sampled_from(["scratched", "other file", "missing", "folder", "pickled", "link"]))
    if found == "scratched":
        (folder / name).write_bytes(data.draw(scratched(toy.files[name])))
    elif found == "other file":
        (folder / name).write_bytes(toy.files[data.draw(st.sampled_from(sorted(toy.files)))])
    elif found == "pickled":
        (folder / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    else:
        (folder / name).unlink()
        if found == "folder":
            (folder / name).mkdir()
        elif found == "link":
            (folder / name).symlink_to(data.draw(st.sampled_from(["/dev/zero", "/dev/null", name, "..", "/nowhere"])))
    same = found in ("scratched", "other file") and (folder / name).read_bytes() == toy.files[name]
    if same:
        assert len(load_dataset(toy.spec.name, root, download=False).train.labels) == 3 * len(toy.spec.train)
    else:
        with pytest.raises(DataError, match=re.escape(str(folder))):
            load_dataset(toy.spec.name, root, download=False)


@budget(40, 1500)
@given(st.sampled_from(list(TOYS.values())), st.booleans(), st.data())
def test_archives(place: Path, toy: Toy, inside: bool, data: st.DataObject):
    """Scratched as it is, or inside of the compression, where the headers of the members are."""
    root = fresh(place)
    blob = toy.write_archive(place / "whole.tar.gz").read_bytes()
    blob = gzip.compress(data.draw(scratched(gzip.decompress(blob))), 1) if inside else data.draw(scratched(blob))
    (root / toy.spec.archive).write_bytes(blob)
    problem = None
    try:
        dataset = load_dataset(toy.spec.name, root, download=False)
    except DataError as error:
        problem = str(error)
    if problem is not None:
        assert toy.spec.archive in problem
        assert sorted(path.name for path in root.iterdir()) == sorted([toy.spec.archive, f".{toy.spec.name}.lock"])
    else:
        assert np.array_equal(dataset.test.labels, load_dataset(toy.spec.name, root, download=False).test.labels)
        extracted = {path.name: path.read_bytes() for path in (root / toy.spec.folder).iterdir()}
        assert extracted == toy.files
    assert {path.name for path in place.iterdir()} == {"root", "whole.tar.gz"}

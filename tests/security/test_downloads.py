"""Downloads are pinned, and no archive writes outside its folder."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

import pytest
from toy_cifar import Toy

from densenet_dist.data.cifar import SPECS
from densenet_dist.data.datasets import load_dataset
from densenet_dist.errors import DataError


def member(name: str, *, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def test_the_official_files_are_pinned():
    assert all(spec.url.startswith("https://www.cs.toronto.edu/~kriz/cifar-") for spec in SPECS.values())
    assert all(len(sha256) == 64 for spec in SPECS.values() for _, sha256 in spec.members.values())


def test_nothing_but_the_official_files_is_written(toy: Toy, tmp_path: Path):
    extra = [
        member("../evil.txt", size=4),
        member("cifar-10-batches-bin/../../evil.txt", size=4),
        member("../evil", kind=tarfile.DIRTYPE),
        member("cifar-10-batches-bin/data_batch_1.bin", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        member("cifar-10-batches-bin/data_batch_1.bin", kind=tarfile.LNKTYPE, link="../../elsewhere"),
        member("cifar-10-batches-bin/device", kind=tarfile.CHRTYPE),
        member("cifar-10-batches-bin/data_batch_1.bin", size=10),
        member(str(tmp_path / "absolute.txt"), size=4),
        member("cifar-10-batches-bin", kind=tarfile.DIRTYPE),
        member("cifar-10-batches-bin/readme.html", size=88),
        member("cifar-10-batches-bin/link", kind=tarfile.SYMTYPE, link="data_batch_1.bin"),
        member("cifar-10-batches-bin/below/data_batch_1.bin", size=10),
        member("data_batch_1.bin", size=10),
    ]
    toy.write_archive(tmp_path / "root" / toy.spec.archive, extra=extra)
    load_dataset("cifar10", tmp_path / "root", download=False)
    folder = tmp_path / "root" / toy.spec.folder
    assert {path.name: path.read_bytes() for path in folder.iterdir() if not path.is_symlink()} == toy.files
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_a_member_larger_than_its_archive_is_refused(toy: Toy, tmp_path: Path):
    large = member("x", size=1 << 60)
    declared = member("x")
    declared.pax_headers = {"size": str(1 << 60)}
    holes = member("cifar-10-batches-bin/data_batch_1.bin", size=512)
    holes.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 60)}
    sparse, extended = member("x", kind=tarfile.GNUTYPE_SPARSE, size=1 << 60), member("x", kind=tarfile.XHDTYPE, size=1)
    endless = extended.tobuf(tarfile.GNU_FORMAT) + b"6 a=b\n".ljust(512, b"\0")
    for content in (
        *(info.tobuf(tarfile.GNU_FORMAT) for info in (large, sparse)),
        declared.tobuf(tarfile.PAX_FORMAT),
        holes.tobuf(tarfile.PAX_FORMAT) + bytes(512),
        2000 * endless,
    ):
        (tmp_path / toy.spec.archive).write_bytes(gzip.compress(content))
        with pytest.raises(DataError, match=r"damaged or truncated|it lacks"):
            load_dataset("cifar10", tmp_path, download=False)

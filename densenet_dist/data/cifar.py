"""The official binary files of CIFAR-10 and CIFAR-100: extract them from their archive, and read them.

Learning Multiple Layers of Features from Tiny Images, Alex Krizhevsky, 2009; https://www.cs.toronto.edu/~kriz/cifar.html.
A record is one label byte (CIFAR-100: two, coarse then fine) and 3072 pixel bytes: 1024 red, 1024 green, 1024 blue,
each plane row by row. Only regular files with the names, sizes and SHA-256 of the official ones are extracted and
read, whatever else an archive holds.
"""

import gzip
import hashlib
import os
import shlex
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from densenet_dist.data.image_files import Split
from densenet_dist.errors import DataError

Contents = tuple[tuple[str, ...], Split, Split]
"""Class names, training and test images."""

_SIDE = 32
_PIXEL_BYTES = 3 * _SIDE * _SIDE
_BATCH = 10_000
TRAIN_IMAGES = 5 * _BATCH  # of both sets


@dataclass(frozen=True)
class CifarSpec:
    """One of the two data sets.

    Attributes:
        name: as in `data.name`.
        folder: the folder in the archive.
        label_bytes: bytes before the pixels of a record; the last of them is the label used.
        train, test, names: names of the files with the training records, the test records and the class names.
        members: size in bytes and SHA-256 in hexadecimal of every file that is needed, by name.
        mean, std: of the red, green and blue channels of the training images in [0, 1].
    """

    name: str
    title: str
    folder: str
    archive: str
    label_bytes: int
    train: tuple[str, ...]
    test: str
    names: str
    num_classes: int
    members: dict[str, tuple[int, str]]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def url(self) -> str:
        """The official address of the archive."""
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"

    @property
    def record_bytes(self) -> int:
        """Size of a record: labels and pixels."""
        return self.label_bytes + _PIXEL_BYTES


def _records(count: int, label_bytes: int, sha256: str) -> tuple[int, str]:
    return count * (label_bytes + _PIXEL_BYTES), sha256


CIFAR10 = CifarSpec(
    name="cifar10",
    title="CIFAR-10",
    folder="cifar-10-batches-bin",
    archive="cifar-10-binary.tar.gz",
    label_bytes=1,
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test="test_batch.bin",
    names="batches.meta.txt",
    num_classes=10,
    members={
        "data_batch_1.bin": _records(_BATCH, 1, "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
        "data_batch_2.bin": _records(_BATCH, 1, "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
        "data_batch_3.bin": _records(_BATCH, 1, "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
        "data_batch_4.bin": _records(_BATCH, 1, "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
        "data_batch_5.bin": _records(_BATCH, 1, "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
        "test_batch.bin": _records(_BATCH, 1, "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
        "batches.meta.txt": (61, "558e74b5e208382e186da55784b4bac2cd52e558448e1b5800990fdb28ed8033"),
    },
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)

CIFAR100 = CifarSpec(
    name="cifar100",
    title="CIFAR-100",
    folder="cifar-100-binary",
    archive="cifar-100-binary.tar.gz",
    label_bytes=2,
    train=("train.bin",),
    test="test.bin",
    names="fine_label_names.txt",
    num_classes=100,
    members={
        "train.bin": _records(5 * _BATCH, 2, "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29"),
        "test.bin": _records(_BATCH, 2, "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a"),
        "fine_label_names.txt": (725, "4a53f81a8af29bb6aa646bfe2c455db1b061edfde82a39c0cfc313ef536c681b"),
    },
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)

SPECS = {spec.name: spec for spec in (CIFAR10, CIFAR100)}


def how_to_replace(spec: CifarSpec, damaged: Path) -> str:
    """Return how to replace a damaged file or folder, as the end of an error message."""
    root = damaged.parent if damaged.name in (spec.folder, spec.archive) else damaged
    return (
        f"delete {damaged} and run `densenet-dist data prepare {spec.name} --root {shlex.quote(str(root))}` again, "
        "or name a folder with an intact copy: data.root=..."
    )


def read_folder(spec: CifarSpec, folder: Path) -> Contents:
    """Read and verify an extracted data set.

    Raises:
        DataError: a file is missing, cannot be read, or is not the official one.
    """
    missing = [name for name in spec.members if not os.path.isfile(folder / name)]
    if missing:
        raise DataError(
            f"{folder} is an incomplete {spec.title}: it lacks {', '.join(missing)}; {how_to_replace(spec, folder)}"
        )

    def records(*names: str) -> Split:
        return parse_records(spec, b"".join(_read_member(spec, folder / name) for name in names))

    class_names = _read_member(spec, folder / spec.names).decode("ascii").split()
    return tuple(class_names), records(*spec.train), records(spec.test)


def _read_member(spec: CifarSpec, path: Path, *, source: str = "", remedy: str = "") -> bytes:
    """Read a file and check that it is the official one of that name.

    Args:
        source: what messages call the file; its path by default.
        remedy: what to do if it is another file, for messages.
    """
    source, remedy = source or str(path), remedy or how_to_replace(spec, path.parent)
    official_size, official_sha256 = spec.members[path.name]
    try:
        size = path.stat().st_size
        if size != official_size:
            state = "truncated" if size < official_size else "too long"
            raise DataError(f"{source} is {state}: {size} bytes instead of {official_size}; {remedy}")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror}") from error
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != official_sha256:
        raise DataError(
            f"{source} is damaged: its SHA-256 is {sha256[:16]}..., not {official_sha256[:16]}...; {remedy}"
        )
    return data


def parse_records(spec: CifarSpec, data: bytes) -> Split:
    """Convert records to images and labels; for CIFAR-100 the fine ones."""
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, spec.record_bytes)
    labels = records[:, spec.label_bytes - 1].astype(np.int64)
    planes = records[:, spec.label_bytes :].reshape(-1, 3, _SIDE, _SIDE)
    return Split(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels)


def extract(spec: CifarSpec, archive: Path, folder: Path, *, source: str, remedy: str) -> None:
    """Extract the official files of an archive into `folder`, and verify them.

    Args:
        source: what messages call the archive.
        remedy: what to do if it is damaged, for messages.

    Raises:
        DataError: it is damaged, or another archive.
        OSError: `folder` cannot be written.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                parent, _, name = member.name.partition("/")
                wanted = parent == spec.folder and name in spec.members and member.isreg()
                if wanted and member.size == spec.members[name][0]:
                    official = member.replace(name=name, mtime=0, mode=0o644, deep=False)
                    tar.extract(official, folder, filter="data")
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, RecursionError, ValueError, zlib.error) as error:
        raise DataError(f"{source} is damaged or truncated ({error}); {remedy}") from error
    if missing := [name for name in spec.members if not (folder / name).exists()]:
        problem = f"it lacks {', '.join(missing)}, or has them in another size"
        raise DataError(f"{source} is not the {spec.title} archive: {problem}; {remedy}")
    for name in spec.members:
        _read_member(spec, folder / name, source=f"{name} in {source}", remedy=remedy)

"""Small data sets in the form of the CIFAR sets, for tests of reading, extracting and downloading."""

import dataclasses
import hashlib
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from densenet_dist.data.cifar import CifarSpec


@dataclasses.dataclass(frozen=True)
class Toy:
    """A small set in the form of one of the CIFAR sets, pinned by its own checksums."""

    spec: CifarSpec
    files: dict[str, bytes]

    def write_folder(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder

    def write_archive(
        self, path: Path, *, files: dict[str, bytes] | None = None, extra: Iterable[tarfile.TarInfo] = ()
    ) -> Path:
        """An archive of `files`, by name in the folder, with more members before them."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w:gz", compresslevel=1) as tar:
            for member in extra:
                tar.addfile(member, io.BytesIO(bytes(member.size)) if member.isreg() else None)
            for name, data in (self.files if files is None else files).items():
                member = tarfile.TarInfo(f"{self.spec.folder}/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return path


def make_toy(spec: CifarSpec, images_a_file: int = 20) -> Toy:
    """A set like `spec`, of random images with valid labels, the same every time."""
    rng = np.random.default_rng(spec.num_classes)
    files = {spec.names: "".join(f"class{label}\n" for label in range(spec.num_classes)).encode()}
    for name in (*spec.train, spec.test):
        records = rng.integers(0, 256, (images_a_file, spec.record_bytes), dtype=np.uint8)
        records[:, : spec.label_bytes] = rng.integers(0, 10, (images_a_file, spec.label_bytes))
        files[name] = records.tobytes()
    members = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    return Toy(dataclasses.replace(spec, members=members), files)


def visible(root: Path) -> list[str]:
    """What lies in a folder, but for locks."""
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))

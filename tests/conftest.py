"""Fixtures for all tests: the official CIFAR files, where the repository's neighbour has them."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from densenet_dist.data import cifar

PACK = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the official binary files of both sets, extracted. Not to be written to."""
    if not (PACK / "unpack.py").is_file():
        pytest.skip(f"the CIFAR pack is not at {PACK}")
    out = tmp_path_factory.mktemp("official")
    unpack = [sys.executable, PACK / "unpack.py", "--format", "binary", "--out", out, "--dataset"]
    processes = [subprocess.Popen([*unpack, name], stdout=subprocess.DEVNULL) for name in cifar.SPECS]
    assert [process.wait() for process in processes] == [0, 0]
    return out


@pytest.fixture(scope="session")
def official_archive(official: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A re-packed archive of the official CIFAR-10 files. Not to be written to."""
    path = tmp_path_factory.mktemp("archive") / cifar.CIFAR10.archive
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(official / cifar.CIFAR10.folder, arcname=cifar.CIFAR10.folder)
    return path

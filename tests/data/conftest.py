"""Fixtures: the official CIFAR files, where the repository's neighbour has them, and small sets of the same form."""

import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_cifar import Toy, make_toy

from densenet_dist.data import cifar

PACK = Path(__file__).parents[3] / "shared" / "data"


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


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Toy]:
    """Both sets made small, by name; `load_dataset` takes them for the official ones."""
    made = {name: make_toy(spec) for name, spec in cifar.SPECS.items()}
    for name, toy in made.items():
        monkeypatch.setitem(cifar.SPECS, name, toy.spec)
    return made.__getitem__


@pytest.fixture
def toy(toys: Callable[[str], Toy]) -> Toy:
    """CIFAR-10 made small."""
    return toys("cifar10")

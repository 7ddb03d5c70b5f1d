"""Pickles in every place where data is read from: none is ever loaded. Those of checkpoints: tests/fuzz."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import runs
from toy_cifar import make_toy

from densenet_dist.config import load_config
from densenet_dist.data import cifar
from densenet_dist.data.datasets import load_dataset
from densenet_dist.errors import ConfigError, DataError, StorageError
from densenet_dist.report.record import read_run
from densenet_dist.run_folder import RunFolder
from densenet_dist.sweep.definition import load_sweep
from densenet_dist.sweep.results import trials_on_record


class Canary:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.fixture
def canary(tmp_path: Path):
    """A pickle that makes a file where it is loaded; the test fails if it was."""
    ran = tmp_path / "ran"
    data = pickle.dumps({b"data": Canary(ran), b"labels": [0]}, protocol=2)
    pickle.loads(data)
    assert ran.exists()  # it is a real one
    ran.unlink()
    yield data
    assert not ran.exists()


def test_pickles_as_a_set_and_as_an_archive(canary, tmp_path, monkeypatch):
    folder = tmp_path / "pickled" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(canary)
    with pytest.raises(DataError, match="is the pickled version, which is never read"):
        load_dataset("cifar10", tmp_path / "pickled", download=False)
    spec = cifar.CIFAR10
    with tarfile.open(tmp_path / spec.archive, "w:gz") as tar:
        for member in spec.members:
            info = tarfile.TarInfo(f"{spec.folder}/{member}")
            info.size = len(canary)
            tar.addfile(info, io.BytesIO(canary))
    with pytest.raises(DataError, match="truncated"):
        load_dataset("cifar10", tmp_path, download=False)
    toy = make_toy(cifar.CIFAR10, 2)
    monkeypatch.setitem(cifar.SPECS, "cifar10", toy.spec)
    folder = toy.write_folder(tmp_path / "binary" / toy.spec.folder)
    for member, data in toy.files.items():  # of the right size
        (folder / member).write_bytes((canary + data)[: len(data)])
    with pytest.raises(DataError, match="damaged"):
        load_dataset("cifar10", tmp_path / "binary", download=False)


def test_pickles_as_configurations_and_as_the_records_of_runs_and_sweeps(canary, tmp_path):
    sweep = load_sweep(f"storage={tmp_path}", "name=sweep", "space.train.lr=[0.1, 0.2]")
    runs.train(runs.tiny(tmp_path / "sweep", "train.epochs=1", "name=trial-00001"))
    folder = tmp_path / "sweep" / "trial-00001"
    (folder / "trial.json").write_bytes(canary)
    assert [trial.name for trial in trials_on_record(RunFolder(str(tmp_path), "sweep"), sweep)] == ["trial-00001"]
    for name in ("env.json", "summary.json", "metrics.jsonl", "config.yaml"):
        before = (folder / name).read_bytes() if (folder / name).exists() else b"{}"
        (folder / name).write_bytes(canary)
        with pytest.raises((StorageError, ConfigError)):
            read_run(folder)
        if name in ("metrics.jsonl", "config.yaml"):
            with pytest.raises((StorageError, ConfigError)):
                trials_on_record(RunFolder(str(tmp_path), "sweep"), sweep)
        (folder / name).write_bytes(before)
    (tmp_path / "c.yaml").write_bytes(canary)
    for load in (load_config, load_sweep):
        with pytest.raises(ConfigError):
            load(tmp_path / "c.yaml")

"""Pickles in every place where data is read from: none is ever loaded. Those of checkpoints: tests/fuzz."""

from __future__ import annotations

import io
import json
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
from densenet_dist.sweep.results import read_note, trials_on_record


class Canary:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.fixture
def ran(tmp_path: Path):
    """A file that appears where a pickle is loaded; the test fails if it does."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def canary(ran: Path):
    data = pickle.dumps({b"data": Canary(ran), b"labels": [0]}, protocol=2)
    pickle.loads(data)
    assert ran.exists()  # it is a real one
    ran.unlink()
    return data


def test_the_pickled_form_of_a_set(ran, canary, tmp_path):
    folder = tmp_path / "root" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(canary)
    with pytest.raises(DataError, match="is the pickled version, which is never read"):
        load_dataset("cifar10", tmp_path / "root", download=False)


def test_pickles_under_the_names_of_the_binary_form(ran, canary, tmp_path, monkeypatch):
    toy = make_toy(cifar.CIFAR10, 2)
    monkeypatch.setitem(cifar.SPECS, "cifar10", toy.spec)
    folder = toy.write_folder(tmp_path / "root" / toy.spec.folder)
    for right_size in (False, True):
        for member, data in toy.files.items():
            (folder / member).write_bytes((canary + data)[: len(data)] if right_size else canary)
        with pytest.raises(DataError, match="damaged" if right_size else "truncated|too long"):
            load_dataset("cifar10", tmp_path / "root", download=False)


def test_pickles_as_an_archive(ran, canary, tmp_path):
    spec = cifar.CIFAR10
    (tmp_path / spec.archive).write_bytes(canary)
    with pytest.raises(DataError, match="damaged or truncated"):
        load_dataset("cifar10", tmp_path, download=False)
    with tarfile.open(tmp_path / spec.archive, "w:gz") as tar:
        for member in spec.members:
            info = tarfile.TarInfo(f"{spec.folder}/{member}")
            info.size = len(canary)
            tar.addfile(info, io.BytesIO(canary))
    with pytest.raises(DataError, match="truncated"):
        load_dataset("cifar10", tmp_path, download=False)


def test_pickles_as_pictures(ran, canary, tmp_path, monkeypatch):
    monkeypatch.setenv("DENSENET_DIST_CACHE", str(tmp_path / "cache"))
    for name in ("a/1.png", "a/2.npy", "b/1.jpg", "b/2.pkl"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(canary)
    with pytest.raises(DataError, match="2 of 2 pictures"):
        load_dataset("folder", tmp_path / "root", image_size=8)
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_bytes(canary)
    with pytest.raises(DataError, match="2 of 2 pictures"):
        load_dataset("folder", tmp_path / "root", image_size=8)


def test_pickles_as_a_configuration_and_as_the_records_of_a_run(ran, canary, tmp_path):
    (tmp_path / "c.yaml").write_bytes(canary)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "c.yaml")
    config = runs.tiny(tmp_path, "train.epochs=1")
    runs.train(config)
    for name in ("env.json", "summary.json", "metrics.jsonl", "config.yaml"):
        path = tmp_path / "tiny" / name
        before = path.read_bytes() if path.exists() else json.dumps({}).encode()
        path.write_bytes(canary)
        with pytest.raises((StorageError, ConfigError)):
            read_run(tmp_path / "tiny")
        path.write_bytes(before)


def test_pickles_as_the_records_of_a_sweep(ran, canary, tmp_path):
    sweep = load_sweep(f"storage={tmp_path}", "name=sweep", "space.train.lr=[0.1, 0.2]")
    config = runs.tiny(tmp_path / "sweep", "train.epochs=1", "name=trial-00001")
    runs.train(config)
    folder = tmp_path / "sweep" / "trial-00001"
    (folder / "trial.json").write_bytes(canary)
    assert read_note(RunFolder(str(tmp_path / "sweep"), "trial-00001")) == {}  # what it says is in config.yaml too
    assert [trial.name for trial in trials_on_record(RunFolder(str(tmp_path), "sweep"), sweep)] == ["trial-00001"]
    for name in ("metrics.jsonl", "config.yaml"):
        (folder / name).write_bytes(canary)
        with pytest.raises((StorageError, ConfigError)):
            trials_on_record(RunFolder(str(tmp_path), "sweep"), sweep)
    (tmp_path / "sweep" / "sweep.yaml").write_bytes(canary)
    with pytest.raises(ConfigError):
        load_sweep(tmp_path / "sweep" / "sweep.yaml")

"""Checkpoints beside the training."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from densenet_dist.errors import StorageError
from densenet_dist.run_folder import RunFolder
from densenet_dist.train.checkpoint import CheckpointStore, Planned, Position, Snapshot
from densenet_dist.train.pulse import Pulse
from densenet_dist.train.saver import Saver


class SlowStore(CheckpointStore):
    """Writes once it is let; remembers in which order."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__(run, keep=3)
        self.let = threading.Event()
        self.order: list[str] = []

    def write(self, snapshot: Snapshot, planned: Planned) -> None:
        assert self.let.wait(10)
        super().write(snapshot, planned)
        self.order.append(planned.entry.name)


def snapshot(step: int, weights: torch.Tensor) -> Snapshot:
    return Snapshot({"w": weights}, None, {"inner": [{"m": weights}], "n": step}, Position(0, step, step), {})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path), "run")
    folder.create()
    return folder


def test_what_is_written_is_what_there_was_when_it_was_saved(run):
    store, pulse = SlowStore(run), Pulse()
    saver = Saver(store, pulse)
    weights = torch.arange(4.0)
    saver.save(snapshot(1, weights))
    weights += 100  # training goes on
    assert store.latest() is not None  # known at once
    assert not run.exists("checkpoints/step-00000001")  # but not there yet
    assert pulse.saved == 0
    store.let.set()
    saver.wait()
    assert pulse.saved == 1
    loaded = CheckpointStore(run).load_latest()
    assert loaded is not None
    assert loaded.model["w"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert loaded.state["inner"][0]["m"].tolist() == [0.0, 1.0, 2.0, 3.0]
    saver.close()


def test_one_after_the_other(run):
    store = SlowStore(run)
    store.let.set()
    saver = Saver(store, Pulse())
    for step in range(1, 6):
        saver.save(snapshot(step, torch.zeros(2)))
    saver.close()
    assert store.order == [f"step-{step:08d}" for step in range(1, 6)]
    assert [entry.name for entry in CheckpointStore(run).entries] == store.order[-3:]


def test_what_goes_wrong_is_raised_at_the_next_occasion(run):
    saver = Saver(CheckpointStore(run), Pulse())
    (run.path / "checkpoints").write_text("a file where the folder should be")
    saver.save(snapshot(1, torch.zeros(2)))
    with pytest.raises(StorageError):
        saver.save(snapshot(2, torch.zeros(2)))
    saver.close()


def test_closing_after_another_error_raises_nothing(run):
    saver = Saver(CheckpointStore(run), Pulse())
    (run.path / "checkpoints").write_text("a file where the folder should be")
    saver.save(snapshot(1, torch.zeros(2)))
    saver.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_by_itself_it_saves_as_often_as_it_may_cost(run, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("densenet_dist.train.saver.time.perf_counter", lambda: now[0])
    saver = Saver(CheckpointStore(run), Pulse())
    now[0] += 29
    assert not saver.due()
    now[0] += 2
    assert saver.due()
    saver.save(snapshot(1, torch.zeros(2)))
    saver.wait()
    saver.cost = 2.0  # a hundredth of 200 s
    now[0] += 199
    assert not saver.due()
    now[0] += 2
    assert saver.due()
    saver.close()

"""Checkpoints: whole or not there, whatever happens to files and processes."""

import hashlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import stat
import threading
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from runs import save
from torch import nn

from densenet_dist.errors import CheckpointError, StorageError
from densenet_dist.run_folder import RunFolder
from densenet_dist.train.checkpoint import CheckpointStore, Entry
from densenet_dist.train.context import WorkerStatus
from densenet_dist.train.snapshot import Position, Snapshot, load_weights


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path), "run")
    folder.create()
    return folder


def snapshot(step: int, metrics: dict[str, float] | None = None, size: int = 64) -> Snapshot:
    """Content that is a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    model = {
        "conv.weight": torch.randn(size, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "norm.num_batches_tracked": torch.tensor(step),
        "half": torch.randn(size, generator=generator).bfloat16(),
    }
    state = {
        "optimizer": {"state": {0: {"momentum_buffer": torch.randn(size, generator=generator)}}, "lr": 0.1},
        "lr_controller": {"best": math.inf, "scale": 0.1},
    }
    average = {name: tensor * 2 for name, tensor in model.items()}
    return Snapshot(model, average, state, Position(step // 10, step % 10, step), metrics or {})


def assert_same(found: Snapshot | None, expected: Snapshot) -> None:
    assert found is not None
    assert (found.position, found.metrics) == (expected.position, expected.metrics)
    for name in ("model", "average", "state"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, msg=name)


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in (run.path / "checkpoints").iterdir())


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_what_is_loaded_is_what_was_saved_to_the_bit_and_the_umask_gives_the_modes(run):
    saved = snapshot(3, {"val/loss": 0.1 + 0.2, "val/top1": 1 / 3})
    before = os.umask(0o027)
    try:
        save(CheckpointStore(run), saved)
    finally:
        os.umask(before)
    again = CheckpointStore(run)
    assert_same(again.load_latest(), saved)
    assert_same(again.load_best(), saved)
    assert not again.damaged
    assert names(run) == ["manifest.json", "step-00000003"]
    folder = run.path / "checkpoints" / "step-00000003"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys(["model.safetensors", "ema.safetensors", "state.pt", "checkpoint.json"], 0o640)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert stat.S_IMODE((run.path / "checkpoints" / "manifest.json").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("monitor", "values", "best"),
    [
        ("val/top1", [math.nan, 0.5, 0.3, None], 2),  # one that is NaN or without validation is never the best
        ("val/loss", [0.5, 0.5, 0.5, 0.5], 1),  # the first of equals
        ("val/loss", [None, None, None, None], 4),  # none is: the newest stands in
    ],
)
def test_the_best_and_the_newest_are_kept(run, monitor, values, best):
    saved = [snapshot(10 * n, {} if value is None else {monitor: value}) for n, value in enumerate(values, start=1)]
    for each in saved:
        save(CheckpointStore(run, keep=2, monitor=monitor), each)
    store = CheckpointStore(run, keep=2, monitor=monitor)
    kept = sorted({10 * best, 30, 40})
    assert [entry.position.global_step for entry in store.entries] == kept
    assert names(run) == ["manifest.json", *(f"step-{step:08d}" for step in kept)]
    assert_same(store.load_best(), saved[best - 1])
    assert_same(store.load_latest(), saved[3])


def test_an_epoch_that_was_cut_may_be_the_best_until_the_run_is_extended(run):
    for step, value, kept, best in ((10, 0.5, [10], 10), (15, 0.9, [10, 15], 15), (20, 0.4, [10, 20], 10)):
        store = CheckpointStore(run)
        save(store, snapshot(step, {"val/top1": value}))
        assert ([entry.position.global_step for entry in store.entries], store.best) == (kept, f"step-{best:08d}")
        save(CheckpointStore(run), snapshot(step, {"val/top1": 0.7}))  # validated again: what is listed is not replaced
        assert CheckpointStore(run).load_latest().metrics == {"val/top1": value}


@pytest.mark.parametrize(
    ("name", "damage"),
    [("model.safetensors", "flip"), ("ema.safetensors", "remove"), ("state.pt", "flip"), ("checkpoint.json", "cut")],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, name, damage):
    store = CheckpointStore(run, keep=2)
    save(store, snapshot(1))
    save(store, snapshot(2, {"val/top1": 0.25}))
    path = run.path / "checkpoints" / "step-00000002" / name
    if damage == "flip":
        flip(path, int(path.stat().st_size * 0.6))
    elif damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    again = CheckpointStore(run, keep=2)
    assert_same(again.load_latest(), snapshot(1))
    (problem,) = again.damaged
    assert "step-00000002" in problem
    assert name in problem or name == "checkpoint.json"
    # The damaged one is out of the list: it is neither the latest nor the best any more.
    assert again.latest().position.global_step == 1
    assert_same(again.load_best(), snapshot(1))
    save(again, snapshot(2, {"val/top1": 0.5}))
    assert_same(CheckpointStore(run, keep=2).load_latest(), snapshot(2, {"val/top1": 0.5}))
    for step in (1, 2):
        flip(run.path / "checkpoints" / f"step-0000000{step}" / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"(?s)checkpoints of this run are damaged.*00000002.*00000001") as caught:
        again.load_latest()
    assert caught.value.exit_code == 6


def test_a_damaged_or_missing_list_of_checkpoints_is_rebuilt(run, monkeypatch):
    save(CheckpointStore(run), snapshot(1, {"val/top1": 0.5}))
    path = run.path / "checkpoints" / "manifest.json"
    whole = path.read_text()
    changes = ("epoch", "epok"), ('"best": "step', '"best": "stop'), ('"step": 1', '"step": -1')
    for damaged in (None, whole[:40], "[]", *(whole.replace(*change) for change in changes)):
        assert damaged != whole
        path.unlink() if damaged is None else path.write_text(damaged)
        again = CheckpointStore(run)
        problem = "missing" if damaged is None else "damaged"
        assert re.match(rf"the list of checkpoints .*manifest\.json is {problem}", again.rebuilt)
        assert [entry.name for entry in again.entries] == ["step-00000001"]
        assert again.best == "step-00000001"
        assert again.load_latest().position.global_step == 1
    path.write_text("")
    with monkeypatch.context() as broken:
        broken.setattr(type(run), "read_json", Mock(side_effect=StorageError("no answer")))
        with pytest.raises(StorageError, match="no answer"):  # the checkpoint may be there
            CheckpointStore(run)
    shutil.rmtree(run.path / "checkpoints" / "step-00000001")
    with pytest.raises(CheckpointError, match=r"the list of checkpoints .*manifest\.json is damaged"):
        CheckpointStore(run)


def test_a_folder_that_is_not_listed_does_not_exist(run):
    store = CheckpointStore(run)
    save(store, snapshot(1))
    save(store, snapshot(2))
    manifest = run.path / "checkpoints" / "manifest.json"
    listed = json.loads(manifest.read_text())
    listed["checkpoints"] = []
    manifest.write_text(json.dumps(listed))
    assert CheckpointStore(run).load_latest() is None
    # What a killed process left is written over and swept away.
    (run.path / "checkpoints" / ".step-00000003.99999").mkdir()
    (run.path / "checkpoints" / "step-00000003").mkdir()
    (run.path / "checkpoints" / "notes.txt").write_text("somebody's own")
    save(CheckpointStore(run), snapshot(3))
    assert_same(CheckpointStore(run).load_latest(), snapshot(3))
    assert names(run) == ["manifest.json", "notes.txt", "step-00000003"]


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def compressed(value: object, path: Path) -> None:
    """What `torch.load` would unpack to a thousand times its size."""
    torch.save(torch.zeros(1 << 18), path)
    with zipfile.ZipFile(path) as plain:
        records = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, record in records.items():
            archive.writestr(name, record)


def test_objects_in_a_state_are_refused_and_never_built(run, tmp_path):
    store = CheckpointStore(run)
    save(store, snapshot(1))
    folder = run.path / "checkpoints" / "step-00000001"
    ran = tmp_path / "ran"
    meta = json.loads((folder / "checkpoint.json").read_text())
    for write in (torch.save, compressed, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))):
        write(Payload(ran), folder / "state.pt")
        meta["sha256"]["state.pt"] = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
        (folder / "checkpoint.json").write_text(json.dumps(meta))
        with pytest.raises(CheckpointError, match="cannot be read"):
            store.load(store.entries[0])
        assert not ran.exists()


def test_where_writing_fails_the_ones_before_stay_whole(run):
    store = CheckpointStore(run)
    save(store, snapshot(1))
    large = snapshot(2, size=100)
    large.state["optimizer"]["lr"] = torch.zeros(10_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # enough for the weights, not for the state
    try:
        with pytest.raises(StorageError, match=r"step-00000002 cannot be written: (?s:.*)--resume") as caught:
            save(store, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == 5
    assert names(run) == ["manifest.json", "step-00000001"]
    assert_same(CheckpointStore(run).load_latest(), snapshot(1))
    save(store, large)  # once there is room
    assert_same(CheckpointStore(run).load_latest(), large)


class SlowStore(CheckpointStore):
    """Writes only once it may."""

    may_write = threading.Event()

    def _write(self, snapshot: Snapshot, entry: Entry) -> None:
        assert self.may_write.wait(10)
        super()._write(snapshot, entry)


def test_what_is_written_is_what_there_was_when_it_was_saved(run):
    status = WorkerStatus()
    store = SlowStore(run, status=status)
    saved = snapshot(1)
    store.save(saved)
    saved.model["half"] += 100  # training goes on
    saved.state["optimizer"]["state"][0]["momentum_buffer"] += 100
    assert store.latest() is not None  # known at once
    assert not run.exists("checkpoints/step-00000001")  # but not there yet
    assert status.saved == 0
    phases = []
    threading.Timer(0.2, lambda: [phases.append(status.phase), store.may_write.set()]).start()
    store.close()
    assert phases == ["save"], "the watchdog would end it"
    assert status.saved == 1
    assert_same(CheckpointStore(run).load_latest(), snapshot(1))


def test_what_goes_wrong_is_raised_at_the_next_save_but_not_on_closing(run):
    store, before = CheckpointStore(run), set(threading.enumerate())
    (run.path / "checkpoints").write_text("a file where the folder should be")
    store.save(snapshot(1))
    with pytest.raises(StorageError, match="cannot be written"):
        store.save(snapshot(2))
    store.save(snapshot(3))
    store.close()
    assert not set(threading.enumerate()) - before


def test_weights_that_do_not_fit_are_listed_and_change_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    weights = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    weights["0.weight"] = torch.zeros(5, 3, 3, 3)
    weights["3.weight"] = weights.pop("2.weight")
    weights["1.weight"] = weights["1.weight"].to(torch.int8)
    weights["2.bias"] = weights["2.bias"].bool()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, weights, "the checkpoint of step 7")
    assert str(caught.value).splitlines() == [
        "the checkpoint of step 7 does not fit this model:",
        "  missing: 2.weight",
        "  not in this model: 3.weight",
        "  0.weight: float32 [5, 3, 3, 3] there, float32 [4, 3, 3, 3] in this model",
        "  1.weight: int8 [4] there, float32 [4] in this model",
        "  2.bias: bool [2] there, float32 [2] in this model",
    ]
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)

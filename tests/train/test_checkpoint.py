"""Checkpoints: whole or not there, whatever happens to files and processes."""

import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import stat
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from distributed import start_process
from torch import nn

from densenet_dist.errors import CheckpointError, StorageError
from densenet_dist.run_folder import RunFolder
from densenet_dist.train.checkpoint import CheckpointStore, Position, Snapshot, load_weights

FILES = ["model.safetensors", "ema.safetensors", "state.pt", "checkpoint.json"]


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
        "course": {"best": math.inf, "scale": 0.1},
    }
    average = {name: tensor * 2 for name, tensor in model.items()}
    return Snapshot(model, average, state, Position(step // 10, step % 10, step), metrics or {})


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def assert_same(found: Snapshot | None, expected: Snapshot) -> None:
    assert found is not None
    for name in ("position", "metrics", "model", "average", "state"):
        assert same(getattr(found, name), getattr(expected, name)), name


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in (run.path / "checkpoints").iterdir())


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# Saving and loading


def test_what_is_loaded_is_what_was_saved_to_the_bit(run):
    saved = snapshot(3, {"val/loss": 0.1 + 0.2, "val/top1": 1 / 3})
    CheckpointStore(run).save(saved)
    again = CheckpointStore(run)
    assert_same(again.load_latest(), saved)
    assert_same(again.load_best(), saved)
    assert not again.damaged
    assert names(run) == ["manifest.json", "step-00000003"]
    assert sorted(path.name for path in (run.path / "checkpoints" / "step-00000003").iterdir()) == sorted(FILES)


def test_without_an_average_there_is_none(run):
    saved = snapshot(3)
    saved.average = None
    CheckpointStore(run).save(saved)
    assert CheckpointStore(run).load_latest().average is None


def test_a_new_run_has_nothing(run):
    store = CheckpointStore(run)
    assert (store.latest(), store.load_latest(), store.load_best()) == (None, None, None)


def test_the_same_step_can_be_saved_again(run):
    store = CheckpointStore(run)
    store.save(snapshot(3))
    again = snapshot(3, {"val/top1": 0.5})
    again.model["half"] += 1
    store.save(again)
    assert len(store.entries) == 1
    assert_same(CheckpointStore(run).load_latest(), again)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_all_files_have_the_mode_that_the_umask_gives(run, umask):
    before = os.umask(umask)
    try:
        CheckpointStore(run).save(snapshot(3))
    finally:
        os.umask(before)
    folder = run.path / "checkpoints" / "step-00000003"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~umask}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((run.path / "checkpoints" / "manifest.json").stat().st_mode) == 0o666 & ~umask


# Which are kept


@pytest.mark.parametrize(
    ("monitor", "values", "best"),
    [
        ("val/top1", [0.1, 0.5, 0.3, 0.2], 2),
        ("val/loss", [0.5, 0.1, 0.3, 0.2], 2),
        ("val/top1", [0.5, 0.5, 0.5, 0.5], 1),  # the first of equals
        ("val/loss", [0.4, 0.3, 0.2, 0.1], 4),
    ],
)
@pytest.mark.parametrize("keep", [1, 2])
def test_the_best_and_the_newest_are_kept(run, monitor, values, best, keep):
    for step, value in enumerate(values, start=1):
        # A store of its own each time, as after a restart.
        CheckpointStore(run, keep=keep, monitor=monitor).save(snapshot(step, {monitor: value}))
    store = CheckpointStore(run, keep=keep, monitor=monitor)
    kept = sorted({best, *range(4, 4 - keep, -1)})
    assert [entry.position.global_step for entry in store.entries] == kept
    assert names(run) == ["manifest.json", *(f"step-{step:08d}" for step in kept)]
    assert_same(store.load_best(), snapshot(best, {monitor: values[best - 1]}))
    assert_same(store.load_latest(), snapshot(4, {monitor: values[3]}))


def test_checkpoints_without_validation_are_never_the_best(run):
    store = CheckpointStore(run)
    store.save(snapshot(1))
    assert_same(store.load_best(), snapshot(1))  # none is: the newest stands in
    store.save(snapshot(2, {"val/top1": 0.1}))
    store.save(snapshot(3))
    assert_same(store.load_best(), snapshot(2, {"val/top1": 0.1}))
    assert_same(store.load_latest(), snapshot(3))


# Damage


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.98])
def test_after_a_flipped_byte_the_one_before_is_used_and_the_damage_named(run, name, place):
    store = CheckpointStore(run, keep=2)
    store.save(snapshot(1))
    store.save(snapshot(2, {"val/top1": 0.25}))
    path = run.path / "checkpoints" / "step-00000002" / name
    flip(path, int(path.stat().st_size * place))
    again = CheckpointStore(run, keep=2)
    assert_same(again.load_latest(), snapshot(1))
    (problem,) = again.damaged
    assert "step-00000002" in problem
    assert name in problem or name == "checkpoint.json"
    # The damaged one is out of the list: it is neither the latest nor the best any more.
    assert again.latest().position.global_step == 1
    assert_same(again.load_best(), snapshot(1))
    again.save(snapshot(2, {"val/top1": 0.5}))
    assert_same(CheckpointStore(run, keep=2).load_latest(), snapshot(2, {"val/top1": 0.5}))


def test_every_digit_of_a_checkpoints_description_counts(run):
    store = CheckpointStore(run)
    store.save(snapshot(2, {"val/top1": 0.25}))
    path = run.path / "checkpoints" / "step-00000002" / "checkpoint.json"
    whole = path.read_text()
    for place, character in enumerate(whole):
        if character.isalnum() and place > whole.index("position"):
            path.write_text(whole[:place] + ("1" if character != "1" else "2") + whole[place + 1 :])
            with pytest.raises(CheckpointError):
                store.load(store.entries[0])
    path.write_text(whole)
    assert_same(store.load_latest(), snapshot(2, {"val/top1": 0.25}))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["empty", "half", "missing"])
def test_torn_and_missing_files_count_as_damage(run, name, how):
    store = CheckpointStore(run, keep=2)
    store.save(snapshot(1))
    store.save(snapshot(2))
    path = run.path / "checkpoints" / "step-00000002" / name
    if how == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if how == "half" else 0)
    assert_same(store.load_latest(), snapshot(1))
    assert len(store.damaged) == 1


def test_when_all_are_damaged_each_is_named(run):
    store = CheckpointStore(run, keep=2)
    for step in (1, 2):
        store.save(snapshot(step))
        flip(run.path / "checkpoints" / f"step-0000000{step}" / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint of this run is whole.*00000002.*00000001") as caught:
        store.load_latest()
    assert caught.value.exit_code == 6


def test_a_damaged_best_is_named_and_the_next_best_takes_its_place(run):
    store = CheckpointStore(run, keep=2)
    for step, value in ((1, 0.9), (2, 0.3), (3, 0.2)):
        store.save(snapshot(step, {"val/top1": value}))
    flip(run.path / "checkpoints" / "step-00000001" / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"step-00000001/model\.safetensors is damaged"):
        CheckpointStore(run).load_best()
    again = CheckpointStore(run, keep=2)
    assert_same(again.load_latest(), snapshot(3, {"val/top1": 0.2}))
    assert "step-00000001" in again.damaged[0]
    assert_same(again.load_best(), snapshot(2, {"val/top1": 0.3}))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:40],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("position", "positron"),
        lambda text: text.replace("epoch", "epok"),
        lambda text: text.replace('"best": "step-00000001"', '"best": "step-00000009"'),
    ],
)
def test_a_damaged_list_of_checkpoints_is_named(run, change):
    CheckpointStore(run).save(snapshot(1, {"val/top1": 0.5}))
    path = run.path / "checkpoints" / "manifest.json"
    assert change(path.read_text()) != path.read_text()
    path.write_text(change(path.read_text()))
    again = CheckpointStore(run)
    assert re.match(r"the list of checkpoints .*manifest\.json is damaged", again.rebuilt)
    assert [entry.name for entry in again.entries] == ["step-00000001"]
    assert again.best == "step-00000001"
    assert again.load_latest().position.global_step == 1
    shutil.rmtree(run.path / "checkpoints" / "step-00000001")
    with pytest.raises(CheckpointError, match=r"the list of checkpoints .*manifest\.json is damaged"):
        CheckpointStore(run)


def test_a_folder_that_is_not_listed_does_not_exist(run):
    store = CheckpointStore(run)
    store.save(snapshot(1))
    store.save(snapshot(2))
    manifest = run.path / "checkpoints" / "manifest.json"
    listed = json.loads(manifest.read_text())
    listed["checkpoints"] = []
    manifest.write_text(json.dumps(listed))
    assert CheckpointStore(run).load_latest() is None
    # What a killed process left is written over and swept away.
    (run.path / "checkpoints" / ".step-00000003.99999").mkdir()
    (run.path / "checkpoints" / "step-00000003").mkdir()
    (run.path / "checkpoints" / "notes.txt").write_text("somebody's own")
    CheckpointStore(run).save(snapshot(3))
    assert_same(CheckpointStore(run).load_latest(), snapshot(3))
    assert names(run) == ["manifest.json", "notes.txt", "step-00000003"]


# Attack


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_objects_in_a_state_are_refused_and_never_built(run, tmp_path, form):
    store = CheckpointStore(run)
    store.save(snapshot(1))
    folder = run.path / "checkpoints" / "step-00000001"
    trap = Payload(tmp_path / "ran")
    if form == "zip":
        torch.save({"optimizer": trap}, folder / "state.pt")
    else:
        (folder / "state.pt").write_bytes(pickle.dumps(trap, protocol=2))
    # Whoever can write the state can write its digest too.
    from densenet_dist.train.checkpoint import _sha256

    meta = json.loads((folder / "checkpoint.json").read_text())
    meta["sha256"]["state.pt"] = _sha256(folder / "state.pt")
    (folder / "checkpoint.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.load(store.entries[0])
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(trap, protocol=2))
    assert (tmp_path / "ran").exists()  # the trap was a real one


# Storage that gives out


@contextmanager
def files_no_larger_than(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1_000, 20_000])
def test_where_writing_fails_the_ones_before_stay_whole(run, size):
    store = CheckpointStore(run)
    store.save(snapshot(1))
    large = snapshot(2, size=100)
    large.state["optimizer"]["lr"] = torch.zeros(10_000)
    assert large.model["conv.weight"].nbytes < 20_000
    with (
        files_no_larger_than(size),
        pytest.raises(StorageError, match=r"step-00000002 cannot be written: (?s:.*)--resume") as caught,
    ):
        store.save(large)
    assert caught.value.exit_code == 5
    assert names(run) == ["manifest.json", "step-00000001"]
    assert_same(CheckpointStore(run).load_latest(), snapshot(1))
    store.save(large)  # once there is room
    assert_same(CheckpointStore(run).load_latest(), large)


def test_a_file_where_the_folder_should_be(run):
    (run.path / "checkpoints").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        CheckpointStore(run).save(snapshot(1))


# Processes that die


def save_without_end(storage: str, size: int) -> None:
    store = CheckpointStore(RunFolder(storage, "run"), keep=2)
    last = store.load_latest()
    step = last.position.global_step if last else 0
    while True:
        step += 1
        store.save(snapshot(step, {"val/top1": (step % 7) / 7}, size))


def test_a_killed_process_leaves_whole_checkpoints_only(tmp_path):
    moments, size, reached = random.Random(0), 20_000, []
    for _ in range(6):
        process = start_process(save_without_end, str(tmp_path), size)
        before, deadline = _latest_step(tmp_path), time.monotonic() + 60
        while _latest_step(tmp_path) < before + 2:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        store = CheckpointStore(RunFolder(str(tmp_path), "run"), keep=2)
        for entry in store.entries:  # every one that is listed is whole
            step = entry.position.global_step
            assert_same(store.load(entry), snapshot(step, {"val/top1": (step % 7) / 7}, size))
        assert store.load_best() is not None
        reached.append(store.latest().position.global_step)
    assert reached == sorted(set(reached))
    # One more save clears away what all of them left.
    store.save(snapshot(reached[-1] + 1, {"val/top1": 1.0}))
    left = {name for name in names(store.run) if "step-" in name}
    assert left == {entry.name for entry in store.entries}


def _latest_step(storage: Path) -> int:
    manifest = storage / "run" / "checkpoints" / "manifest.json"
    if not manifest.exists():
        return 0
    return json.loads(manifest.read_text())["checkpoints"][-1]["position"]["global_step"]


# Weights and models


def test_weights_that_do_not_fit_are_listed_and_change_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    weights = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    weights["0.weight"] = torch.zeros(5, 3, 3, 3)
    weights["3.weight"] = weights.pop("2.weight")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, weights, "the checkpoint of step 7")
    assert caught.value.exit_code == 6
    assert str(caught.value).splitlines() == [
        "the checkpoint of step 7 does not fit this model:",
        "  missing: 2.weight",
        "  not in this model: 3.weight",
        "  0.weight: (5, 3, 3, 3) there, (4, 3, 3, 3) in this model",
    ]
    assert same(dict(model.state_dict()), before)


def test_many_differences_are_cut_short():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(20)))
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, {}, "it")
    lines = str(caught.value).splitlines()
    assert len(lines) == 10
    assert lines[-1].strip() == "... and 32 more"


def test_weights_that_fit_are_loaded_into_the_same_memory():
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    memory = model.weight.data_ptr()
    weights = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    load_weights(model, weights, "it")
    assert same(dict(model.state_dict()), weights)
    assert model.weight.data_ptr() == memory
    assert model.weight.is_contiguous(memory_format=torch.channels_last)

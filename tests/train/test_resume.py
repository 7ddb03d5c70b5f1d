"""A run that dies and goes on ends in the same bits as one that was left alone."""

import copy
import json
import uuid
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from custom_parts import CUSTOM
from distributed import run_ranks
from runs import STEPS_PER_EPOCH, records, run_of, tiny, train, trainer_of, weights_of
from torch.multiprocessing import ProcessRaisedException

from densenet_dist.errors import CheckpointError
from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import Config
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.loop import train_step
from densenet_dist.train.snapshot import Position
from densenet_dist.train.state import restore, take_snapshot

MANIFEST = "checkpoints/manifest.json"
EVERYTHING = [
    *("train.epochs=4", "checkpoint.every_steps=2", "model.drop_rate=0.2", "train.ema_decay=0.9"),
    *("train.clip_grad_norm=0.5", "train.label_smoothing=0.1", "log.every_steps=3"),
    *("train.schedule.name=plateau", "train.schedule.patience=1", "train.schedule.min_delta=0.05"),
    *("train.early_stopping.enabled=true", "train.early_stopping.patience=3", "train.early_stopping.min_delta=0.05"),
]
CASES = {
    "fp32 sgd, parts": ["train.grad_accum_steps=3", "train.freeze=[stem, 1]", "train.head_lr=0.02"],
    "bf16 adamw": ["train.precision=bf16", "train.optimizer.name=adamw", "train.optimizer.weight_decay=0.1"],
    "fp32 muon": ["train.optimizer.name=muon", "train.optimizer.weight_decay=0.01", "train.lr=0.01"],
    "fp16 adam": ["train.precision=fp16", "train.optimizer.name=adam", "train.lr=0.003"],
    "fp32 sgd, DALI, mixed, balanced": [
        "data.sampler=balanced",
        "data.loader=dali",
        "data.mixup=1",
        "data.cutmix=1",
        "data.trivial_augment=true",
    ],
    "custom parts": CUSTOM,
}


class Died(Exception):
    pass


class DyingFolder(RunFolder):
    """A run's folder whose process dies at its n-th checkpoint: just before or just after it is listed."""

    def __init__(self, config: Config, checkpoints: int, when: str) -> None:
        super().__init__(config.storage, config.name)
        self.left, self.when = checkpoints, when

    def write(self, relative: str, text: str) -> None:
        self.left -= relative == MANIFEST
        if relative == MANIFEST and not self.left and self.when == "before":
            raise Died
        super().write(relative, text)
        if relative == MANIFEST and not self.left:
            raise Died


def states_of(config: Config) -> dict[str, Any]:
    """Everything that is in the checkpoints but the weights and the clock."""
    found = {}
    for entry in CheckpointStore(run_of(config)).entries:
        state = CheckpointStore(run_of(config)).load(entry).state
        del state["clock"]
        found[entry.name] = (entry.position, entry.metrics, without_tensors(state))
    return found


def without_tensors(value: Any) -> Any:
    """The same with tensors as bytes, so that two of them can be compared."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: without_tensors(each) for key, each in value.items()}
    return [without_tensors(each) for each in value] if isinstance(value, list | tuple) else value


def assert_same_run(found: Config, expected: Config) -> None:
    assert records(found) == records(expected)
    assert weights_of(found) == weights_of(expected)
    assert states_of(found) == states_of(expected)


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_dies_at_every_checkpoint_equals_one_that_does_not(tmp_path, case):
    whole, torn = (tiny(tmp_path / name, *EVERYTHING, *CASES[case]) for name in ("whole", "torn"))
    expected = train(whole)
    deaths, starts, summary = 0, [], None
    while summary is None:
        # By turns after every checkpoint, and before every second one is listed, which then is lost.
        dying = DyingFolder(torn, 1 + deaths % 2, ("after", "before")[deaths % 2])
        try:
            summary = train(torn, run=dying, listener=starts.append)
        except Died:
            deaths += 1
            assert deaths < 50
            with open(run_of(torn).path / "metrics.jsonl", "a") as file:
                file.write('{"torn": ')
            if deaths % 4 == 1:
                (run_of(torn).path / MANIFEST).unlink()
    resumed_at = [event["global_step"] for event in starts if event["kind"] == "start"]
    assert sum(step % 5 != 0 for step in resumed_at) >= 4  # most of them within an epoch
    assert deaths >= 8
    assert_same_run(torn, whole)
    assert {**summary, "train_seconds": 0} == {**expected, "train_seconds": 0}
    assert len({record["lr"] for record in records(whole)[:-1] if "lr" in record}) > 1  # plateau was at work


def _steps_saved(config: Config) -> int:
    path: Path = run_of(config).path / MANIFEST
    return json.loads(path.read_text())["checkpoints"][-1]["position"]["global_step"] if path.exists() else 0


def test_a_damaged_line_of_the_record_costs_its_epoch_alone(tmp_path):
    config, longer = (tiny(tmp_path, "train.schedule.name=constant", f"train.epochs={epochs}") for epochs in (4, 5))
    train(config)
    path = run_of(config).path / "metrics.jsonl"
    first, second, third, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([first, second[:50] + b"\n", b"\xff" + third, *others]))
    train(longer)
    assert [record["epoch"] for record in records(longer)[:-1]] == [1, 4, 5]


def test_a_run_on_an_object_store_goes_on(tmp_path, s3):
    settings = ["train.epochs=2", "checkpoint.every_steps=2", "log.every_steps=3"]
    whole, torn = tiny(tmp_path, *settings), tiny(s3 % f"/{uuid.uuid4().hex}", *settings)
    train(whole)
    with pytest.raises(Died):
        train(torn, run=DyingFolder(torn, 4, "after"))  # in the second epoch
    train(torn)
    copy = run_of(torn)
    for name in ("checkpoints", "metrics.jsonl"):
        copy.fetch(name)
    assert_same_run(replace(torn, storage=str(copy.path.parent), name=copy.path.name), whole)


def fit_ranks(storage: str, settings: list[str], die_after: int) -> dict[str, Any]:
    config = tiny(storage, *settings)
    if dist.get_rank() > 0:
        CheckpointStore.load = None  # rank 0 reads checkpoints for all
    return train(config, run=DyingFolder(config, die_after, "after") if die_after else None)


@pytest.mark.parametrize("parts", [["model.drop_rate=0.2"], CUSTOM], ids=["built-in", "custom"])
def test_two_ranks_go_on_bit_for_bit(tmp_path, parts):
    settings = ["train.epochs=2", "checkpoint.every_steps=2", "train.ema_decay=0.9", "train.precision=bf16"]
    settings += ["log.every_steps=3", "train.sync_bn=true", "train.grad_accum_steps=2", *parts]
    whole, torn = (tiny(tmp_path / name, *settings) for name in ("whole", "torn"))
    first, second = run_ranks(fit_ranks, 2, whole.storage, settings, 0)
    assert {**first, "train_seconds": 0} == {**second, "train_seconds": 0}
    with pytest.raises(ProcessRaisedException, match="Died"):
        run_ranks(fit_ranks, 2, torn.storage, settings, 2)
    assert _steps_saved(torn) == 4
    run_ranks(fit_ranks, 2, torn.storage, settings, 0)
    assert_same_run(torn, whole)


@pytest.mark.parametrize("parts", [[], ["train.loss=custom_parts:focal"]], ids=["built-in", "custom"])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, parts):
    settings = ["train.epochs=2", "checkpoint.every_steps=2", "train.sync_bn=true", "log.every_steps=3", *parts]
    whole, torn = (tiny(tmp_path / name, *settings) for name in ("whole", "torn"))
    train(whole)
    with pytest.raises(ProcessRaisedException, match="Died"):
        run_ranks(fit_ranks, 2, torn.storage, settings, 2)
    assert _steps_saved(torn) == 4
    train(torn)
    for found, expected in zip(records(torn), records(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert records(torn) != records(whole)  # it was another sum, after all


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_computed_with_it(tmp_path, optimizer):
    """PyTorch's fused optimizers write beyond a momentum buffer that is smaller than its parameter."""
    settings = ("train.ema_decay=0.9", "train.precision=fp16", "log.every_steps=9")
    trainer, fresh = (trainer_of(tiny(tmp_path, f"train.optimizer.name={optimizer}", *settings)) for _ in range(2))
    train_step(trainer, next(iter(trainer.train_loader.epoch(0))))
    sound = copy.deepcopy(take_snapshot(trainer))
    restore(fresh, copy.deepcopy(sound))
    other = f"train.optimizer.name={'muon' if optimizer == 'sgd' else 'sgd'}"
    with pytest.raises(CheckpointError, match=r"does not fit this run:\n  optimizer: \w+ there, \w+ here"):
        restore(trainer_of(tiny(tmp_path, other, *settings)), sound)
    damages: list[tuple[tuple[Any, ...], Any]] = [
        (("position",), Position(0, STEPS_PER_EPOCH + 1, STEPS_PER_EPOCH + 1)),
        (("state",), {}),
        (("state", "optimizer", "param_groups"), sound.state["optimizer"]["param_groups"][::-1]),
        *((("state", "sums"), value) for value in (sound.state["sums"][:, :3], None)),
        (("state", "clock", "epoch_time"), None),
    ]
    for key, tensor in sound.state["optimizer"]["state"][0].items():
        wrong = [tensor.double(), tensor.to("meta"), None]
        if key == "step":
            wrong += [tensor.expand(2)]
        else:
            wrong += [tensor[:1], tensor.contiguous(), tensor[:1, :1, :1, :1].expand_as(tensor), tensor.to_sparse()]
        damages += [(("state", "optimizer", "state", 0, key), value) for value in wrong]
    classifier = sound.model["classifier.weight"]
    for weights in ("model", "average"):
        damages += [((weights, "classifier.weight"), value) for value in (classifier.to(torch.int8), classifier > 0)]
    for path, value in damages:
        damaged = copy.deepcopy(sound)
        holder = reduce(lambda part, key: part[key], path[:-1], vars(damaged))
        assert path[-1] in holder
        holder[path[-1]] = value
        with pytest.raises(CheckpointError) as caught:
            restore(fresh, damaged)
        assert caught.value.exit_code == 6

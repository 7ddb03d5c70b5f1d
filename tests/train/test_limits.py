"""The limits of a run: memory that is too small for a step, and ``train.max_minutes``."""

import json
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from runs import notes_of, records, run_of, stop_after, tiny, train, trainer_of, weights_of
from torch.multiprocessing import ProcessRaisedException

from densenet_dist.cluster.launch import write_run
from densenet_dist.cluster.resuming import check_changes, resume_config
from densenet_dist.config import load_config
from densenet_dist.errors import ConfigError, OutOfMemory
from densenet_dist.run_folder import ENV_FILE
from densenet_dist.train import evaluation
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.context import Stopped, StopRequest, WorkerStatus
from densenet_dist.train.evaluation import evaluate_model
from densenet_dist.train.loop import train_step
from densenet_dist.train.optim import LRController
from densenet_dist.train.trainer import Trainer

SETTINGS = ("model.drop_rate=0.2", "train.ema_decay=0.9", "checkpoint.every_steps=2")
forward_backward = Trainer.forward_backward


def limit_memory(patch: pytest.MonkeyPatch, images: int, from_step: int = 0) -> None:
    """Let larger micro-batches fail on the last rank: once gradients and statistics have changed, or much larger ones
    before that."""

    def limited(self: Trainer, *arguments: Any) -> Any:
        last = self.context.rank == self.context.world_size - 1
        size = len(arguments[0]) if last and self.position.global_step >= from_step else 0
        found = None if size > 4 * images else forward_backward(self, *arguments)
        if size > images:
            raise torch.OutOfMemoryError("injected")
        return found

    patch.setattr(Trainer, "forward_backward", limited)


def test_a_step_that_runs_out_of_memory_is_repeated_and_the_run_remembers_it(tmp_path, monkeypatch):
    found, expected = tiny(tmp_path / "found", *SETTINGS), tiny(tmp_path / "expected", *SETTINGS)
    stop_after(1, expected)
    train(tiny(tmp_path / "expected", *SETTINGS, "train.grad_accum_steps=4"))
    limit_memory(monkeypatch, 4, from_step=5)
    stop_after(2, found)
    limit_memory(monkeypatch, 100)
    write_run(run_of(found), found, resume=True)
    train(found)
    assert weights_of(found) == weights_of(expected)
    assert records(found) == records(expected)
    assert run_of(found).read_json(ENV_FILE)["grad_accum_steps"] == {"5": 4}


def test_a_captured_step_is_repeated_without_its_graph_first(tmp_path):
    class Full:
        """A graph for which there is no memory."""

        def __call__(self, recipe: Any) -> Any:  # as cuDNN says it
            raise RuntimeError("FIND was unable to find an engine to execute this computation")

        def set_learning_rate(self, value: float) -> None:
            pass

    trainer, plain = trainer_of(tiny(tmp_path)), trainer_of(tiny(tmp_path))
    trainer.step_graph = Full()
    for each in (trainer, plain):
        train_step(each, next(iter(each.train_loader.epoch(0))))
    assert trainer.step_graph is None
    for one, other in zip(*(each.model.state_dict().values() for each in (trainer, plain)), strict=True):
        assert torch.equal(one, other)
    assert run_of(trainer.config).read_json(ENV_FILE)["grad_accum_steps"] == {"0": 1}
    again = trainer_of(trainer.config)
    again.step_graph = Full()
    again.prepare_step()
    assert again.step_graph is None  # from the same step on
    again.micro_batches.halve(0, 16)
    assert again.micro_batches.count(0, 16) == 2


def test_one_image_that_does_not_fit_ends_the_run(tmp_path, monkeypatch):
    limit_memory(monkeypatch, 1)
    notes = notes_of(tiny(tmp_path, "train.epochs=1"))
    assert [note.splitlines()[0].split()[-2] for note in notes] == ["2", "4", "8", "16"]
    assert ["BatchNorm" in note for note in notes] == [True, False, False, False]
    limit_memory(monkeypatch, 0)
    with pytest.raises(OutOfMemory, match="memory at step 0, with the smallest possible micro-batch"):
        train(tiny(tmp_path / "other"))


def test_evaluation_batches_are_divided(tmp_path, monkeypatch):
    trainer, most = trainer_of(tiny(tmp_path)), 3
    arguments = (trainer.model, trainer.val_loader, trainer.context, "fp32")
    expected = evaluate_model(*arguments)  # of eight images

    def limited(module: Any, inputs: tuple[torch.Tensor]) -> None:
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("injected")

    trainer.model.register_forward_pre_hook(limited)
    assert evaluate_model(*arguments) == pytest.approx(expected)
    most = 0
    with pytest.raises(OutOfMemory, match="out of memory in the evaluation of one image"):
        evaluate_model(*arguments)
    # The other ranks do not wait for this one, and all raise the same error.
    monkeypatch.setattr(evaluation, "gather_objects", lambda own: [None, type(own)("of rank 1"), own])
    with pytest.raises(OutOfMemory, match="of rank 1"):
        evaluate_model(*arguments)


def train_ranks(storage: str, limit: int) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        limit_memory(patch, limit, from_step=7)
        return train(tiny(storage, *SETTINGS))


def test_ranks_restart_from_their_checkpoint_with_the_same_micro_batches(tmp_path):
    found, expected = tiny(tmp_path / "found", *SETTINGS), tiny(tmp_path / "expected", *SETTINGS)
    with pytest.raises(ProcessRaisedException, match=r"rank 1 ran out of memory at step 7: (.|\n)* with --resume"):
        run_ranks(train_ranks, 2, found.storage, 4)
    run_ranks(train_ranks, 2, found.storage, 4)
    run_of(expected).write(ENV_FILE, json.dumps({"grad_accum_steps": {"7": 2}}))
    run_ranks(train_ranks, 2, expected.storage, 100)
    assert weights_of(found) == weights_of(expected)
    assert records(found) == records(expected)


STEP_S, VALIDATION_S = 2.0, 3.0  # an epoch has five steps: 13 s
COMMON = ("train.epochs=50", "train.schedule.name=one_cycle", "train.ema_decay=0.9", "model.drop_rate=0.2")


def set_clock(patch: pytest.MonkeyPatch, step_s: float = STEP_S) -> SimpleNamespace:
    """Replace the clocks of the phases and of the exchange between ranks by one that steps and evaluations move."""
    clock, advance = SimpleNamespace(now=0.0, step_s=step_s, stop=None), WorkerStatus.advance
    ticks = count()  # time always passes

    def advanced(self: WorkerStatus, step: int | None = None) -> None:
        if step is not None and step == clock.stop:
            self.request(StopRequest.STOP)
        clock.now += VALIDATION_S if step is None else clock.step_s
        advance(self, step)

    patch.setattr(WorkerStatus, "advance", advanced)
    for module in ("context", "ranks"):
        time = SimpleNamespace(perf_counter=lambda: clock.now + 1e-9 * next(ticks), time=lambda: clock.now)
        patch.setattr(f"densenet_dist.train.{module}.time", time)
    return clock


clock = pytest.fixture(lambda monkeypatch: set_clock(monkeypatch))


def test_training_ends_in_time_and_within_an_epoch(tmp_path, clock):
    events: list[dict[str, Any]] = []
    config = tiny(tmp_path, *COMMON, "train.max_minutes=2.12")  # nine epochs, then 7.2 s suffice for three steps
    summary = train(config, listener=events.append)
    found = (summary["status"], summary["epochs"], summary["global_step"], summary["trained_epochs"])
    assert found == ("time limit", 10, 48, 9.6)
    assert [event["total_steps"] for event in events if event["kind"] == "epoch"][1:] == [48] * 9
    assert train(config)["global_step"] == 48  # nothing is left to do but the test


def test_with_enough_time_nothing_changes_and_with_slower_steps_there_are_fewer(tmp_path, clock):
    free, ample = (tiny(tmp_path / minutes, "train.max_minutes=" + minutes) for minutes in ("null", "60"))
    assert train(free)["status"] == train(ample)["status"] == "finished"
    assert records(free) == records(ample)

    def slow_down(event: dict[str, Any]) -> None:
        clock.step_s = 6.0 if event.get("global_step", 0) >= 30 else STEP_S

    config, clock.now = tiny(tmp_path, *COMMON, "train.max_minutes=4"), 0.0
    steps = train(config, listener=slow_down)["global_step"]
    assert 45 < steps < 60  # 92 at the first speed
    assert 240 - 6 - VALIDATION_S < clock.now - 4 * VALIDATION_S <= 240  # the test has four batches
    controller = LRController(config.train, 5)
    controller.load_state_dict(CheckpointStore(run_of(config)).load_latest().state["lr_controller"])
    assert controller.lr(steps - 1) < 0.01 * config.train.lr


def test_a_constant_schedule_ends_too_and_can_be_extended(tmp_path, clock):
    config = tiny(tmp_path, *COMMON, "train.schedule.name=constant", "train.max_minutes=1")
    before = train(config)
    with pytest.raises(ConfigError, match=r"max_minutes: 1.0 -> 0.5\n.* none shortened"):
        check_changes(run_of(config), resume_config(run_of(config), ["train.max_minutes=0.5"]))
    after = train(resume_config(run_of(config), ["train.max_minutes=2"]))
    assert (before["status"], after["status"]) == ("time limit", "time limit")
    assert before["global_step"] < 25 < 35 < after["global_step"]
    assert [record["epoch"] for record in records(config)[:-1]] == [*range(1, after["epochs"] + 1)]


@pytest.mark.parametrize("minutes", [("0.85", "60"), ("0.7", "0.9", "60")])
def test_an_extended_run_completes_its_last_epoch_and_equals_one_that_was_never_cut(tmp_path, clock, minutes):
    """Four epochs take 52 s."""
    rate = ("train.schedule.milestones=[2.5]", "data.mixup=0.2", "checkpoint.every_steps=3")
    settings = (*COMMON, "train.epochs=4", "train.schedule.name=multistep", *rate, "log.every_steps=2")
    whole, cut = (tiny(tmp_path / name, *settings, f"train.max_minutes={minutes[0]}") for name in ("whole", "cut"))
    whole = load_config(whole, "train.max_minutes=null")
    train(whole)
    for more in minutes[1:]:
        summary = train(cut)
        assert (summary["status"], 15 * (more == "60") < summary["global_step"] < 20) == ("time limit", True)
        assert summary["best"]["epoch"] <= summary["epochs"]
        cut = resume_config(run_of(cut), [f"train.max_minutes={more}"])
    assert train(cut)["status"] == "finished"
    assert weights_of(cut) == weights_of(whole)
    assert records(cut) == records(whole)
    assert train(resume_config(run_of(cut), ["train.epochs=5"]))["global_step"] == 25


def test_an_epoch_has_the_learning_rate_of_its_start_though_it_is_resumed(tmp_path, clock):
    whole, torn = (tiny(tmp_path / name, *COMMON, "train.max_minutes=1.1") for name in ("whole", "torn"))

    def slow_down(event: dict[str, Any]) -> None:
        clock.step_s = 3.0 if event.get("global_step", 0) >= 10 else STEP_S

    train(whole, listener=slow_down)
    clock.stop = 13
    with pytest.raises(Stopped):
        train(torn, listener=slow_down)
    train(torn)
    assert records(torn)[2]["lr"] == records(whole)[2]["lr"]


def fit_ranks(storage: str, *settings: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        set_clock(patch, STEP_S + 7 * dist.get_rank())  # only the clock of rank 0 counts
        return train(tiny(storage, *settings))


def test_a_run_that_is_resumed_and_ranks_keep_to_the_same_plan(tmp_path, clock):
    settings = (*COMMON, "train.max_minutes=1.1")
    whole, torn = tiny(tmp_path / "whole", *settings), tiny(tmp_path / "torn", *settings)
    expected = train(whole)["global_step"]
    stop_after(2, torn)
    assert train(torn)["global_step"] == expected
    for found, record in zip(records(torn), records(whole), strict=True):
        assert found == pytest.approx(record, rel=1e-5)
    assert {rank["global_step"] for rank in run_ranks(fit_ranks, 2, str(tmp_path / "ranks"), *settings)} == {expected}

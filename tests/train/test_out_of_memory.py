"""Memory that runs out: the step is repeated in parts, exactly once, and the run remembers it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from distributed import run_ranks
from runs import notes_of, records, run_of, stop_after, tiny, train, trainer_of, weights_of
from torch.multiprocessing import ProcessRaisedException

from densenet_dist.cluster.launch import write_run
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.run_folder import ENV_FILE
from densenet_dist.train.evaluation import evaluate_model
from densenet_dist.train.trainer import Trainer

SETTINGS = ("model.drop_rate=0.2", "train.ema_decay=0.9", "checkpoint.every_steps=2")
forward_backward = Trainer.forward_backward


def limit_memory(images: int, from_step: int = 0) -> None:
    """Let larger parts fail on the highest rank, once gradients and BatchNorm's statistics have changed."""

    def limited(self: Trainer, *arguments: Any) -> Any:
        found = forward_backward(self, *arguments)
        last = self.context.rank == self.context.world_size - 1
        if last and self.position.global_step >= from_step and len(arguments[0]) > images:
            raise torch.OutOfMemoryError("injected")
        return found

    Trainer.forward_backward = limited


@pytest.fixture(autouse=True)
def unlimited() -> Any:
    yield
    Trainer.forward_backward = forward_backward


def test_a_step_that_runs_out_of_memory_is_repeated_in_parts_and_the_run_remembers_it(tmp_path):
    found, expected = tiny(tmp_path / "found", *SETTINGS), tiny(tmp_path / "expected", *SETTINGS)
    stop_after(1, expected)
    train(tiny(tmp_path / "expected", *SETTINGS, "train.grad_accum_steps=4"))
    limit_memory(4, from_step=5)
    stop_after(2, found)
    limit_memory(100)
    write_run(run_of(found), found, resume=True)
    train(found)
    assert weights_of(found) == weights_of(expected)
    assert records(found) == records(expected)
    assert json.loads((run_of(found).path / ENV_FILE).read_text())["grad_accum_steps"] == {"5": 4}


def test_one_image_that_does_not_fit_ends_the_run(tmp_path):
    limit_memory(0)
    notes: list[str] = []
    with pytest.raises(EnvironmentProblem, match="rank 0 is out of memory in step 0, with the smallest possible part"):
        notes += notes_of(tiny(tmp_path))
    limit_memory(1)
    notes = notes_of(tiny(tmp_path / "other", "train.epochs=1"))
    assert [note.partition(" in step")[2][:54] for note in notes] == [
        f" 0: from there on, each worker computes its share in {parts}"[:54] for parts in (2, 4, 8, 16)
    ]
    assert sum("BatchNorm" in note for note in notes) == 1


@pytest.mark.parametrize("most", [3, 0])
def test_evaluation_batches_are_divided(tmp_path, most):
    trainer = trainer_of(tiny(tmp_path))

    def limited(module: Any, inputs: tuple[torch.Tensor]) -> None:
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("injected")

    trainer.val_loader._stride = 8
    expected = evaluate_model(trainer.model, trainer.val_loader, trainer.context, "fp32")
    trainer.model.register_forward_pre_hook(limited)
    if not most:
        with pytest.raises(EnvironmentProblem, match="out of memory in the evaluation of one image"):
            evaluate_model(trainer.model, trainer.val_loader, trainer.context, "fp32")
        return
    assert evaluate_model(trainer.model, trainer.val_loader, trainer.context, "fp32") == pytest.approx(expected)
    assert trainer.context.status.eval_parts == 4


def train_ranks(storage: str, limit: int) -> dict[str, Any]:
    limit_memory(limit, from_step=7)
    return train(tiny(storage, *SETTINGS))


def test_ranks_restart_from_their_checkpoint_with_the_same_parts(tmp_path):
    found, expected = tiny(tmp_path / "found", *SETTINGS), tiny(tmp_path / "expected", *SETTINGS)
    with pytest.raises(ProcessRaisedException, match=r"rank 1 is out of memory in step 7: (.|\n)* with --resume"):
        run_ranks(train_ranks, 2, found.storage, 4)
    run_ranks(train_ranks, 2, found.storage, 4)
    run_of(expected).create()
    run_of(expected).write(ENV_FILE, json.dumps({"grad_accum_steps": {"7": 2}}))
    run_ranks(train_ranks, 2, expected.storage, 100)
    assert weights_of(found) == weights_of(expected)
    assert records(found) == records(expected)

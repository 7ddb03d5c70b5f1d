"""Training over ranks: the same results as one process, buckets that fit the dense blocks, restarts that are exact."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from runs import records, run_of, tiny, train, trainer_of

from densenet_dist.config import load_config
from densenet_dist.errors import TrainingError
from densenet_dist.model import DenseNet
from densenet_dist.schema import TrainConfig
from densenet_dist.train import ranks as module
from densenet_dist.train.context import StopRequest
from densenet_dist.train.evaluation import evaluate, evaluate_model
from densenet_dist.train.loop import train_step
from densenet_dist.train.network import bucket_sizes, build_model
from densenet_dist.train.state import restore, take_snapshot
from densenet_dist.train.trainer import Trainer

CONFIGS = Path(__file__).parents[2] / "configs"
MIB = 2**20


def net(*settings: str | Path) -> DenseNet:
    """On no device: only shapes are asked for."""
    with torch.device("meta"):
        return build_model(load_config(*settings).model, num_classes=10)


def bytes_of(model: DenseNet, *prefixes: str) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if name.startswith(prefixes))


def test_a_bucket_is_a_block_with_the_transition_after_it_and_small_blocks_go_together():
    model = net(CONFIGS / "cifar10_notebook.yaml")
    assert bucket_sizes(model, TrainConfig()) == [
        bytes_of(model, "features.denseblock4", "features.norm5", "classifier"),
        bytes_of(model, "features.denseblock3", "features.transition3"),
        bytes_of(model, "features.denseblock2", "features.transition2"),
        bytes_of(model, "features.conv0", "features.denseblock1", "features.transition1"),
    ]
    small = net("model.variant=densenet_bc", "model.depth=100")
    sizes = bucket_sizes(small, TrainConfig())
    assert sum(sizes) == bytes_of(small, "")
    assert len(sizes) > 1
    assert all(size >= MIB for size in sizes[:-1])
    assert bucket_sizes(small, TrainConfig(bucket_mb=0.5)) == [MIB // 2]


def rank_job(storage: str, *settings: str) -> Trainer:
    trainer = trainer_of(tiny(storage, "train.schedule.name=constant", *settings))
    trainer.train_model.train()
    return trainer


def take_steps(trainer: Trainer, start: int = 0, end: int | None = None) -> list[torch.Tensor]:
    """Steps of the first epoch; the weights after each, in one tensor."""
    found = []
    for batch in trainer.train_loader.epoch(0, start):
        if trainer.position.step == end:
            break
        train_step(trainer, batch)
        found.append(torch.cat([parameter.detach().flatten().clone() for parameter in trainer.model.parameters()]))
    return found


def interrupted(storage: str, settings: list[str]) -> list[bool]:
    """Steps from a checkpoint in a fresh trainer, against those that went on."""
    trainer = rank_job(storage, *settings)
    take_steps(trainer, end=2)
    snapshot = copy.deepcopy(take_snapshot(trainer))
    going_on = take_steps(trainer, start=2)
    fresh = rank_job(storage, *settings)
    restore(fresh, snapshot)
    return [torch.equal(one, other) for one, other in zip(take_steps(fresh, start=2), going_on, strict=True)]


# With two ranks a sum has one order; three show whether gradients lie in the same places after a restart.
@pytest.mark.parametrize(
    "settings",
    [["train.gradient_compression=bf16"], ["train.grad_accum_steps=2", "train.bucket_mb=0.002"]],
    ids=str,
)
def test_a_restart_on_three_ranks_is_exact(tmp_path, settings):
    for rank in run_ranks(interrupted, 3, str(tmp_path), settings):
        assert rank == [True, True, True]


def compressed(storage: str) -> tuple[list[torch.Tensor], list[torch.Tensor], bool]:
    found = [take_steps(rank_job(storage, f"train.gradient_compression={kind}")) for kind in ("none", "bf16")]
    every = [torch.empty_like(found[1][-1]) for _ in range(dist.get_world_size())]
    dist.all_gather(every, found[1][-1])
    return found[0], found[1], all(torch.equal(one, every[0]) for one in every)


def test_bf16_gradients_train_alike_and_ranks_stay_the_same(tmp_path):
    for plain, bf16, alike in run_ranks(compressed, 2, str(tmp_path)):
        assert alike
        # A gradient is rounded to 8 bits before and after the sum, so a first step is off by at most 2^-7 of it.
        start = torch.cat([p.detach().flatten() for p in trainer_of(tiny(tmp_path)).model.parameters()])
        moved, other = plain[0] - start, bf16[0] - start
        assert not torch.equal(moved, other)
        assert float((moved - other).norm() / moved.norm()) < 2**-7
        assert float((plain[-1] - bf16[-1]).norm() / (plain[-1] - start).norm()) < 0.05


def compiled(storage: str) -> list[torch.Tensor]:
    settings = ["train.gradient_compression=bf16", "train.sync_bn=true"]
    return [take_steps(rank_job(storage, *settings, f"train.compile={on}"), end=2)[-1] for on in ("false", "true")]


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_a_compiled_net_exchanges_gradients_too(tmp_path):
    (eager, first), (_, second) = run_ranks(compiled, 2, str(tmp_path))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, eager, rtol=1e-2, atol=2e-4)


# In eval mode the whole step is a sum over images, so any share of it can be checked; 11 images over 2 ranks and in up
# to 3 parts are never equal shares.
SHARES = ["train.global_batch_size=11", "train.clip_grad_norm=0.5", "train.label_smoothing=0.1"]


def step_by_step(storage: str, parts: int) -> dict[str, Any]:
    """Take an epoch's steps with BatchNorm in eval mode."""
    trainer = trainer_of(tiny(storage, *SHARES, f"train.grad_accum_steps={parts}"))
    trainer.train_model.eval()
    for batch in trainer.train_loader.epoch(0):
        train_step(trainer, batch)
    return {"weights": trainer.model.state_dict(), "metrics": trainer.metrics.compute(), "step": trainer.position}


def test_the_gradient_of_unequal_shares_is_that_of_the_whole_batch(tmp_path):
    whole = step_by_step(str(tmp_path), 1)
    ranks = run_ranks(step_by_step, 2, str(tmp_path), 3)
    for rank in ranks:
        assert rank["step"] == whole["step"]
        assert rank["metrics"] == pytest.approx(whole["metrics"], rel=1e-5)
        for name, tensor in whole["weights"].items():
            torch.testing.assert_close(rank["weights"][name], tensor, rtol=2e-6, atol=2e-6)
            assert torch.equal(rank["weights"][name], ranks[0]["weights"][name]), name
    assert whole["metrics"]["images"] == 67


def fit_and_count(storage: str, settings: list[str]) -> dict[str, Any]:
    config = tiny(storage, *settings)
    summary = train(config)
    trainer = trainer_of(config)
    val = evaluate_model(trainer.model, trainer.val_loader, trainer.context, "fp32")
    for batch in trainer.train_loader.epoch(0):
        train_step(trainer, batch)
    return {
        "summary": {**summary, "train_seconds": 0},
        "images": (val["images"], trainer.metrics.compute()["images"]),
        "own": float(trainer.metrics.sums[3]),
    }


@pytest.mark.slow
def test_ranks_with_synchronized_batchnorm_follow_one_process(tmp_path):
    settings = ["train.sync_bn=true", "train.ema_decay=0.9", "train.optimizer.weight_decay=0.001"]
    settings += ["data.mixup=0.4", "data.cutmix=1.0"]  # with partners of other ranks; targets are probabilities
    alone, together = (tiny(tmp_path / name, *settings) for name in ("alone", "together"))
    expected = fit_and_count(alone.storage, settings)
    ranks = run_ranks(fit_and_count, 3, together.storage, settings)
    for found, line in zip(records(together), records(alone), strict=True):
        assert found == pytest.approx(line, rel=1e-5)
    for rank in ranks:
        assert rank["summary"]["test/loss"] == pytest.approx(expected["summary"]["test/loss"], rel=1e-5)
        assert rank["summary"] == ranks[0]["summary"]
        assert rank["images"] == (8, 67)
    assert sum(rank["own"] for rank in ranks) == 67


@pytest.mark.slow
def test_without_it_each_rank_has_statistics_of_its_own_and_evaluation_uses_rank_0s(tmp_path):
    together = tiny(tmp_path)
    first, second = run_ranks(fit_and_count, 2, together.storage, [])
    assert first["summary"] == second["summary"]
    # Rank 0's statistics are those in the checkpoints, and all ranks evaluate with them.
    *_, validated, tested = records(together)
    for split, checkpoint, record in (("val", "last", validated), ("test", "best", tested)):
        again = evaluate(run_of(together).path, split=split, checkpoint=checkpoint)
        assert again["loss"] == pytest.approx(record[f"{split}/loss"], rel=1e-6)


def test_a_request_that_arrives_during_an_exchange_is_not_lost(tmp_path, monkeypatch):
    trainer = trainer_of(tiny(tmp_path))

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        trainer.context.status.request(StopRequest.SAVE)  # by the thread of the heartbeats
        return tensor[None]

    monkeypatch.setattr(module, "gather_ranks", gather)
    assert trainer.rank_sync.exchange() == (None, StopRequest.NONE)
    assert trainer.rank_sync.exchange() == (None, StopRequest.SAVE)


def diverge(storage: str) -> list[str]:
    told = []
    # In one step for all, then in one rank's share alone.
    try:
        train(tiny(storage, "train.lr=1e30", "train.schedule.name=constant"))
    except TrainingError as error:
        told.append(str(error))
    trainer = trainer_of(tiny(storage, "train.epochs=1"))
    for batch in trainer.train_loader.epoch(0):
        if dist.get_rank() == 1 and trainer.position.step == 2:
            batch.images[0, 0, 0, 0] = math.nan
        train_step(trainer, batch)
    told.append(str(trainer.rank_sync.exchange()[0]))
    return told


def test_all_ranks_stop_at_the_same_step_with_the_same_words(tmp_path):
    first, second = run_ranks(diverge, 2, str(tmp_path))
    assert first == second
    assert first[0].startswith("the loss is NaN or infinite at step 1 (epoch 1); no checkpoint was saved yet")
    assert first[1] == "2"

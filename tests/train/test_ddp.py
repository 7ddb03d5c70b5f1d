"""Gradients over ranks: buckets that fit the dense blocks, compression, restarts that are exact on three ranks too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from runs import job_of, records, tiny, train, weights_of

from densenet_dist.config import load_config
from densenet_dist.errors import ConfigError
from densenet_dist.model import DenseNet
from densenet_dist.schema import TrainConfig
from densenet_dist.train import ddp
from densenet_dist.train.ddp import bucket_sizes, fill_buckets
from densenet_dist.train.engine import train_step
from densenet_dist.train.job import Job
from densenet_dist.train.network import build_model

CONFIGS = Path(__file__).parents[2] / "configs"
MIB = 2**20


def net(*settings: str | Path) -> DenseNet:
    """On no device: only shapes are asked for."""
    with torch.device("meta"):
        return build_model(load_config(*settings).model, num_classes=10)


def bytes_of(model: DenseNet, *prefixes: str) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if name.startswith(prefixes))


def test_a_bucket_is_a_block_with_the_transition_after_it():
    model = net(CONFIGS / "cifar10_notebook.yaml")
    assert bucket_sizes(model, TrainConfig()) == [
        bytes_of(model, "features.denseblock4", "features.norm5", "classifier"),
        bytes_of(model, "features.denseblock3", "features.transition3"),
        bytes_of(model, "features.denseblock2", "features.transition2"),
        bytes_of(model, "features.conv0", "features.denseblock1", "features.transition1"),
    ]


@pytest.mark.parametrize("variant", ["densenet121", "densenet161", "densenet169", "densenet201", "densenet_bc"])
def test_buckets_hold_every_gradient_and_small_blocks_go_together(variant):
    model = net(f"model.variant={variant}", *(["model.depth=100"] if variant == "densenet_bc" else []))
    sizes = bucket_sizes(model, TrainConfig())
    assert sum(sizes) == bytes_of(model, "")
    assert len(sizes) > 1
    assert all(size >= MIB for size in sizes[:-1])
    assert bucket_sizes(net(CONFIGS / "quickstart.yaml"), TrainConfig()) == [49_194 * 4]
    assert bucket_sizes(model, TrainConfig(bucket_mb=0.5)) == [MIB // 2]


def test_frozen_parameters_are_in_no_bucket():
    model = net(CONFIGS / "cifar10_notebook.yaml")
    model.features.denseblock3.requires_grad_(False)
    model.features.transition3.requires_grad_(False)
    sizes = bucket_sizes(model, TrainConfig())
    assert len(sizes) == 3
    assert sum(sizes) == sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def test_buckets_close_as_ddp_closes_them():
    assert fill_buckets([1, 2, 3, 4, 5], [3, 7]) == [[0, 1], [2, 3], [4]]
    assert fill_buckets([5, 1, 1], [2]) == [[0], [1, 2]]
    assert fill_buckets([1], [10]) == [[0]]


def rank_job(storage: str, *settings: str) -> Job:
    job = job_of(tiny(storage, "train.schedule.name=constant", *settings))
    job.forward.train()
    return job


def take_steps(job: Job, start: int = 0, end: int | None = None) -> list[torch.Tensor]:
    """Steps of the first epoch; the weights after each, in one tensor."""
    found = []
    for batch in job.train_loader.epoch(0, start):
        if job.position.step == end:
            break
        train_step(job, batch)
        found.append(torch.cat([parameter.detach().flatten().clone() for parameter in job.model.parameters()]))
    return found


def buckets_of_ranks(storage: str, settings: list[str]) -> dict[str, Any]:
    smallest, ddp.SMALLEST_BUCKET = ddp.SMALLEST_BUCKET, 1  # so that a net of two layers has several buckets
    try:
        job = rank_job(storage, *settings)
        take_steps(job)
        return {"bytes": bucket_sizes(job.model, job.config.train), **job.forward._get_ddp_logging_data()}
    finally:
        ddp.SMALLEST_BUCKET = smallest


@pytest.mark.parametrize("settings", [[], ["train.grad_accum_steps=2"], ["model.block=reference"]], ids=str)
def test_ddp_makes_these_buckets(tmp_path, settings):
    found = run_ranks(buckets_of_ranks, 2, str(tmp_path), settings)[0]
    assert len(found["bytes"]) == 2
    assert list(map(int, found["rebuilt_bucket_sizes"].split(","))) == found["bytes"]
    assert found.get("static_graph", 0) == ("train.grad_accum_steps=2" not in settings)
    assert found["gradient_as_bucket_view"] == 1


def before_the_first_step(storage: str) -> tuple[bool, bool, bool]:
    """Whether building a job on several ranks leaves weights, statistics and generator as they are."""
    config = tiny(storage, "model.drop_rate=0.2")
    alone = build_model(config.model, 10, seed=config.seed)
    state = torch.random.get_rng_state()
    job = job_of(config)
    same = all(torch.equal(value, alone.state_dict()[name]) for name, value in job.model.state_dict().items())
    clean = all(parameter.grad is None for parameter in job.model.parameters())
    return same, clean, torch.equal(state, torch.random.get_rng_state())


def test_settling_the_buckets_leaves_no_trace(tmp_path):
    assert run_ranks(before_the_first_step, 2, str(tmp_path)) == [(True, True, True)] * 2


def interrupted(storage: str, settings: list[str]) -> list[bool]:
    """Steps from a checkpoint in a fresh job, against those that went on."""
    job = rank_job(storage, *settings)
    take_steps(job, end=2)
    snapshot = copy.deepcopy(job.snapshot())
    going_on = take_steps(job, start=2)
    fresh = rank_job(storage, *settings)
    fresh.restore(snapshot)
    return [torch.equal(one, other) for one, other in zip(take_steps(fresh, start=2), going_on, strict=True)]


# With two ranks a sum has one order; three show whether gradients lie in the same places after a restart.
@pytest.mark.parametrize(
    "settings",
    [[], ["train.gradient_compression=bf16"], ["train.grad_accum_steps=2"], ["train.bucket_mb=0.002"]],
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
        start = torch.cat([p.detach().flatten() for p in job_of(tiny(tmp_path)).model.parameters()])
        moved, other = plain[0] - start, bf16[0] - start
        assert not torch.equal(moved, other)
        assert float((moved - other).norm() / moved.norm()) < 2**-7
        assert float((plain[-1] - bf16[-1]).norm() / (plain[-1] - start).norm()) < 0.05


def test_a_whole_run_with_bf16_gradients_resumes(tmp_path):
    settings = ["train.gradient_compression=bf16", "train.schedule.name=constant", "checkpoint.every_steps=3"]
    run_ranks(train_run, 2, str(tmp_path / "whole"), [*settings, "train.epochs=2"])
    run_ranks(train_run, 2, str(tmp_path / "parts"), [*settings, "train.epochs=1"])
    run_ranks(train_run, 2, str(tmp_path / "parts"), [*settings, "train.epochs=2"])
    whole, parts = (tiny(tmp_path / name) for name in ("whole", "parts"))
    last = sorted(weights_of(whole))[-1]
    assert weights_of(whole)[last] == weights_of(parts)[last]
    assert records(whole)[-1] == records(parts)[-1]


def train_run(storage: str, settings: list[str]) -> None:
    train(tiny(storage, *settings))


def compiled(storage: str) -> list[torch.Tensor]:
    settings = ["model.block=reference", "train.gradient_compression=bf16"]
    return [take_steps(rank_job(storage, *settings, f"train.compile={on}"), end=2)[-1] for on in ("false", "true")]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_a_compiled_net_exchanges_gradients_too(tmp_path):
    (eager, first), (_, second) = run_ranks(compiled, 2, str(tmp_path))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, eager, rtol=1e-2, atol=2e-4)


def test_a_compiled_net_takes_no_small_buckets():
    with pytest.raises(ConfigError, match=r"train.bucket_mb: train.compile=true takes 1 or more, not 0.5"):
        load_config("train.compile=true", "train.bucket_mb=0.5")


@pytest.mark.parametrize("setting", ["train.gradient_compression=fp8", "train.bucket_mb=0", "train.bucket_mb=-1"])
def test_what_cannot_be_is_refused(setting):
    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
        load_config(setting)

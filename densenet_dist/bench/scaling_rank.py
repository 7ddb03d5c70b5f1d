"""What one rank of ``bench scaling`` measures: training's own step with and without communication."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist

from densenet_dist.config import validate
from densenet_dist.data.datasets import Dataset, Split
from densenet_dist.data.loader import Batch
from densenet_dist.data.speed import synchronize
from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import Config, ScheduleConfig
from densenet_dist.train.building import build_job
from densenet_dist.train.context import LocalContext
from densenet_dist.train.ddp import no_sync
from densenet_dist.train.engine import train_step
from densenet_dist.train.job import Job

Probe: TypeAlias = Callable[[Job, dict[int, Batch]], Any]
"""Measures something else of a job, with this rank's share of a batch by images of the global batch."""


@dataclass(frozen=True)
class RankMeasurements:
    """What one rank measured.

    Attributes:
        timings: seconds of a training step, round by round, by images of the global batch and whether gradients are
            exchanged or stay on their rank (DDP's ``no_sync``); one worker has nobody to exchange them with.
        parameters: of the net that are trained.
        device: the GPU's name, or CPU.
        backend: what communicates.
        probed: what the probe returned.
    """

    timings: dict[tuple[int, bool], list[float]]
    parameters: int
    device: str
    backend: str
    probed: Any = None


def measure_rank(
    device: torch.device,
    plain: dict[str, Any],
    num_classes: int,
    global_sizes: Sequence[int],
    seconds: float,
    rounds: int,
    probe: Probe | None = None,
) -> RankMeasurements:
    """Measure together with the other ranks of the process group.

    Args:
        device: of this rank.
        plain: the configuration as plain values.
        num_classes: of the net.
        global_sizes: images of the global batches, each of them at least one a rank.
        seconds: for each measurement, about.
        rounds: how often all of it is measured.
        probe: what else to measure after it, on every rank at once.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    with tempfile.TemporaryDirectory() as folder:
        context = LocalContext(RunFolder(folder, "run"), device, rank, world_size)
        job = _build_job(validate(plain), context, num_classes, max(global_sizes))
        try:
            whole = next(iter(job.train_loader.epoch(0)))
            batches = {size: _share(job, whole, size) for size in global_sizes}
            return RankMeasurements(
                _time_rounds(job, batches, seconds, rounds),
                sum(parameter.numel() for parameter in job.model.parameters() if parameter.requires_grad),
                torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
                dist.get_backend(),
                probe(job, batches) if probe else None,
            )
        finally:
            job.saver.close()


def _build_job(config: Config, context: LocalContext, num_classes: int, images: int) -> Job:
    """Training's own job for any number of steps, on random images; weights stay about where they are."""
    train = replace(config.train, lr=1e-12, schedule=ScheduleConfig(name="constant"), global_batch_size=images)
    train = replace(train, epochs=1, cuda_graph=False, profile=None)
    data = replace(config.data, loader="torch", val_fraction=0.0, prefetch=1)
    config = replace(config, train=train, data=data, cluster=replace(config.cluster, workers="auto"))
    side, random = config.data.side, np.random.default_rng(config.seed)
    pixels = random.integers(0, 256, (images, side, side, 3), dtype=np.uint8)
    split = Split(pixels, random.integers(0, num_classes, images))
    names = tuple(map(str, range(num_classes)))
    job = build_job(config, context, Dataset("random", names, split, split, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    job.forward.train()
    return job


def _time_rounds(
    job: Job, batches: dict[int, Batch], seconds: float, rounds: int
) -> dict[tuple[int, bool], list[float]]:
    orders = ((True, False), (False, True)) if job.context.world_size > 1 else ((True,), (True,))
    timings: dict[tuple[int, bool], list[float]] = {(size, way): [] for size in batches for way in orders[0]}
    for size, exchange in timings:
        time_steps(job, batches[size], 1, exchange)  # warms up
    for number in range(rounds):
        for size, batch in batches.items():
            count = max(2, int(seconds / longest(time_steps(job, batch, 1, True), job.context.device)))
            # Which comes first alternates: a drift of the machine then stays out of the difference.
            for exchange in orders[number % 2]:
                timings[size, exchange].append(time_steps(job, batch, count, exchange))
    return timings


def _share(job: Job, whole: Batch, global_size: int) -> Batch:
    """This rank's share of a global batch of so many images."""
    count = len(range(job.context.rank, global_size, job.context.world_size))
    targets = None if whole.targets is None else whole.targets[:count]
    return Batch(whole.images[:count], whole.labels[:count], global_size, targets)


def time_steps(job: Job, batch: Batch, count: int, exchange: bool) -> float:
    """Take so many steps, gradients exchanged or not; seconds of one."""
    with nullcontext() if exchange else no_sync(job.forward):
        barrier(job.context.device)
        started = perf_counter()
        for _ in range(count):
            train_step(job, batch)
        synchronize(job.context.device)
        return (perf_counter() - started) / count


def longest(seconds: float, device: torch.device) -> float:
    """The same number on every rank: that of the slowest."""
    longest = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)


def barrier(device: torch.device) -> None:
    """Wait for this rank's device, then for all ranks."""
    synchronize(device)
    dist.barrier()

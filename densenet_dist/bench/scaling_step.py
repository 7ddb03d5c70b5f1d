"""What one rank of ``bench scaling`` measures: training's own step with and without communication, and all-reduces."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from densenet_dist.config import validate
from densenet_dist.data.datasets import Dataset, Split
from densenet_dist.data.loader import Batch
from densenet_dist.model.kernels.choice import unavailable
from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import Config, ScheduleConfig
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.context import LocalContext
from densenet_dist.train.ddp import bucket_sizes, fill_buckets, wrap
from densenet_dist.train.engine import train_step
from densenet_dist.train.inputs import engine_of, train_loader
from densenet_dist.train.job import Job
from densenet_dist.train.network import autocast, build_model
from densenet_dist.train.optim import Course, WeightAverage, build_optimizer

MESSAGES: Final = tuple(4**power for power in range(6, 13))
"""Bytes of the all-reduces that are timed by themselves: 4 KiB to 16 MiB."""
_REPEATS: Final = 5


@dataclass(frozen=True)
class Timing:
    """A batch size on one rank, once.

    Attributes:
        step_s: seconds of a training step, the mean of `steps` steps.
        local_s: likewise, where gradients stay on their rank (DDP's ``no_sync``); of one worker the same.
        steps: how many were timed, each way.
    """

    step_s: float
    local_s: float
    steps: int


@dataclass(frozen=True)
class Found:
    """What one rank measured.

    Attributes:
        timings: of each round, by images of the global batch.
        buckets: bytes of gradients of each of DDP's buckets in turn.
        ready: when the backward pass has filled each, as a share of a step without communication; medians, by images
            of the global batch.
        all_reduces: bytes, and seconds of an all-reduce of them, round by round.
        parameters: of the net that are trained.
        device: the GPU's name, or CPU.
        backend: what communicates.
    """

    timings: dict[int, list[Timing]]
    buckets: list[int]
    ready: dict[int, list[float]]
    all_reduces: list[tuple[int, float]]
    parameters: int
    device: str
    backend: str


def measure_rank(
    device: torch.device,
    plain: dict[str, Any],
    num_classes: int,
    global_sizes: Sequence[int],
    seconds: float,
    rounds: int,
) -> Found:
    """Measure together with the other ranks of the process group.

    Args:
        device: of this rank.
        plain: the configuration as plain values.
        num_classes: of the net.
        global_sizes: images of the global batches, each of them at least one a rank.
        seconds: for each measurement, about.
        rounds: how often all of it is measured.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as training does
    config = _steady(validate(plain), max(global_sizes), device)
    bench = _Bench(config, device, num_classes)
    batches = {size: bench.batch(size) for size in dict.fromkeys(global_sizes)}
    for batch in batches.values():
        for together in (True, False):
            bench.steps(batch, 1, together)
    found = Found({}, bench.bucket_bytes(next(iter(batches.values()))), {}, [], bench.parameters, *_names(device))
    messages = sorted({*MESSAGES, *(sent_bytes(size, config) for size in found.buckets)})
    profiles: dict[int, list[list[float]]] = {}
    for number in range(rounds):
        for size, batch in batches.items():
            # Which comes first alternates: a drift of the machine then stays out of the difference.
            found.timings.setdefault(size, []).append(bench.time(batch, seconds, together_first=number % 2 == 0))
            profiles.setdefault(size, []).append(bench.ready(batch))
        if bench.context.world_size > 1:
            found.all_reduces.extend((message, _time_all_reduce(message, config, device)) for message in messages)
    found.ready.update({size: np.median(shares, axis=0).tolist() for size, shares in profiles.items()})
    return found


def sent_bytes(gradients: int, config: Config) -> int:
    """Bytes in which so many bytes of gradients are sent."""
    return gradients // 2 if config.train.gradient_compression == "bf16" else gradients


class _Bench:
    """A job of training on random images, and its steps."""

    def __init__(self, config: Config, device: torch.device, num_classes: int) -> None:
        self.context = LocalContext(
            RunFolder(config.storage, config.name), device, None, dist.get_rank(), dist.get_world_size()
        )
        self._job, self._device = _job(config, self.context, num_classes), device
        self._whole = next(iter(self._job.train_loader.epoch(0)))
        self._trained = [parameter for parameter in self._job.model.parameters() if parameter.requires_grad]
        self.parameters = sum(parameter.numel() for parameter in self._trained)
        self._job.forward.train()

    def batch(self, global_size: int) -> Batch:
        """This rank's share of a global batch of so many images."""
        rank, ranks = self.context.rank, self.context.world_size
        share = len(range(rank, global_size, ranks))
        images, labels, _, targets = self._whole
        targets = None if targets is None else targets[:share]
        return Batch(images[:share], labels[:share], global_size, targets)

    def steps(self, batch: Batch, count: int, together: bool) -> float:
        """Take so many steps, gradients exchanged or not; seconds of one."""
        with nullcontext() if together else _apart(self._job.forward):
            _meet(self._device)
            started = perf_counter()
            for _ in range(count):
                train_step(self._job, batch)
            _finish(self._device)
            return (perf_counter() - started) / count

    def time(self, batch: Batch, seconds: float, together_first: bool) -> Timing:
        """Steps for about so many seconds each way, as many on every rank."""
        count = max(2, int(seconds / _longest(self.steps(batch, 1, True), self._device)))
        if self.context.world_size == 1:  # there is nobody to exchange anything with
            alone = self.steps(batch, count, True)
            return Timing(alone, alone, count)
        taken = {way: self.steps(batch, count, way) for way in (together_first, not together_first)}
        return Timing(taken[True], taken[False], count)

    def bucket_bytes(self, batch: Batch) -> list[int]:
        """Bytes of DDP's buckets, in the order in which they are filled."""
        return [size for size, _ in self._buckets(batch)]

    def ready(self, batch: Batch) -> list[float]:
        """When each bucket is filled in a step without communication, as a share of it."""
        return [share for _, share in self._buckets(batch)]

    def _buckets(self, batch: Batch) -> list[tuple[int, float]]:
        marks: list[tuple[int, Any]] = []
        hooks = [
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: marks.append((parameter.nbytes, _now(self._device)))
            )
            for parameter in self._trained
        ]
        try:
            with _apart(self._job.forward):
                _meet(self._device)
                started = _now(self._device)
                train_step(self._job, batch)
                ended = _now(self._device)
                _finish(self._device)
        finally:
            for hook in hooks:
                hook.remove()
        marks = marks[-len(self._trained) :]  # of the last part, where a step has several
        whole = _between(started, ended)
        filled = fill_buckets([size for size, _ in marks], bucket_sizes(self._job.model, self._job.config.train))
        return [
            (sum(marks[place][0] for place in places), _between(started, marks[places[-1]][1]) / whole)
            for places in filled
        ]


def _steady(config: Config, most_images: int, device: torch.device) -> Config:
    """The configuration for any number of steps on random images: weights stay where they are."""
    block = config.model.block if unavailable(device.type) is None else "reference"
    train = replace(
        config.train, lr=1e-12, schedule=ScheduleConfig(name="constant"), global_batch_size=most_images, epochs=1
    )
    data = replace(config.data, val_fraction=0.0, prefetch=1)
    return replace(config, model=replace(config.model, block=block), train=train, data=data)


def _job(config: Config, context: LocalContext, num_classes: int) -> Job:
    """Training's own job, on as many random images as there are in a global batch."""
    images, device = config.train.global_batch_size, context.device
    side, random = config.data.side, np.random.default_rng(config.seed)
    split = Split(
        random.integers(0, 256, (images, side, side, 3), dtype=np.uint8), random.integers(0, num_classes, images)
    )
    names = tuple(map(str, range(num_classes)))
    dataset = Dataset("random", names, split, split, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    engine = engine_of(config, device, dataset, split, "torch")
    loader = train_loader(config, context, dataset, engine, np.arange(images))
    model = build_model(config.model, num_classes, side, config.seed).to(device)
    decay = config.train.ema_decay
    return Job(
        config=config,
        context=context,
        dataset=dataset,
        model=model,
        forward=wrap(model, config, context, autocast(device, config.train.precision)),
        average=WeightAverage(model, decay) if decay is not None else None,
        optimizer=build_optimizer(model, config.train.optimizer, config.train.lr),
        scaler=GradScaler(device.type, enabled=config.train.precision == "fp16"),
        course=Course.build(config.train, loader.steps_per_epoch),
        loader="torch",
        engine=engine,
        train_loader=loader,
        val_loader=None,
        num_images=(images, 0),
        store=CheckpointStore(context.run),
    )


@contextmanager
def _apart(forward: nn.Module) -> Iterator[None]:
    """No exchange of gradients."""
    inner = getattr(forward, "_orig_mod", forward)
    with inner.no_sync() if isinstance(inner, DistributedDataParallel) else nullcontext():
        yield


def _time_all_reduce(message: int, config: Config, device: torch.device) -> float:
    """Seconds of an all-reduce of so many bytes, of the type in which gradients are sent."""
    dtype = torch.bfloat16 if config.train.gradient_compression == "bf16" else torch.float32
    tensor = torch.zeros(max(1, message // dtype.itemsize), dtype=dtype, device=device)
    times = []
    for _ in range(_REPEATS + 1):
        _meet(device)
        started = perf_counter()
        dist.all_reduce(tensor)
        _finish(device)
        times.append(perf_counter() - started)
    return _longest(statistics.median(times[1:]), device)


def _longest(seconds: float, device: torch.device) -> float:
    """The same number on every rank: that of the slowest."""
    longest = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)


def _meet(device: torch.device) -> None:
    _finish(device)
    dist.barrier()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _now(device: torch.device) -> Any:
    """A mark on the device's own clock: on a GPU an event in its queue, which nothing waits for."""
    if device.type != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(before: Any, after: Any) -> float:
    """Seconds between two marks that the device has passed."""
    return after - before if isinstance(before, float) else float(before.elapsed_time(after)) / 1e3


def _names(device: torch.device) -> tuple[str, str]:
    return (torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"), dist.get_backend()

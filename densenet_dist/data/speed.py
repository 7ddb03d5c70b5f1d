"""Measure the speed of a loader on this machine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from densenet_dist.data.loader import Batch, TrainLoader


@dataclass(frozen=True)
class Speed:
    """The speed of one loader, while nothing consumes its batches.

    Attributes:
        images: number of images produced.
        seconds: wall time.
        cpu_seconds: CPU time of all threads of this process.
    """

    images: int
    seconds: float
    cpu_seconds: float

    @property
    def per_second(self) -> float:
        """Images per second."""
        return self.images / self.seconds

    @property
    def per_cpu_second(self) -> float:
        """Images per CPU-second: what counts if training needs the same cores."""
        return self.images / max(self.cpu_seconds, 1e-9)


def measure(batches: Iterator[Batch], device: torch.device, *, seconds: float, warm_up: int = 3) -> Speed:
    """Take batches for about `seconds`, or until there are no more; the first `warm_up` batches are not counted.

    Raises:
        ValueError: there are at most `warm_up` batches.
    """
    for _, _ in zip(range(warm_up), batches, strict=False):
        pass
    images = 0
    synchronize(device)
    started, worked = time.perf_counter(), time.process_time()
    for count, batch in enumerate(batches, start=1):
        images += len(batch.targets)
        if device.type == "cuda" and count % 16 == 0:
            synchronize(device)  # else its queue would run ahead of the clock
        if time.perf_counter() - started > seconds:
            break
    synchronize(device)
    if images == 0:
        raise ValueError("no batches left to measure")
    return Speed(images, time.perf_counter() - started, time.process_time() - worked)


def endless(loader: TrainLoader) -> Iterator[Batch]:
    """Yield the batches of all epochs, without end."""
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

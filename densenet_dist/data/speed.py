"""How fast a loader is, measured where it is to work."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from densenet_dist.data.loader import Batch, TrainLoader


@dataclass(frozen=True)
class Speed:
    """What was measured of one loader, with nobody using its batches.

    Attributes:
        images: made in the time measured.
        seconds: that it took.
        cpu_seconds: that this process' threads worked in it.
    """

    images: int
    seconds: float
    cpu_seconds: float

    @property
    def per_second(self) -> float:
        """Images a second."""
        return self.images / self.seconds

    @property
    def per_cpu_second(self) -> float:
        """Images a CPU-second: what counts where training wants the same cores."""
        return self.images / max(self.cpu_seconds, 1e-9)


def measure(batches: Iterator[Batch], device: torch.device, *, seconds: float, warm_up: int = 3) -> Speed:
    """Take batches for about so many seconds, or until there are no more, the first few not counted.

    Raises:
        ValueError: there are no batches beyond the first few.
    """
    for _, _ in zip(range(warm_up), batches, strict=False):
        pass
    images = 0
    synchronize(device)
    started, worked = time.perf_counter(), time.process_time()
    for count, batch in enumerate(batches, start=1):
        images += len(batch.targets)
        if device.type == "cuda" and count % 16 == 0:
            synchronize(device)  # its queue would run ahead of the clock
        if time.perf_counter() - started > seconds:
            break
    synchronize(device)
    if images == 0:
        raise ValueError("no batches left to measure")
    return Speed(images, time.perf_counter() - started, time.process_time() - worked)


def endless(loader: TrainLoader) -> Iterator[Batch]:
    """The batches of every epoch, one after the other."""
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

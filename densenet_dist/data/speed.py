"""The throughput of a loader."""

import itertools
import time
from typing import NamedTuple

import torch

from densenet_dist.data.loader import TrainLoader


class Speed(NamedTuple):
    """Images that a loader produces while nothing consumes them: per second, and per CPU-second of all threads."""

    per_second: float
    per_cpu_second: float


def measure(loader: TrainLoader, device: torch.device, *, seconds: float, warm_up: int = 3) -> Speed:
    """Take batches for about `seconds`; the first `warm_up` batches are not counted."""
    batches = (batch for epoch in itertools.count() for batch in loader.epoch(epoch))
    for _ in itertools.islice(batches, warm_up):
        pass
    synchronize(device)
    images, started, worked = 0, time.perf_counter(), time.process_time()
    for count, batch in enumerate(batches, start=1):
        images += len(batch.targets)
        if count % 16 == 0:
            synchronize(device)  # else the queue of a GPU would run ahead of the clock
        if time.perf_counter() - started > seconds:
            break
    synchronize(device)
    elapsed, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    return Speed(images / elapsed, images / max(cpu_seconds, 1e-9))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

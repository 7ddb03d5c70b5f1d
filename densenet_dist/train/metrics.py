"""Metrics as sums on the device, and exchanging values between ranks."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from densenet_dist.train.control import collective

T = TypeVar("T")
_LOSS, _TOP1, _TOP5, _IMAGES = range(4)


class Metrics:
    """Running sums of loss, top-1 and top-5 hits and images, updated without a host sync.

    Attributes:
        sums: (4,) float64 on the device: summed loss, top-1 hits, top-5 hits, images.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            loss_sum: () summed loss of the batch.
            logits: (n, classes), any float dtype.
            labels: (n,) int64, or (n, classes) float32 probabilities, by which hits are weighted.
        """
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = labels.gather(1, top) if labels.ndim == 2 else top == labels[:, None]
        self.sums[_LOSS] += loss_sum.detach()
        self.sums[_TOP1] += hits[:, 0].sum()
        self.sums[_TOP5] += hits.sum()
        self.sums[_IMAGES] += len(labels)

    def restore(self, gathered: Tensor, rank: int, world_size: int) -> None:
        """Load the sums of a checkpoint; if the world size differs, rank 0 gets all of them."""
        if len(gathered) == world_size:
            self.sums.copy_(gathered[rank])
        elif rank == 0:
            self.sums.copy_(gathered.sum(0))

    def compute(self) -> dict[str, float]:
        """Return ``loss``, ``top1``, ``top5`` (in [0, 1]) and ``images`` over all ranks. A collective call."""
        loss, top1, top5, images = gather_ranks(self.sums).sum(0).tolist()
        count = max(images, 1.0)
        return {"loss": loss / count, "top1": top1 / count, "top5": top5 / count, "images": images}


def gather_ranks(tensor: Tensor) -> Tensor:
    """Return every rank's `tensor`, (world_size, *shape) in the order of ranks. A collective call."""
    if not dist.is_initialized():
        return tensor[None].clone()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    with collective():
        dist.all_gather(parts, tensor)
    return torch.stack(parts)


def broadcast(value: T) -> T:
    """Return rank 0's value, a picklable object, on every rank. A collective call."""
    values: list[Any] = [value]
    if dist.is_initialized():
        with collective():
            dist.broadcast_object_list(values, src=0)
    return cast(T, values[0])


def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, picklable objects, on every rank. A collective call."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with collective():
        dist.all_gather_object(values, value)
    return values

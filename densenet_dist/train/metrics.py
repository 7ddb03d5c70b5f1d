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
    """Running sums of loss, top-1 and top-5 hits and images, without a host sync a step.

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
            labels: (n,) int64, or (n, classes) float32 probabilities: a hit counts as much as it was to be hit.
        """
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = labels.gather(1, top) if labels.ndim == 2 else top == labels[:, None]
        self.sums[_LOSS] += loss_sum.detach()
        self.sums[_TOP1] += hits[:, 0].sum()
        self.sums[_TOP5] += hits.sum()
        self.sums[_IMAGES] += len(labels)

    def gather(self) -> Tensor:
        """(world_size, 4) float64 on the CPU: every rank's sums, for a checkpoint. A collective call."""
        return gather_ranks(self.sums).cpu()

    def restore(self, gathered: Tensor, rank: int, world_size: int) -> None:
        """Take up the sums of a checkpoint; at another world size, rank 0 takes all of them."""
        if len(gathered) == world_size:
            self.sums.copy_(gathered[rank])
        elif rank == 0:
            self.sums.copy_(gathered.sum(0))

    def compute(self) -> dict[str, float]:
        """``loss``, ``top1``, ``top5`` (shares in [0, 1]) and ``images`` over all ranks. A collective call."""
        loss, top1, top5, images = gather_ranks(self.sums).sum(0).tolist()
        count = max(images, 1.0)
        return {"loss": loss / count, "top1": top1 / count, "top5": top5 / count, "images": images}


def gather_ranks(tensor: Tensor) -> Tensor:
    """(world_size, *shape): every rank's `tensor`, in the order of the ranks, the same bits everywhere."""
    if not dist.is_initialized():
        return tensor[None].clone()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    with collective():
        dist.all_gather(parts, tensor)
    return torch.stack(parts)


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank; any picklable one. A collective call."""
    values: list[Any] = [value]
    if dist.is_initialized():
        with collective():
            dist.broadcast_object_list(values, src=0)
    return cast(T, values[0])


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, on every rank; any picklable ones. A collective call."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with collective():
        dist.all_gather_object(values, value)
    return values

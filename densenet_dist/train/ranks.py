"""Collective operations: exchange values and, while training, stop requests and non-finite losses."""

from __future__ import annotations

import time
from typing import Any, Final, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from densenet_dist.train.context import RunContext, StopRequest, collective

MAX_SYNC_STEPS: Final = 50
"""Steps between two calls of `RankSync.exchange` at most: each is a host sync and a collective call."""
_SYNC_EVERY_S: Final = 0.5
_NEVER: Final = torch.iinfo(torch.int64).max
T = TypeVar("T")


def gather_ranks(tensor: Tensor) -> Tensor:
    """Return every rank's `tensor`, (world_size, *shape) in the order of ranks. A collective call."""
    if not dist.is_initialized():
        return tensor[None].clone()
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    with collective():
        dist.all_gather(gathered, tensor)
    return torch.stack(gathered)


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


@torch.no_grad()
def sync_from_rank0(tensors: list[Tensor]) -> None:
    """Copy rank 0's values to every rank. A collective call.

    BatchNorm's running statistics differ by rank while training (only rank 0's are kept), so they are shared before
    an evaluation rather than before every step, as DDP does by default.
    """
    if dist.is_initialized():
        with collective():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


class RankSync:
    """Exchanges stop requests and non-finite losses, so that all ranks act on them at the same step.

    The ranks exchange after the first step of the process, then about twice a second by rank 0's clock, and at least
    every `MAX_SYNC_STEPS` steps.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._first_bad_step = torch.full((), _NEVER, dtype=torch.int64, device=context.device)
        self._interval = 1
        self._steps = 0
        self._exchanged = time.perf_counter()

    @torch.no_grad()
    def watch(self, loss: Tensor, step: int) -> None:
        """Check the loss of a step, a () tensor, without a host sync."""
        self._first_bad_step = torch.where(
            torch.isfinite(loss), self._first_bad_step, self._first_bad_step.clamp(max=step)
        )

    def due(self) -> bool:
        """Return whether to exchange after this step: the same on every rank. To be called once per step."""
        self._steps += 1
        alone = self._context.world_size == 1
        return self._steps >= self._interval or (alone and self._context.status.requested is not StopRequest.NONE)

    def exchange(self, request: StopRequest = StopRequest.NONE) -> tuple[int | None, StopRequest]:
        """Exchange the greater of `request` and this rank's pending request. A collective call.

        Returns:
            The first step with a NaN or infinite loss on any rank, or None; the greatest request of any rank.
        """
        status = self._context.status
        pending = status.requested  # another thread may set it at any time
        own = torch.tensor([max(request, pending), self._next_interval()], device=self._context.device)
        rows = gather_ranks(torch.cat([self._first_bad_step[None], own])).tolist()
        self._interval, self._steps = rows[0][2], 0
        if pending is StopRequest.SAVE and status.requested is StopRequest.SAVE:
            status.requested = StopRequest.NONE  # the caller saves
        step = min(row[0] for row in rows)
        return None if step == _NEVER else step, StopRequest(max(row[1] for row in rows))

    def _next_interval(self) -> int:
        now = time.perf_counter()
        step_s = (now - self._exchanged) / max(self._steps, 1)
        self._exchanged = now
        # At most doubled: the time of a few steps may be far from that of later ones.
        return max(1, min(2 * self._interval, int(_SYNC_EVERY_S / step_s), MAX_SYNC_STEPS))

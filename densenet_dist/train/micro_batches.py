"""The micro-batches of a rank's share of a step: as many as configured, and twice as many if memory runs out."""

from __future__ import annotations

import copy
from typing import Final

import torch
from torch import nn

from densenet_dist.errors import OutOfMemory, SmallerMicroBatches
from densenet_dist.run_folder import ENV_FILE
from densenet_dist.schema import Config
from densenet_dist.train.context import RunContext
from densenet_dist.train.network import free_memory
from densenet_dist.train.preflight import least_images
from densenet_dist.train.ranks import broadcast

_KEY: Final = "grad_accum_steps"
"""The key of env.json for the numbers of micro-batches that memory required, by the first step of each."""


class MicroBatches:
    """The number of micro-batches of each step, and repeating a step in more of them if memory runs out.

    Creating it is a collective call: rank 0 reads env.json.
    """

    def __init__(self, config: Config, context: RunContext, model: nn.Module) -> None:
        self._context, self._configured = context, config.train.grad_accum_steps
        self._least_images = least_images(config, context.world_size)
        found = context.run.read_json(ENV_FILE).get(_KEY) if context.rank == 0 else None
        pairs = found.items() if isinstance(found, dict) else ()
        self._changes = broadcast({int(key): n for key, n in pairs if key.isdecimal() and isinstance(n, int)})
        # Several ranks restart instead of repeating a step. By type, so that a copy is one operation.
        buffers = list(model.buffers()) if context.world_size == 1 else []
        by_type = [[b for b in buffers if b.is_floating_point() is real] for real in (True, False)]
        self._statistics = [each for each in by_type if each]
        self._kept = copy.deepcopy(self._statistics)

    @property
    def several(self) -> bool:
        """Whether there are steps with more than one micro-batch."""
        return max([self._configured, *self._changes.values()]) > 1

    def count(self, step: int, global_size: int) -> int:
        """Return the number of micro-batches of a step on `global_size` images of all ranks, the same on every rank."""
        wanted = [self._configured, *(count for first, count in self._changes.items() if first <= step)]
        return min(max(wanted), self._most(global_size))

    def _most(self, global_size: int) -> int:
        return max(1, global_size // self._context.world_size // self._least_images)

    def keep_statistics(self) -> None:
        """Keep BatchNorm's running statistics as they are before a step, which may be repeated."""
        for kept, current in zip(self._kept, self._statistics, strict=True):
            torch._foreach_copy_(kept, current)

    def repeated_by(self, step: int) -> bool:
        """Return whether a step has run out of memory, up to `step`: from there on there is no CUDA graph."""
        return any(first <= step for first in self._changes)

    def halve(self, step: int, global_size: int, *, captured: bool = False) -> None:
        """Record that a step ran out of memory on this rank, and prepare to repeat it in twice as many micro-batches.

        A step that was `captured` as a CUDA graph is repeated as it is, without the graph's memory. Nothing may refer
        to the memory of the step any more.

        Raises:
            OutOfMemory: micro-batches cannot be smaller.
            SmallerMicroBatches: there are several ranks, which restart from their last checkpoint: others may be
                waiting for this one in a collective operation.
        """
        context, count, first = self._context, self.count(step, global_size), not self.several
        where = f"rank {context.rank} ran out of memory at step {step}"
        if not captured and count == self._most(global_size):
            raise OutOfMemory(
                f"{where}, with the smallest possible micro-batch\n"
                "  lower model.growth_rate, model.num_layers or data.image_size, or set train.precision=bf16"
            )
        self._changes[step] = count if captured else 2 * count
        with context.status.during("save"):  # slow storage is not a hang
            context.run.guard()
            # Several ranks may run out of memory at a time: they write the same.
            context.run.update_json(ENV_FILE, **{_KEY: self._changes})
        text = f"{where}: from there on, " + (
            "there is no CUDA graph" if captured else f"each worker computes its share in {2 * count} micro-batches"
        )
        if context.world_size > 1:
            remedy = f"resume the run from its last checkpoint with --resume {context.run.uri}"
            raise SmallerMicroBatches(f"{text}\n  {remedy}")
        note = "\n  gradients are those of the whole batch; BatchNorm uses the statistics of each micro-batch"
        context.warn(text + note * (first and not captured))
        for kept, current in zip(self._kept, self._statistics, strict=True):
            torch._foreach_copy_(current, kept)
        free_memory()

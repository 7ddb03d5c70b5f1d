"""The parts in which a rank computes its share of a batch: as configured, and twice as many when memory runs out."""

from __future__ import annotations

import json
from typing import Final

from densenet_dist.errors import EnvironmentProblem, OutOfMemory
from densenet_dist.run_folder import ENV_FILE
from densenet_dist.schema import Config
from densenet_dist.train.checks import least_images
from densenet_dist.train.context import RunContext
from densenet_dist.train.ranks import broadcast

NUM_PARTS: Final = "grad_accum_steps"
"""The key of env.json for the numbers of parts that memory required, by the first step of each."""


class MicroBatches:
    """The number of parts of each step. Creating it is a collective call: rank 0 reads env.json."""

    def __init__(self, config: Config, context: RunContext) -> None:
        self._context, self._configured = context, config.train.grad_accum_steps
        self._least_images = least_images(config, context.world_size)
        found = context.run.read_json(ENV_FILE).get(NUM_PARTS) if context.rank == 0 else None
        pairs = found.items() if isinstance(found, dict) else ()
        self._changes = broadcast({int(key): n for key, n in pairs if key.isdecimal() and isinstance(n, int)})

    @property
    def several(self) -> bool:
        """Whether there are steps with more than one part."""
        return max([self._configured, *self._changes.values()]) > 1

    def count(self, step: int, global_size: int) -> int:
        """Return the number of parts of a step on `global_size` images of all ranks, the same on every rank."""
        wanted = [self._configured, *(parts for first, parts in self._changes.items() if first <= step)]
        return min(max(wanted), self._most(global_size))

    def _most(self, global_size: int) -> int:
        return max(1, global_size // self._context.world_size // self._least_images)

    def halve(self, step: int, global_size: int) -> None:
        """Record that a step ran out of memory on this rank, and double the number of parts from there on.

        Raises:
            EnvironmentProblem: a part cannot be smaller.
            OutOfMemory: there are several ranks, which restart from their last checkpoint: others may be waiting for
                this one in a collective operation.
        """
        context, parts, first = self._context, self.count(step, global_size), not self._changes
        where = f"rank {context.rank} is out of memory in step {step}"
        if parts == self._most(global_size):
            raise EnvironmentProblem(
                f"{where}, with the smallest possible part of a batch\n"
                "  lower model.growth_rate, model.num_layers or data.image_size, or set train.precision=bf16"
            )
        self._changes[step] = 2 * parts
        with context.status.during("save"):  # slow storage is not a hang
            context.run.guard()
            # Several ranks may run out of memory at a time: they write the same.
            environment = context.run.read_json(ENV_FILE) | {NUM_PARTS: self._changes}
            context.run.write(ENV_FILE, json.dumps(environment, indent=1) + "\n")
        text = f"{where}: from there on, each worker computes its share in {2 * parts} parts"
        if context.world_size > 1:
            raise OutOfMemory(f"{text}\n  resume the run from its last checkpoint with --resume {context.run.uri}")
        note = "\n  gradients are those of the whole batch; BatchNorm uses the statistics of each part"
        context.warn(text + note * first)

"""What a run decides by measurement: once, by rank 0, the same for all ranks and after a restart."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch.distributed as dist

from densenet_dist.run_folder import ENV_FILE
from densenet_dist.train.context import RunContext

CHOICES: Final = {
    "loader": ("data.",),
    "block": ("data.", "model.", "train.global_batch_size", "train.grad_accum_steps", "train.precision"),
}
"""The keys under which env.json holds choices, and the settings that each depends on.

A resumed run keeps its choices, because the alternatives differ in the last bits of their results.
"""


class Choice(NamedTuple):
    """What was chosen, why (in a few words), and the figures that were measured."""

    name: str
    reason: str
    figures: dict[str, float]


def measured_choice(context: RunContext, key: str, names: tuple[str, ...], measure: Callable[[], Choice]) -> str:
    """Return the name that env.json records under `key` for this type of device, or that `measure` finds.

    Records of anything but `names` are damaged, and measured again.

    A collective call; rank 0 alone measures, reports the result and records it.
    """
    name: list[Any] = [None]
    if context.rank == 0:
        recorded = context.run.read_json(ENV_FILE).get(key)
        if isinstance(recorded, dict) and recorded.get("device") == context.device.type:
            name[0] = recorded.get("name")
        if name[0] not in names:
            choice = measure()
            name[0] = choice.name
            record = {"name": choice.name, "device": context.device.type, "reason": choice.reason, **choice.figures}
            context.run.write(ENV_FILE, json.dumps(context.run.read_json(ENV_FILE) | {key: record}, indent=1) + "\n")
            context.report({"kind": "note", "text": f"{key}: {choice.name} ({choice.reason})"})
    if dist.is_initialized():
        dist.broadcast_object_list(name, src=0)
    return str(name[0])

"""The context of a training process: rank, device, run folder, and where to report events.

The training loop does not depend on Ray: `densenet_dist.cluster` subclasses `RunContext` for workers of Ray Train.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeAlias
from uuid import uuid4

import torch
import torch.distributed as dist

from densenet_dist.errors import ConfigError, EnvironmentProblem
from densenet_dist.run_folder import RunFolder
from densenet_dist.train.control import WorkerStatus

Event: TypeAlias = dict[str, Any]
"""An event as plain values: ``kind`` (start, progress, epoch, phase, note, end) and the keys of that kind.

A note has ``text``, and ``warning`` is true if it is a warning."""


class Stopped(BaseException):
    """Raised when a run stops on request; everything is saved, except after `StopRequest.LEAVE`."""


@dataclass(frozen=True)
class RunContext:
    """One rank of a run.

    Attributes:
        run: the run's folder; every rank reads it, rank 0 writes.
        listener: called with rank 0's events.
        sync_each_epoch: whether an epoch's checkpoint must be complete before its event is reported.
        launch: identifies one start of the command; ``launched`` is its time, see `Goodput`.
        status: what this rank is doing, and the pending stop request.
    """

    run: RunFolder
    device: torch.device
    rank: int = 0
    world_size: int = 1
    listener: Callable[[Event], None] | None = None
    sync_each_epoch: bool = False
    launch: str = ""
    launched: float | None = None
    status: WorkerStatus = field(default_factory=WorkerStatus)

    def report(self, event: Event) -> None:
        """Report an event. Every rank calls it for ``epoch`` events, rank 0 alone for others."""
        if self.listener is not None and self.rank == 0:
            self.listener(event)

    def note(self, text: str, warning: bool = False) -> None:
        """Show a message to the user, if this is rank 0."""
        self.report({"kind": "note", "text": text} | ({"warning": True} if warning else {}))

    def warn(self, text: str) -> None:
        """Show a warning to the user, if this is rank 0."""
        self.note(text, warning=True)


def torchrun_context(
    run: RunFolder, device: str, listener: Callable[[Event], None] | None, timeout_s: float
) -> RunContext:
    """Join the process group described by the environment (RANK, WORLD_SIZE, ...), if any."""
    rank, world_size = torchrun_rank()
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)) if world_size > 1 else 0)
    if world_size > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        if chosen.type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=chosen)
        else:
            dist.init_process_group("gloo", timeout=timeout)  # takes no device_id
    return RunContext(run, chosen, rank, world_size, listener, launch=uuid4().hex)


def torchrun_rank() -> tuple[int, int]:
    """Read rank and world size from the environment: (0, 1) if neither is set.

    Raises:
        EnvironmentProblem: the variables that ``torchrun`` sets are incomplete or contradictory.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ.get(name, "") for name in names}
    if not given["RANK"] and not given["WORLD_SIZE"]:
        return 0, 1
    rank, world_size, port = (int(given[key]) if given[key].isdecimal() else -1 for key in (*names[:2], names[3]))
    if 0 <= rank < world_size and (world_size == 1 or (given["MASTER_ADDR"] and 0 < port < 2**16)):
        return rank, world_size
    raise EnvironmentProblem(
        f"the environment does not describe one of several processes: {given}\n"
        f"  start them with torchrun, which sets all of these; for one process alone: unset {' '.join(names)}"
    )


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        EnvironmentProblem: a GPU is requested, and there is none.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={wanted!r}: choose auto, cpu or cuda; CUDA_VISIBLE_DEVICES selects a GPU")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "cluster.device=cuda, but torch sees no GPU on this machine\n"
            "  use the CPU with cluster.device=cpu (or --device cpu), or run 'densenet-dist doctor' to see why"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise EnvironmentProblem(
            f"there is no GPU for process {local_rank} of this machine, which has {torch.cuda.device_count()}\n"
            "  start fewer processes (torchrun --nproc-per-node), or use cluster.device=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device

"""What the training loop knows of the world: its rank, its device, its folder, and whom to tell.

The loop never sees Ray: it is given a `RunContext`. `LocalContext` serves one process or the ranks that ``torchrun``
started; the one for Ray Train is in `densenet_dist.cluster`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from densenet_dist.errors import EnvironmentProblem
from densenet_dist.run_folder import RunFolder
from densenet_dist.train.control import Goodput, WorkerStatus

Event: TypeAlias = dict[str, Any]
"""Something that happened, as plain values: ``kind`` (start, progress, epoch, phase, note, end) and what belongs to it.

A note is ``text``, and ``warning`` (true) where something is not as it should be."""


class Stopped(BaseException):
    """Raised on every rank when the run is to end here, as it was asked to: all that is to be kept is saved."""


@dataclass(frozen=True)
class RunContext:
    """What the loop is given.

    Attributes:
        run: the run's folder, checkpoints included; every rank can read it, rank 0 writes.
        device: where this process computes.
        rank: this process' number, from 0.
        world_size: how many processes train together.
        sync_each_epoch: whether the checkpoint that an epoch's event names must be complete by then.
        launch: what tells one start of the command from another, and `launched` when that was; see `Goodput`.
        status: what this rank is doing, and what is asked of it.
        goodput: what the run's time went to; rank 0's counts.
    """

    run: RunFolder
    device: torch.device
    rank: int = 0
    world_size: int = 1
    sync_each_epoch: bool = False
    launch: str = ""
    launched: float | None = None
    status: WorkerStatus = field(default_factory=WorkerStatus)
    goodput: Goodput = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "goodput", Goodput(self.status, self.launch, self.launched, self.world_size))

    def report(self, event: Event) -> None:
        """Tell whoever watches the run. For ``epoch`` events every rank calls it, for others rank 0 alone."""
        raise NotImplementedError


@dataclass(frozen=True)
class LocalContext(RunContext):
    """One process, or one of the ranks that ``torchrun`` started; events go to `listener` on rank 0."""

    listener: Callable[[Event], None] | None = None

    def report(self, event: Event) -> None:
        """Hand the event to the listener at once."""
        if self.listener is not None and self.rank == 0:
            self.listener(event)

    @classmethod
    def from_environment(
        cls,
        run: RunFolder,
        device: str = "auto",
        listener: Callable[[Event], None] | None = None,
        timeout_s: float = 600,
    ) -> LocalContext:
        """Join the process group that the environment describes (RANK, WORLD_SIZE, ...), if it does.

        Raises:
            EnvironmentProblem: where a GPU is asked for and there is none; as `torchrun_rank`.
        """
        rank, world_size = torchrun_rank()
        chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)) if world_size > 1 else 0)
        if world_size > 1 and not dist.is_initialized():
            timeout = timedelta(seconds=timeout_s)
            if chosen.type == "cuda":
                dist.init_process_group("nccl", timeout=timeout, device_id=chosen)
            else:
                dist.init_process_group("gloo", timeout=timeout)  # takes no device_id
        return cls(run, chosen, rank, world_size, listener=listener)


def torchrun_rank() -> tuple[int, int]:
    """Read this process' rank and the world size from the environment: (0, 1) where neither is set.

    Raises:
        EnvironmentProblem: what ``torchrun`` sets is there in part only, or makes no sense.
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
    """The device for this process: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        EnvironmentProblem: where a GPU is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "cluster.device=cuda, but torch sees no GPU on this machine\n"
            "  use the CPU with cluster.device=cpu (or --device cpu), or run 'densenet-dist doctor' to see why"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device

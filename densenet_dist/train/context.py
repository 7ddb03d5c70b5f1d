"""A rank of a run: its device and folder, what it is doing, requests to it, and where to report events.

The training loop does not depend on Ray: `densenet_dist.cluster` subclasses `RunContext` for workers of Ray Train.
Nothing here imports PyTorch before it is called, so that processes that only coordinate ranks stay small.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias
from uuid import uuid4

from densenet_dist.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    import torch

    from densenet_dist.run_folder import RunFolder

Event: TypeAlias = dict[str, Any]
"""An event as plain values: ``kind`` (start, progress, epoch, phase, note, end) and the keys of that kind.

A note has ``text``, and ``warning`` is true if it is a warning."""
Phase: TypeAlias = Literal["start", "wait", "train", "validate", "save", "test"]
"""wait: waiting for the next batch; train: the rest of a step; save: pausing for a checkpoint or waiting for it."""

_LOST_TO: Final = ("start", "wait", "validate", "save", "recovery", "test")
_IN_COLLECTIVE: Final = threading.Event()


@contextmanager
def collective() -> Iterator[None]:
    """Mark a collective operation outside of a training step, so that a rank waiting in it is not considered hung."""
    _IN_COLLECTIVE.set()
    try:
        yield
    finally:
        _IN_COLLECTIVE.clear()


class StopRequest(IntEnum):
    """A request to a run from outside. If several are pending, the greatest is carried out."""

    NONE = 0
    SAVE = 1
    """Save a checkpoint as soon as possible: this machine may be lost soon."""
    STOP = 2
    """Save a checkpoint, then stop."""
    ABANDON = 3
    """Stop at once and write nothing: the run's folder belongs to another job."""


class Stopped(BaseException):
    """Raised when a run stops on request; everything is saved, except after `StopRequest.ABANDON`."""


class WorkerStatus:
    """What one rank is doing. The rank's own thread writes it; any thread may read it, or call `request`.

    Attributes:
        phase: current phase.
        step: global steps completed.
        saved: checkpoints written.
        progress: number of steps and evaluated batches of this process; if it stays the same for long, the rank hangs.
        longest_idle_s: longest time between two increments of `progress`; the time before the first is not counted.
        requested: the pending request.
        eval_micro_batches: number of micro-batches of an evaluation batch, more than one if memory ran out.
        known_phases: phases in which `progress` has increased. The first step of each may compile or tune kernels.
    """

    def __init__(self) -> None:
        self.phase: Phase = "start"
        self.step = self.progress = self.saved = 0
        self.longest_idle_s = 0.0
        self.eval_micro_batches = 1
        self.requested = StopRequest.NONE
        self.known_phases: frozenset[Phase] = frozenset()
        self._entered = self._advanced = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def enter(self, phase: Phase) -> None:
        """Switch to another phase."""
        now = time.perf_counter()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self._entered
        self.phase, self._entered = phase, now

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Switch to a phase, and back at the end."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def advance(self, step: int | None = None) -> None:
        """Count a completed step (`step`: the number of global steps), or an evaluated batch."""
        now = time.perf_counter()
        if self.progress:
            self.longest_idle_s = max(self.longest_idle_s, now - self._advanced)
        self.step = self.step if step is None else step
        self.progress, self._advanced = self.progress + 1, now
        self.known_phases |= {self.phase}

    @property
    def idle_s(self) -> float:
        """Seconds since the last progress or change of phase."""
        return time.perf_counter() - max(self._advanced, self._entered)

    @property
    def waits_for_ranks(self) -> bool:
        """Whether this rank may be waiting for others: in the exchange of gradients, or in a `collective`."""
        return self.phase == "train" or _IN_COLLECTIVE.is_set()

    def request(self, request: StopRequest) -> None:
        """Make a request. Any thread or signal handler may call it."""
        self.requested = max(self.requested, request)

    def seconds(self) -> dict[str, float]:
        """Return the time spent in each phase so far."""
        spent = dict(self._seconds)
        spent[self.phase] = spent.get(self.phase, 0.0) + time.perf_counter() - self._entered
        return spent


class Goodput:
    """The share of a run's time spent in training steps that count, over all restarts, and what the rest was spent on.

    Steps lost with a process and the time until it is replaced count as ``recovery``. The time between the end of a
    process and ``--resume`` does not count.

    Args:
        status: status of rank 0.
        launch_id: identifies one start of the command; restarts within it have the same value.
        workers: number of ranks, each with its own device: a GPU, or a share of a CPU.
    """

    def __init__(self, status: WorkerStatus, launch_id: str = "", workers: int = 1) -> None:
        self._status, self._launch_id, self._workers = status, launch_id, workers
        self._device_seconds = 0.0  # device time up to the loaded checkpoint
        self._counted = 0.0  # seconds of the run that `_device_seconds` covers
        self._before: dict[str, float] = {}

    def seconds(self) -> dict[str, float]:
        """Return the time in each phase and in ``recovery`` since the run began."""
        now = self._status.seconds()
        return {name: self._before.get(name, 0.0) + now.get(name, 0.0) for name in ("train", *_LOST_TO)}

    def metrics(self) -> dict[str, float]:
        """Return ``goodput/ratio``, and other uses as shares of the time: ``goodput/lost_to_start`` and so on."""
        spent = self.seconds()
        total = max(sum(spent.values()), 1e-9)
        return {"goodput/ratio": spent["train"] / total} | {
            f"goodput/lost_to_{name}": spent[name] / total for name in _LOST_TO
        }

    @property
    def device_hours(self) -> float:
        """Hours for which devices were allocated, summed over all workers: GPU-hours if they have GPUs."""
        since = sum(self.seconds().values()) - self._counted
        return (self._device_seconds + since * self._workers) / 3600

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        seconds, devices = self.seconds(), self.device_hours * 3600
        return {"seconds": seconds, "device_seconds": devices, "launch": self._launch_id, "time": time.time()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint; after a restart by the same command, the time since then is recovery."""
        before = dict(state["seconds"])
        if state["launch"] == self._launch_id:
            before["recovery"] += max(0.0, time.time() - state["time"])
            before["start"] -= self._status.seconds().get("start", 0.0)  # part of recovery; `seconds` adds it again
        self._before = before
        self._counted = sum(state["seconds"].values())
        self._device_seconds = state.get("device_seconds", self._counted * self._workers)


@dataclass(frozen=True)
class RunContext:
    """One rank of a run.

    Attributes:
        run: the run's folder; every rank reads it, rank 0 writes.
        listener: called with rank 0's events.
        sync_each_epoch: whether an epoch's checkpoint must be complete before its event is reported.
        launch_id: identifies one start of the command, see `Goodput`.
        status: what this rank is doing, and the pending stop request.
    """

    run: RunFolder
    device: torch.device
    rank: int = 0
    world_size: int = 1
    listener: Callable[[Event], None] | None = None
    sync_each_epoch: bool = False
    launch_id: str = ""
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
    import torch.distributed as dist

    rank, world_size = torchrun_rank()
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)) if world_size > 1 else 0)
    if world_size > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        if chosen.type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=chosen)
        else:
            dist.init_process_group("gloo", timeout=timeout)  # takes no device_id
    return RunContext(run, chosen, rank, world_size, listener, launch_id=uuid4().hex)


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
    import torch

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
    # PyTorch reads it once per process, and a later run may set train.deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.cuda.set_device(device)
    return device

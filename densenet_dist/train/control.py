"""Stop requests, the status of a rank, and goodput, which other threads and processes may read or set."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, Final, Literal, TypeAlias

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
    LEAVE = 3
    """Stop at once and write nothing: the run's folder belongs to another job."""


class WorkerStatus:
    """What one rank is doing. The rank's own thread writes it; any thread may read it, or call `request`.

    Attributes:
        phase: current phase.
        step: global steps completed.
        saved: checkpoints written.
        progress: number of steps and evaluated batches of this process; if it stays the same for long, the rank hangs.
        longest_idle_s: longest time between two increments of `progress`; the time before the first is not counted.
        requested: the pending request.
        known_phases: phases in which `progress` has increased. The first step of each may compile or tune kernels.
    """

    def __init__(self) -> None:
        self.phase: Phase = "start"
        self.step = self.progress = self.saved = 0
        self.longest_idle_s = 0.0
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
        launch: identifies one start of the command; restarts within it have the same value.
        launched: Unix time of that start; None: now.
        workers: number of ranks, each with its own device: a GPU, or a share of a CPU.
    """

    def __init__(self, status: WorkerStatus, launch: str = "", launched: float | None = None, workers: int = 1) -> None:
        self._status, self._launch, self._workers = status, launch, workers
        self._device_seconds = self._counted = 0.0
        since_launch = 0.0 if launched is None else time.time() - launched - sum(status.seconds().values())
        self._before = {"start": max(0.0, since_launch)}

    def seconds(self) -> dict[str, float]:
        """Return the time in each phase and in ``recovery`` since the run began."""
        now = self._status.seconds()
        return {name: self._before.get(name, 0.0) + now.get(name, 0.0) for name in ("train", *_LOST_TO)}

    def figures(self) -> dict[str, float]:
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
        return {"seconds": seconds, "device_seconds": devices, "launch": self._launch, "time": time.time()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint; after a restart by the same command, the time since then is recovery."""
        before = dict(state["seconds"])
        if state["launch"] == self._launch:
            before["recovery"] += max(0.0, time.time() - state["time"])
            before["start"] -= self._status.seconds().get("start", 0.0)  # part of recovery; `seconds` adds it again
        else:
            before["start"] += self._before.get("start", 0.0)
        self._before = before
        self._counted = sum(state["seconds"].values())
        self._device_seconds = state.get("device_seconds", self._counted * self._workers)

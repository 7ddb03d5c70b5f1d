"""What a rank is doing, kept where other threads can see it: for watching it, for stopping it, and for goodput."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, Final, Literal, TypeAlias

Phase: TypeAlias = Literal["start", "wait", "train", "validate", "save", "test"]
"""wait: for the next batch; train: the rest of a step; save: the pause that a checkpoint costs."""

_LOSSES: Final = ("start", "wait", "validate", "save", "recovery", "test")


class Wish(IntEnum):
    """What is asked of a run from outside; of several, the greatest counts."""

    NOTHING = 0
    SAVE = 1
    """A checkpoint at the next occasion: this machine may soon be gone."""
    STOP = 2
    """A checkpoint, then the end."""
    LEAVE = 3
    """The end, at once: the run's folder belongs to another job."""


class Pulse:
    """What one rank is doing. The rank's own thread writes it, any other may read it and may `ask`.

    Attributes:
        phase: what it is doing now.
        step: global steps completed.
        saved: counts up with every checkpoint that is written.
        moves: counts up with every step and every batch that is evaluated; one that stands still for long hangs.
        longest: the longest time between two of them so far, in seconds, the first one of the process left out.
        wish: what it is asked for.
        known: the phases in which this process has moved: the first time in each it compiles, or measures kernels.
    """

    def __init__(self) -> None:
        self.phase: Phase = "start"
        self.step = self.moves = self.saved = 0
        self.longest = 0.0
        self.wish = Wish.NOTHING
        self.known: frozenset[Phase] = frozenset()
        self._since = self._moved = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def enter(self, phase: Phase) -> None:
        """Go over to another phase."""
        now = time.perf_counter()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self._since
        self.phase, self._since = phase, now

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Be in a phase meanwhile, then in the one before it again."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def moved(self, step: int | None = None) -> None:
        """A step is done (`step`: so many in all), or a batch of an evaluation."""
        now = time.perf_counter()
        if self.moves:
            self.longest = max(self.longest, now - self._moved)
        self.step = self.step if step is None else step
        self.moves, self._moved = self.moves + 1, now
        self.known |= {self.phase}

    @property
    def still(self) -> float:
        """Seconds since it last moved, or changed over to a phase of another kind."""
        return time.perf_counter() - max(self._moved, self._since)

    def ask(self, wish: Wish) -> None:
        """Ask for something; from any thread, or a signal handler."""
        self.wish = max(self.wish, wish)

    def seconds(self) -> dict[str, float]:
        """Time spent in each phase so far."""
        spent = dict(self._seconds)
        spent[self.phase] = spent.get(self.phase, 0.0) + time.perf_counter() - self._since
        return spent


class Goodput:
    """Which part of its time a run came forward, over all its restarts, and what the rest went to.

    What counts is time in steps whose work was kept. Steps that were lost with a process, and the time until it was
    replaced, are ``recovery``. The time between a run that ended and its ``--resume`` counts for nothing.

    Args:
        pulse: of rank 0.
        launch: what tells one start of the command from another; restarts within one have the same.
        launched: when that was, in seconds since the epoch; None for now.
        workers: that train together, each on a device of its own: a GPU, or its share of a CPU.
    """

    def __init__(self, pulse: Pulse, launch: str = "", launched: float | None = None, workers: int = 1) -> None:
        self._pulse, self._launch, self._workers = pulse, launch, workers
        self._device_seconds = self._counted = 0.0
        self._before = {} if launched is None else {"start": max(0.0, time.time() - launched)}

    def seconds(self) -> dict[str, float]:
        """Time by phase, ``recovery`` too, since the run's very beginning."""
        now = self._pulse.seconds()
        return {name: self._before.get(name, 0.0) + now.get(name, 0.0) for name in ("train", *_LOSSES)}

    @property
    def ratio(self) -> float:
        """Share of time that went into steps that count, 0 to 1."""
        spent = self.seconds()
        return spent["train"] / max(sum(spent.values()), 1e-9)

    def figures(self) -> dict[str, float]:
        """``goodput/ratio``, and each loss as a share of all time: ``goodput/lost_to_start`` and so on."""
        spent = self.seconds()
        total = max(sum(spent.values()), 1e-9)
        return {"goodput/ratio": spent["train"] / total} | {
            f"goodput/lost_to_{name}": spent[name] / total for name in _LOSSES
        }

    @property
    def device_hours(self) -> float:
        """Hours for which devices were held, those of all workers together: GPU-hours, where they have GPUs."""
        since = sum(self.seconds().values()) - self._counted
        return (self._device_seconds + since * self._workers) / 3600

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        seconds, devices = self.seconds(), self.device_hours * 3600
        return {"seconds": seconds, "device_seconds": devices, "launch": self._launch, "time": time.time()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up that of a checkpoint; where the same command goes on after a loss, all since then was recovery."""
        before = dict(state["seconds"])
        if state["launch"] == self._launch:
            before["recovery"] += max(0.0, time.time() - state["time"])
            before["start"] -= self._pulse.seconds().get("start", 0.0)  # a part of it, which the pulse will tell again
        else:
            before["start"] += self._before.get("start", 0.0)
        self._before = before
        self._counted = sum(state["seconds"].values())
        self._device_seconds = state.get("device_seconds", self._counted * self._workers)

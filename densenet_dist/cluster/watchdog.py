"""Finds workers that hang, by their heartbeats, and ends their processes, so that Ray Train starts them again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from densenet_dist.cluster.heartbeat import Heartbeat

if TYPE_CHECKING:
    from densenet_dist.train.context import Event

_FIRST_TIME_S: Final = 600.0
"""For what a process does for the first time: it may compile, or choose kernels by measuring them."""
_UNLIMITED: Final = ("start", "save")
"""Phases with time limits of their own: those of collective operations, and of the storage."""


@dataclass(frozen=True)
class Hung:
    """A worker that will not come forward by itself.

    Attributes:
        beat: its last one.
        silent_s: seconds since that; of a worker that does send beats, next to nothing.
    """

    beat: Heartbeat
    silent_s: float

    def __str__(self) -> str:
        beat = self.beat
        where = f" at {beat.where}" if beat.where else ""
        seconds = max(self.silent_s, beat.idle_s)
        what = "has not been heard of" if self.silent_s > beat.idle_s else f"stands still ({beat.phase}{where})"
        return f"rank {beat.rank} on {beat.host} {what} for {seconds:.0f} s after step {beat.step}"


@dataclass
class Heartbeats:
    """The last beat of every rank, and when it came, by the clock of this process alone.

    Args:
        clock: seconds from anywhere.
    """

    clock: Callable[[], float] = time.monotonic
    _last: dict[int, tuple[Heartbeat, float]] = field(default_factory=dict)
    _looked: float | None = None

    def record(self, beat: Heartbeat) -> None:
        """Take one that has just come."""
        self._last[beat.rank] = beat, self.clock()
        for rank in [rank for rank in self._last if rank >= beat.world_size]:
            del self._last[rank]  # of a larger world before

    @property
    def moving(self) -> bool:
        """Whether any worker has taken a step."""
        return any(beat.progress for beat, _ in self._last.values())

    def hung(self, timeout_s: float) -> list[Hung]:
        """The workers that hang, each told once; call it several times within `timeout_s`.

        A worker that stands still keeps all others waiting in the next collective operation. So those in one hang only
        if every rank stands still: then those that are in none are named, or where all are, those furthest behind.
        """
        now, before = self.clock(), self._looked
        self._looked = now
        if before is None or now - before > timeout_s / 2:  # it was this process that stood still
            self._last = {rank: (beat, now) for rank, (beat, _) in self._last.items()}
            return []
        silent = [Hung(beat, now - at) for beat, at in self._last.values() if now - at > timeout_s]
        still = [Hung(beat, now - at) for beat, at in self._last.values() if beat.idle_s > _limit(beat, timeout_s)]
        alone = [hung for hung in still if not hung.beat.waits_for_ranks]
        still = alone or (still if len(still) == len(self._last) else [])
        least = min((hung.beat.progress for hung in still), default=0)
        found = silent or [hung for hung in still if hung.beat.progress == least]
        for hung in found:
            del self._last[hung.beat.rank]
        return found


def _limit(beat: Heartbeat, timeout_s: float) -> float:
    if beat.phase in _UNLIMITED:
        return float("inf")
    return max(timeout_s, _FIRST_TIME_S if beat.longest_idle_s is None else 10 * beat.longest_idle_s)


@contextmanager
def watched(coordinator: Any, timeout_s: float, listener: Callable[[Event], None]) -> Iterator[None]:
    """Look for workers that hang, in a thread, and end them; the listener is told which, and where they were."""
    import ray

    end = threading.Event()

    def watch() -> None:
        with suppress(ray.exceptions.RayError):
            while not end.wait(min(2.0, timeout_s / 10)):
                for hung in ray.get(coordinator.hung.remote(timeout_s)):
                    if _killed(hung.beat):
                        text = f"{hung}: it is ended, and the run goes on without it"
                        listener({"kind": "note", "text": text, "warning": True})

    thread = threading.Thread(target=watch, name="watchdog")
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _killed(beat: Heartbeat) -> bool:
    """End the worker, on its node; False where there is no such process any more, or no such node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
    kill = ray.remote(num_cpus=0, max_retries=0)(kill_process).options(scheduling_strategy=there)
    try:
        return bool(ray.get(kill.remote(beat.pid, beat.started), timeout=30))
    except (ray.exceptions.RayError, TimeoutError):
        return False


def kill_process(pid: int, started: float) -> bool:
    """Kill a process of this machine, if it is the one that began then."""
    import psutil

    try:
        if abs(psutil.Process(pid).create_time() - started) > 0.1:
            return False
        os.kill(pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
    return True

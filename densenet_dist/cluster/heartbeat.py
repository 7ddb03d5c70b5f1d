"""Heartbeats: each worker sends its state about once a second and receives requests; workers that hang are found."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray

from densenet_dist.train.context import StopRequest

if TYPE_CHECKING:
    from densenet_dist.cluster.ray_train import RayContext

_FIRST_STEP_LIMIT_S: Final = 600.0
"""Idle limit of a phase in which this process has not completed anything yet: it may compile, or tune kernels."""
_PHASES_WITHOUT_LIMIT: Final = ("start", "save")
"""Phases without an idle limit: collective operations (start) and the storage (save) have timeouts of their own."""
_LAST_SAVE_S: Final = 10.0
"""Seconds before a preempted node's deadline at which a last checkpoint is requested; later steps are lost."""
_PACKAGE: Final = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Heartbeat:
    """The state of one worker, mostly from its `WorkerStatus`.

    Attributes:
        idle_s: seconds since the last progress.
        longest_idle_s: the longest such time so far; None until something has been completed in this phase.
        where: the line of this package that is being executed, if idle for long.
        waits_for_ranks: whether it may be waiting for other ranks in a collective operation.
    """

    rank: int
    world_size: int
    host: str
    step: int
    saved: int
    progress: int
    phase: str
    idle_s: float
    longest_idle_s: float | None
    where: str
    waits_for_ranks: bool


def is_hung(worker: Heartbeat, latest: Collection[Heartbeat], timeout_s: float) -> bool:
    """Return whether this worker itself hangs, rather than waiting for another worker that hangs.

    One hung worker blocks all others in their next collective operation. So idle workers outside of a collective
    operation are hung; if there are none and all ranks are idle, those with the least progress are.

    Args:
        worker: the heartbeat that just arrived.
        latest: the last heartbeats of all ranks.
        timeout_s: longest time without progress; ten times the longest step if that is more.
    """
    idle = [each for each in latest if each.idle_s > _idle_limit(each, timeout_s)]
    outside = [each for each in idle if not each.waits_for_ranks]
    hung = outside or (idle if len(idle) == worker.world_size else [])
    return worker in hung and worker.progress == min(each.progress for each in hung)


def _idle_limit(worker: Heartbeat, timeout_s: float) -> float:
    if worker.phase in _PHASES_WITHOUT_LIMIT:
        return math.inf
    return max(timeout_s, _FIRST_STEP_LIMIT_S if worker.longest_idle_s is None else 10 * worker.longest_idle_s)


def heartbeat_interval(world_size: int) -> float:
    """Return the seconds between a worker's heartbeats: from 64 workers on, all together send 64 per second."""
    return max(1.0, world_size / 64)


@contextmanager
def heartbeats(context: RayContext) -> Iterator[None]:
    """Send heartbeats from a thread, and pass the requests received in return to the training loop.

    A worker that the coordinator considers hung kills its own process, so that Ray Train restarts the workers.
    """
    status, end, training_thread = context.status, threading.Event(), threading.get_ident()
    # Rank 0 keeps the short interval, since it also looks for preemption notices.
    interval_s = heartbeat_interval(context.world_size if context.rank else 1)
    notices = _preemption_notices()

    def heartbeat() -> Heartbeat:
        known = status.phase in status.known_phases or (status.phase == "wait" and status.progress)
        return Heartbeat(
            rank=context.rank,
            world_size=context.world_size,
            host=os.uname().nodename,
            step=status.step,
            saved=status.saved,
            progress=status.progress,
            phase=status.phase,
            idle_s=status.idle_s,
            longest_idle_s=status.longest_idle_s if known else None,
            where=_current_line(training_thread) if status.idle_s > 5 else "",
            waits_for_ranks=status.waits_for_ranks,
        )

    def send() -> None:
        sent = time.monotonic()
        with suppress(ray.exceptions.RayError):  # without a driver, Ray ends this process
            while not end.wait(interval_s):
                before, sent = sent, time.monotonic()
                if sent - before > 5 * interval_s:
                    continue  # the whole process was stopped (SIGSTOP), which does not mean that training hangs
                request: StopRequest | None = ray.get(context.coordinator.heartbeat.remote(heartbeat()))
                if request is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                    return
                status.request(request)
                if context.rank == 0 and next(notices):
                    status.request(StopRequest.SAVE)

    thread = threading.Thread(target=send, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _current_line(thread: int) -> str:
    """Return file and line of the innermost frame of a thread that belongs to this package."""
    frame = sys._current_frames().get(thread)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _preemption_notices() -> Iterator[bool]:
    """Yield whether to save now, because Ray has announced that a node of this run will be lost (spot notice, drain).

    True on a new announcement, and when its deadline is near.
    """
    known: Any = None
    save_again_at = math.inf
    while True:
        new: Any = None
        with suppress(Exception):  # a private interface: without it, an announced loss is like any other
            # Ray's public function is a barrier of all workers; each worker has the information already.
            from ray.train.v2._internal.execution.context import get_train_context

            new = get_train_context().preemption_context.preemption_info
        if new is not None and new != known:
            known = new
            save_again_at = math.inf if new.deadline_ms is None else new.deadline_ms / 1000 - _LAST_SAVE_S
            yield True
        elif time.time() >= save_again_at:
            save_again_at = math.inf
            yield True
        else:
            yield False

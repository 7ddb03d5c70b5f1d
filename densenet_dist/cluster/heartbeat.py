"""What every worker tells the driver about once a second while it trains, and what is requested of it in return."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from densenet_dist.train.control import StopRequest

if TYPE_CHECKING:
    from densenet_dist.train.context import RunContext

_EVERY_S: Final = 1.0
_WORLD_OF_ONE_SECOND: Final = 64  # a larger world sends less often, so that the coordinator hears as much
_LAST_SAVE_S: Final = 10.0
"""How long before a node is taken away the last checkpoint is saved: the steps after it are lost."""
_PACKAGE: Final = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Heartbeat:
    """The state of one worker.

    Attributes:
        node: Ray's id of its node, and ``host`` its name.
        pid: its process there, and ``started`` when that began, in seconds since the epoch: numbers are used again.
        step: global steps completed.
        saved: checkpoints written.
        progress: steps and evaluated batches of this process.
        phase: what it is doing.
        idle_s: seconds since its last progress.
        longest_idle_s: the longest such time so far; None where it does something for the first time.
        where: the line of this package that it is in, where it has been idle for long.
        waits_for_ranks: whether it may be waiting for other ranks, in a collective operation.
    """

    rank: int
    world_size: int
    node: str
    host: str
    pid: int
    started: float
    step: int
    saved: int
    progress: int
    phase: str
    idle_s: float
    longest_idle_s: float | None
    where: str
    waits_for_ranks: bool


@contextmanager
def heartbeats(context: RunContext, coordinator: Any) -> Iterator[None]:
    """Send heartbeats from a thread, and pass on to the training loop what is requested in return."""
    import psutil
    import ray

    end, training_thread = threading.Event(), threading.get_ident()
    every_s = _EVERY_S * max(1.0, context.world_size / _WORLD_OF_ONE_SECOND)
    node, started = ray.get_runtime_context().get_node_id(), psutil.Process().create_time()
    notices = _SpotNotices()

    def heartbeat() -> Heartbeat:
        status = context.status
        known = status.phase in status.known_phases or (status.phase == "wait" and status.progress)
        return Heartbeat(
            rank=context.rank,
            world_size=context.world_size,
            node=node,
            host=os.uname().nodename,
            pid=os.getpid(),
            started=started,
            step=status.step,
            saved=status.saved,
            progress=status.progress,
            phase=status.phase,
            idle_s=status.idle_s,
            longest_idle_s=status.longest_idle_s if known else None,
            where=_line_of(training_thread) if status.idle_s > 5 else "",
            waits_for_ranks=status.waits_for_ranks,
        )

    def send() -> None:
        with suppress(ray.exceptions.RayError):  # without a driver, Ray ends this process
            while not end.wait(every_s):
                request: StopRequest = ray.get(coordinator.heartbeat.remote(heartbeat()))
                if context.rank == 0 and notices.save_now():
                    request = max(request, StopRequest.SAVE)
                context.status.request(request)

    thread = threading.Thread(target=send, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _line_of(thread: int) -> str:
    """The innermost line of this package that a thread is in."""
    frame = sys._current_frames().get(thread)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class _SpotNotices:
    """When to save, because Ray has announced that a node of this run will be taken away (a spot notice, a drain)."""

    def __init__(self) -> None:
        self._known: Any = None
        self._again_at = math.inf

    def save_now(self) -> bool:
        """Whether there is a new announcement, or the node of an earlier one is about to go."""
        with suppress(Exception):  # not public: without it a node that leaves is like one that is lost
            # Ray's public function is a barrier of all workers; what it would tell them is in each worker already.
            from ray.train.v2._internal.execution.context import get_train_context

            info = get_train_context().preemption_context.preemption_info
            if info is not None and info != self._known:
                self._known = info
                self._again_at = math.inf if info.deadline_ms is None else info.deadline_ms / 1000 - _LAST_SAVE_S
                return True
        if time.time() < self._again_at:
            return False
        self._again_at = math.inf
        return True

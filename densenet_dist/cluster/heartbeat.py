"""What every worker tells the driver about once a second while it trains, and what it is asked for in return."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from densenet_dist.train.control import StopRequest, WorkerStatus

if TYPE_CHECKING:
    from densenet_dist.train.context import RunContext

_EVERY_S: Final = 1.0
_WORLD_OF_ONE_SECOND: Final = 64  # a larger world beats less often, so that the coordinator hears as much
_PACKAGE: Final = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Heartbeat:
    """The state of one worker.

    Attributes:
        node: Ray's id of its node, and ``host`` its name.
        pid: its process there, and ``born`` when that began, in seconds since the epoch: numbers are used again.
        step: global steps completed.
        saved: checkpoints written.
        moves: steps and evaluated batches of this process.
        phase: what it is doing.
        still_s: seconds since it last moved.
        usual_s: the longest that it ever stood still before, None as long as it has not done before what it does now.
        where: the line of this package that it is in, where it has stood still for long.
    """

    rank: int
    world_size: int
    node: str
    host: str
    pid: int
    born: float
    step: int
    saved: int
    moves: int
    phase: str
    still_s: float
    usual_s: float | None
    where: str


@contextmanager
def beating(context: RunContext, coordinator: Any) -> Iterator[None]:
    """Send beats meanwhile, from a thread, and pass on to the loop what is asked for in return."""
    end, trains = threading.Event(), threading.get_ident()
    every_s = _EVERY_S * max(1.0, context.world_size / _WORLD_OF_ONE_SECOND)

    def beat() -> None:
        import ray

        with suppress(ray.exceptions.RayError):  # without a coordinator there is no driver, and Ray ends this process
            who = _identity(context)
            while not end.wait(every_s):
                request: StopRequest = ray.get(coordinator.heartbeat.remote(_beat(context.status, who, trains)))
                if context.rank == 0 and _node_is_leaving(preempted):
                    request = max(request, StopRequest.SAVE)
                context.status.request(request)

    preempted: list[Any] = [None]
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _identity(context: RunContext) -> dict[str, Any]:
    import psutil
    import ray

    return {
        "rank": context.rank,
        "world_size": context.world_size,
        "node": ray.get_runtime_context().get_node_id(),
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
    }


def _beat(status: WorkerStatus, who: dict[str, Any], thread: int) -> Heartbeat:
    still = status.idle_s
    known = status.phase in status.known_phases or (status.phase == "wait" and status.progress > 0)
    return Heartbeat(
        **who,
        step=status.step,
        saved=status.saved,
        moves=status.progress,
        phase=status.phase,
        still_s=still,
        usual_s=status.longest_idle_s if known else None,
        where=_line_of(thread) if still > 5 else "",
    )


def _line_of(thread: int) -> str:
    """The innermost line of this package that a thread is in."""
    frame = sys._current_frames().get(thread)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _node_is_leaving(seen: list[Any]) -> bool:
    """Whether Ray has heard, since the last call, that a node of this run will be taken away (a spot notice, a drain).

    Its public function is a barrier of all workers; what it would tell them lies in each worker already.
    """
    with suppress(Exception):  # not public: without it a node that leaves is like one that is lost
        from ray.train.v2._internal.execution.context import get_train_context

        info = get_train_context().preemption_context.preemption_info
        if info is not None and info != seen[0]:
            seen[0] = info
            return True
    return False

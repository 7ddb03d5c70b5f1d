"""The actor between a run on Ray and the process that started it: events one way, requests the other."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import ray

from densenet_dist.cluster.heartbeat import is_hung
from densenet_dist.train.context import StopRequest

if TYPE_CHECKING:  # torch would make the actor's process several times as large
    from densenet_dist.cluster.heartbeat import Heartbeat
    from densenet_dist.train.context import Event

_LAST_EVENT: Final = {"kind": "last"}
"""Tells the driver's thread that there are no more events."""


class Coordinator:
    """Passes events and heartbeats to the driver, requests and answers to the workers.

    Asynchronous, so that the driver can wait inside a call: polling would cost time on a machine whose cores all train.
    If its process is lost, Ray restarts it without its state and repeats pending calls, so a call that waits must get
    everything it needs as arguments.
    """

    def __init__(self, hang_timeout_s: float) -> None:
        self._hang_timeout_s = hang_timeout_s
        self._events: list[Event] = []
        self._has_events = asyncio.Event()
        self._controller: Any = None
        self._answers: dict[int, asyncio.Future[bool]] = {}
        self._heartbeats: dict[int, Heartbeat] = {}
        self._has_heartbeats = asyncio.Event()
        self._request = StopRequest.NONE
        self._saved = 0
        self._ended = asyncio.Event()

    async def put(self, event: Event) -> None:
        """Pass an event of rank 0, or a note of the controller, to the driver."""
        if event["kind"] == "progress" and self._events and self._events[-1]["kind"] == "progress":
            self._events.pop()  # only the newest progress matters
        if event["kind"] == "end":
            self._ended.set()
        self._events.append(event)
        self._has_events.set()

    async def drain(self) -> list[Event]:
        """Wait for events, and return those since the last call."""
        await self._has_events.wait()
        self._has_events.clear()
        events, self._events = self._events, []
        return events

    async def heartbeat(self, heartbeat: Heartbeat) -> StopRequest | None:
        """Record the state of a worker; return the request to it, or None if it hangs and must exit."""
        self._heartbeats[heartbeat.rank] = heartbeat
        for rank in [rank for rank in self._heartbeats if rank >= heartbeat.world_size]:
            del self._heartbeats[rank]  # of an earlier, larger world
        self._has_heartbeats.set()
        if is_hung(heartbeat, self._heartbeats.values(), self._hang_timeout_s):
            where = f"{heartbeat.phase} at {heartbeat.where}" if heartbeat.where else heartbeat.phase
            await self.warn(heartbeat.rank, f"made no progress for {heartbeat.idle_s:.0f} s ({where}), and is killed")
            return None
        if heartbeat.rank == 0:
            self._saved = heartbeat.saved
            if self._request is StopRequest.SAVE:
                self._request = StopRequest.NONE  # it is for one checkpoint
                return StopRequest.SAVE
        return StopRequest.NONE if self._request is StopRequest.SAVE else self._request

    async def warn(self, rank: int, text: str) -> None:
        """Pass a warning about a worker to the driver."""
        last = self._heartbeats.get(rank)
        worker = f"rank {rank} on {last.host}, after step {last.step}," if last else f"rank {rank}"
        await self.put({"kind": "note", "text": f"{worker} {text}", "warning": True})

    async def request(self, request: StopRequest) -> bool:
        """Make a request to the workers; return whether they have begun to train."""
        self._request = max(self._request, request)
        return any(heartbeat.progress for heartbeat in self._heartbeats.values())

    async def save(self) -> None:
        """Request a checkpoint and wait for it."""
        if await self.request(StopRequest.SAVE):
            while self._request is StopRequest.SAVE:  # delivered with a heartbeat, which also updates `_saved`
                await asyncio.sleep(0.1)
            before = self._saved
            while self._saved == before:
                await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """Request a checkpoint and a stop, and wait until rank 0 has ended; before the first step, return at once."""
        if ray.get_runtime_context().was_current_actor_reconstructed:
            await self._has_heartbeats.wait()  # to know whether the workers have begun to train
        if await self.request(StopRequest.STOP):
            await self._ended.wait()

    async def set_ended(self) -> None:
        """Record that rank 0 has stopped as requested."""
        self._ended.set()

    async def report_epoch(self, global_step: int, event: Event | None) -> bool:
        """Return the driver's decision after an epoch: whether to continue. Rank 0 passes the epoch's event."""
        if event is not None:
            await self.put(event)
        return await asyncio.shield(self._answer_to(global_step))

    async def answer(self, global_step: int, proceed: bool) -> None:
        """Set the driver's decision for the epoch that ended at a step."""
        answer = self._answer_to(global_step)
        if not answer.done():
            answer.set_result(proceed)

    def _answer_to(self, global_step: int) -> asyncio.Future[bool]:
        return self._answers.setdefault(global_step, asyncio.get_running_loop().create_future())

    async def set_controller(self, controller: Any) -> None:
        """Remember Ray Train's controller of the run."""
        self._controller = controller

    async def controller(self) -> Any:
        """Return Ray Train's controller; None before it has started."""
        return self._controller


def on_this_node(kind: type) -> Any:
    """Return an actor class that runs on the driver's node, and is restarted for as long as that node lives."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, label_selector=here)(kind)


@dataclass
class EpochBarrier:
    """Makes a run wait for its driver at the end of every epoch.

    Attributes:
        on_event: called with every event, in a thread of its own; after an epoch, returns whether to continue.
        placements: the actor that records the placement groups of each trial's workers (`SweepState`).
        owner: the name of the trial.
        held: the lease of the sweep, see `densenet_dist.lease.fence`.
        coordinator: the run's `Coordinator`; None until the run has started.
    """

    on_event: Callable[[Event], bool]
    placements: Any
    owner: str
    held: tuple[str, str]
    coordinator: Any = None
    _answered: tuple[int, bool] | None = None

    def __call__(self, event: Event) -> None:
        """Handle an event."""
        if event["kind"] != "epoch":
            self.on_event(event)
            return
        step = event["global_step"]
        if self._answered is None or step != self._answered[0]:  # a restarted coordinator asks again
            self._answered = step, self.on_event(event)
        self.coordinator.answer.remote(*self._answered)

    def abort(self, timeout_s: float) -> None:
        """End the run at any point and release its workers."""
        if self.coordinator is not None:
            with suppress(ray.exceptions.RayError):
                controller = ray.get(self.coordinator.controller.remote(), timeout=timeout_s)
                if controller is not None:
                    ray.get(controller.abort.remote(), timeout=timeout_s)


@contextmanager
def forwarded_events(coordinator: Any, listener: Callable[[Event], None]) -> Iterator[None]:
    """Call the listener with each event, in a thread; remaining events are passed on before the context ends.

    An exception of the listener stops the run, and is raised at the end of the context.
    """
    errors: list[Exception] = []

    def forward() -> None:
        try:
            while True:
                for event in ray.get(coordinator.drain.remote()):
                    if event == _LAST_EVENT:
                        return
                    listener(event)
        except ray.exceptions.RayError:
            pass
        except Exception as error:  # of the listener: it ends the run, as it does without Ray
            errors.append(error)
            coordinator.request.remote(StopRequest.STOP)

    thread = threading.Thread(target=forward, name="events")
    thread.start()
    try:
        yield
    finally:
        coordinator.put.remote(_LAST_EVENT)
        thread.join()  # before ray.shutdown(): its next ray.get would start a new cluster
        if errors:
            raise errors[0]


def explain_crash(error: Any, owner: str) -> str:
    """Describe in one line, without Ray's wrapping, why the owner's process ended.

    Args:
        error: an exception raised by Ray, or the text of one; None if the cause is unknown.
        owner: such as "the trial".
    """
    if not error:
        return f"{owner}'s process was lost"
    name, text = type(error).__name__, str(getattr(error, "cause", None) or error).strip()
    # Ray's memory monitor; PyTorch's error for the memory of a GPU has the same name.
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "running low on memory" in text:
        fix = "use smaller batches, or run fewer workers or trials at a time"
        return f"out of memory: the node had none left, and Ray killed {owner}'s process; {fix}"
    if found := re.search(r"health check has been hanging for ([\d.]+)", text):
        return f"{owner}'s process did not respond for {float(found[1]):.0f} s"
    if "ActorDied" in name or "actor died" in text.lower() or "died unexpectedly" in text:
        return f"{owner}'s process was lost (killed, or its node is gone)"
    # A traceback ends with the error, which may have indented hints below it.
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(" ")]
    cause = re.sub(r"^densenet_dist\.errors\.\w+: ", "", lines[-1]) if lines else name
    return re.sub(r"\s+", " ", cause)[:300]

"""The actor between a run on Ray and the process that started it: events one way, requests the other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from densenet_dist.cluster.watchdog import Heartbeats, Hung
from densenet_dist.train.control import StopRequest

if TYPE_CHECKING:  # torch would make this process several times as large
    from densenet_dist.cluster.heartbeat import Heartbeat
    from densenet_dist.train.context import Event


class Coordinator:
    """Carries events and heartbeats to the driver, requests and answers to the workers.

    Asynchronous, so that the driver can wait in it: on a machine whose every core trains, polling is felt. Where its
    process is lost, Ray starts it again and repeats the calls under way; so calls that wait bring all they wait for.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._news = asyncio.Event()
        self._controller: Any = None
        self._answers: dict[int, asyncio.Future[bool]] = {}
        self._heartbeats = Heartbeats()
        self._heard = asyncio.Event()
        self._request = StopRequest.NONE
        self._saved = 0
        self._left = asyncio.Event()

    async def put(self, event: Event) -> None:
        """Pass an event of rank 0, or a note of the controller, to the driver."""
        if event["kind"] == "progress" and self._events and self._events[-1]["kind"] == "progress":
            self._events.pop()  # nobody has looked at the last one yet: only the newest matters
        if event["kind"] == "end":
            self._left.set()
        self._events.append(event)
        self._news.set()

    async def drain(self) -> list[Event]:
        """Return the events since the last call; waits until there is one, or `wake` is called."""
        await self._news.wait()
        self._news.clear()
        events, self._events = self._events, []
        return events

    async def wake(self) -> None:
        """End the waiting in `drain`."""
        self._news.set()

    async def heartbeat(self, heartbeat: Heartbeat) -> StopRequest:
        """Record the state of a worker; returns what is requested of it."""
        self._heartbeats.record(heartbeat)
        self._heard.set()
        if heartbeat.rank == 0:
            self._saved = heartbeat.saved
            if self._request is StopRequest.SAVE:
                self._request = StopRequest.NONE  # one checkpoint is requested
                return StopRequest.SAVE
        return StopRequest.NONE if self._request is StopRequest.SAVE else self._request

    async def hung(self, timeout_s: float) -> list[Hung]:
        """Return the workers that hang, each once."""
        return self._heartbeats.hung(timeout_s)

    async def ask(self, request: StopRequest) -> bool:
        """Request something of the workers; returns whether they have begun to train."""
        self._request = max(self._request, request)
        return self._heartbeats.moving

    async def save(self) -> None:
        """Have a checkpoint written, and wait for it."""
        before = self._saved
        if await self.ask(StopRequest.SAVE):
            while self._saved == before:
                await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """Have the run saved and ended, and wait until rank 0 has left; returns at once before the first step."""
        import ray

        if ray.get_runtime_context().was_current_actor_reconstructed:
            await self._heard.wait()  # else the workers would seem not to have begun
        if await self.ask(StopRequest.STOP):
            await self._left.wait()

    async def leave(self) -> None:
        """Note that rank 0 has done what was requested, and ends."""
        self._left.set()

    async def may_go_on(self, global_step: int, event: Event | None) -> bool:
        """Wait for the driver's word after an epoch; rank 0 brings the epoch's event."""
        if event is not None:
            await self.put(event)
        return await asyncio.shield(self._answer_to(global_step))

    async def answer(self, global_step: int, go_on: bool) -> None:
        """Give the driver's word on whether to go on after a step."""
        waiting = self._answer_to(global_step)
        if not waiting.done():
            waiting.set_result(go_on)

    def _answer_to(self, global_step: int) -> asyncio.Future[bool]:
        return self._answers.setdefault(global_step, asyncio.get_running_loop().create_future())

    async def controlled_by(self, controller: Any) -> None:
        """Remember Ray Train's controller of the run."""
        self._controller = controller

    async def controller(self) -> Any:
        """Return that actor; None before it has started."""
        return self._controller


def start_coordinator() -> Any:
    """Start the actor on the driver's node, whose loss alone ends it for good."""
    import ray

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, label_selector=here)(Coordinator)
    return actor.remote()


class EpochBarrier:
    """Makes a run wait for its driver at the end of every epoch.

    Args:
        on_event: called with every event, in a thread of its own; after an epoch, returns whether to go on.
        placements: an actor that is told what room the workers have.
        owner: whose it is, for that actor.
    """

    def __init__(self, on_event: Callable[[Event], bool], placements: Any, owner: str) -> None:
        self.on_event, self.placements, self.owner = on_event, placements, owner
        self._coordinator: Any = None
        self._answered = -1

    def open(self, coordinator: Any) -> None:
        """Answer through this coordinator."""
        self._coordinator = coordinator

    def __call__(self, event: Event) -> None:
        """Take an event, and answer at an epoch's end."""
        if event["kind"] != "epoch":
            self.on_event(event)
            return
        step = event["global_step"]
        go_on = step == self._answered or self.on_event(event)  # a coordinator that was restarted asks again
        self._answered = step
        self._coordinator.answer.remote(step, go_on)

    def abort(self, timeout_s: float) -> None:
        """End the run wherever it is, and give back its workers."""
        import ray

        if self._coordinator is not None:
            with suppress(ray.exceptions.RayError):
                controller = ray.get(self._coordinator.controller.remote(), timeout=timeout_s)
                if controller is not None:
                    ray.get(controller.abort.remote(), timeout=timeout_s)


@contextmanager
def drained(coordinator: Any, listener: Callable[[Event], None]) -> Iterator[None]:
    """Pass events on as they come; whatever is still there at the end is passed on before returning."""
    import ray

    stop = threading.Event()

    def pump() -> None:
        with suppress(ray.exceptions.RayError):
            while not stop.is_set():
                for event in ray.get(coordinator.drain.remote()):
                    listener(event)

    thread = threading.Thread(target=pump, name="events")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        coordinator.wake.remote()
        thread.join()  # before ray.shutdown(): its next ray.get would start a new cluster
        with suppress(ray.exceptions.RayError):
            ray.get(coordinator.wake.remote(), timeout=5)
            for event in ray.get(coordinator.drain.remote(), timeout=5):  # come since the thread last looked
                listener(event)

"""The actor between a run on Ray and the process that started it: events one way, requests the other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from densenet_dist.cluster.heartbeat import is_hung
from densenet_dist.train.context import StopRequest

if TYPE_CHECKING:  # torch would make the actor's process several times as large
    from densenet_dist.cluster.heartbeat import Heartbeat
    from densenet_dist.train.context import Event


class Coordinator:
    """Passes events and heartbeats to the driver, requests and answers to the workers.

    Asynchronous, so that the driver can wait inside a call: polling would cost time on a machine whose cores all train.
    If its process is lost, Ray restarts it without its state and repeats pending calls, so a call that waits must get
    everything it needs as arguments.

    Args:
        hang_timeout_s: see `is_hung`.
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
        """Return the events since the last call; waits until there is one, or `wake` is called."""
        await self._has_events.wait()
        self._has_events.clear()
        events, self._events = self._events, []
        return events

    async def wake(self) -> None:
        """Make a waiting `drain` return."""
        self._has_events.set()

    async def heartbeat(self, heartbeat: Heartbeat) -> StopRequest | None:
        """Record the state of a worker; return the request to it, or None if it hangs and must exit."""
        self._heartbeats[heartbeat.rank] = heartbeat
        for rank in [rank for rank in self._heartbeats if rank >= heartbeat.world_size]:
            del self._heartbeats[rank]  # of an earlier, larger world
        self._has_heartbeats.set()
        if is_hung(heartbeat, self._heartbeats.values(), self._hang_timeout_s):
            where = f"{heartbeat.phase} at {heartbeat.where}" if heartbeat.where else heartbeat.phase
            await self._warn(heartbeat.rank, f"made no progress for {heartbeat.idle_s:.0f} s ({where}), and is killed")
            return None
        if heartbeat.rank == 0:
            self._saved = heartbeat.saved
            if self._request is StopRequest.SAVE:
                self._request = StopRequest.NONE  # it is for one checkpoint
                return StopRequest.SAVE
        return StopRequest.NONE if self._request is StopRequest.SAVE else self._request

    async def report_loss(self, rank: int, cause: str, restarts: str) -> None:
        """Tell the driver that the workers are restarted because of this rank."""
        await self._warn(rank, f"failed: {cause}; all workers are restarted ({restarts})")

    async def _warn(self, rank: int, text: str) -> None:
        last = self._heartbeats.get(rank)
        worker = f"rank {rank} on {last.host}, after step {last.step}," if last else f"rank {rank}"
        await self.put({"kind": "note", "text": f"{worker} {text}", "warning": True})

    async def request(self, request: StopRequest) -> bool:
        """Make a request to the workers; return whether they have begun to train."""
        self._request = max(self._request, request)
        return any(heartbeat.progress for heartbeat in self._heartbeats.values())

    async def save(self) -> None:
        """Request a checkpoint and wait for it."""
        before = self._saved
        if await self.request(StopRequest.SAVE):
            while self._saved == before:
                await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """Request a checkpoint and a stop, and wait until rank 0 has ended; before the first step, return at once."""
        import ray

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


def start_coordinator(hang_timeout_s: float) -> Any:
    """Start the coordinator of a run."""
    return on_this_node(Coordinator).remote(hang_timeout_s)


def on_this_node(kind: type) -> Any:
    """Return an actor class that runs on the driver's node, and is restarted for as long as that node lives."""
    import ray

    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, label_selector=here)(kind)


class EpochBarrier:
    """Makes a run wait for its driver at the end of every epoch.

    Args:
        on_event: called with every event, in a thread of its own; after an epoch, returns whether to continue.
        placements: an actor that records the placement groups of the workers.
        owner: the trial that they belong to.
        held: the lease of the sweep, see `densenet_dist.lease.fence`.
    """

    def __init__(
        self, on_event: Callable[[Event], bool], placements: Any, owner: str, held: tuple[str, str] | None = None
    ) -> None:
        self.on_event, self.placements, self.owner, self.held = on_event, placements, owner, held
        self.coordinator: Any = None  # set when the run starts
        self._answered: tuple[int, bool] | None = None

    def __call__(self, event: Event) -> None:
        """Handle an event; answer at the end of an epoch."""
        if event["kind"] != "epoch":
            self.on_event(event)
            return
        step = event["global_step"]
        if self._answered is None or step != self._answered[0]:  # a restarted coordinator asks again
            self._answered = step, self.on_event(event)
        self.coordinator.answer.remote(*self._answered)

    def abort(self, timeout_s: float) -> None:
        """End the run at any point and release its workers."""
        import ray

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
    import ray

    stop = threading.Event()
    errors: list[Exception] = []

    def forward() -> None:
        try:
            while not stop.is_set():
                for event in ray.get(coordinator.drain.remote()):
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
        stop.set()
        coordinator.wake.remote()
        thread.join()  # before ray.shutdown(): its next ray.get would start a new cluster
        if errors:
            raise errors[0]
        with suppress(ray.exceptions.RayError):
            ray.get(coordinator.wake.remote(), timeout=5)
            for event in ray.get(coordinator.drain.remote(), timeout=5):  # those since the thread's last call
                listener(event)

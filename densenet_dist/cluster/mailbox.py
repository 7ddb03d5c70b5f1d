"""What a run on Ray and the process that started it tell each other while it lasts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from densenet_dist.cluster.heartbeat import Beat
from densenet_dist.cluster.watchdog import Beats, Hung
from densenet_dist.errors import DenseNetDistError
from densenet_dist.train.context import Event
from densenet_dist.train.pulse import Wish


class Mailbox:
    """An actor that carries events and heartbeats to the driver, wishes to the workers, and remembers how it ended.

    Asynchronous, so that the driver can wait in it: on a machine whose every core trains, polling is felt.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._news = asyncio.Event()
        self._error: DenseNetDistError | None = None
        self._controller: Any = None
        self._answers: dict[int, asyncio.Future[bool]] = {}
        self._beats = Beats()
        self._wish = Wish.NOTHING
        self._saved = 0
        self._left = asyncio.Event()

    async def put(self, event: Event) -> None:
        """Something happened on rank 0."""
        if event["kind"] == "progress" and self._events and self._events[-1]["kind"] == "progress":
            self._events.pop()  # nobody has looked at the last one yet: only the newest matters
        if event["kind"] == "end":
            self._left.set()
        self._events.append(event)
        self._news.set()

    async def fail(self, error: DenseNetDistError) -> None:
        """A worker ends with an error that a restart cannot mend."""
        self._error = self._error or error
        self._left.set()

    async def error(self) -> DenseNetDistError | None:
        """That error; None where there was none."""
        return self._error

    async def beat(self, beat: Beat) -> Wish:
        """A worker lives; what is asked of it."""
        self._beats.heard(beat)
        if beat.rank == 0:
            self._saved = beat.saved
            if self._wish is Wish.SAVE:
                self._wish = Wish.NOTHING  # it is one checkpoint that is wished for
                return Wish.SAVE
        return Wish.NOTHING if self._wish is Wish.SAVE else self._wish

    async def hung(self, timeout_s: float) -> list[Hung]:
        """The workers that do not come forward, each told once."""
        return self._beats.hung(timeout_s)

    async def ask(self, wish: Wish) -> bool:
        """Ask something of the workers; whether they have begun to train."""
        self._wish = max(self._wish, wish)
        return self._beats.moving

    async def save(self) -> None:
        """Have a checkpoint written, and wait for it."""
        before = self._saved
        if await self.ask(Wish.SAVE):
            while self._saved == before:
                await asyncio.sleep(0.1)

    async def leave(self) -> None:
        """Rank 0 has done what it was asked for, and ends."""
        self._left.set()

    async def left(self) -> None:
        """Wait until rank 0 has ended, well or not."""
        await self._left.wait()

    async def drain(self) -> list[Event]:
        """What has come since the last call; waits until something has."""
        await self._news.wait()
        self._news.clear()
        events, self._events = self._events, []
        return events

    async def wake(self) -> None:
        """End the waiting."""
        self._news.set()

    async def answer(self, global_step: int, go_on: bool) -> None:
        """The driver's word on whether to go on after a step."""
        waiting = self._answer_to(global_step)
        if not waiting.done():
            waiting.set_result(go_on)

    async def may_go_on(self, global_step: int) -> bool:
        """Wait for it."""
        return await asyncio.shield(self._answer_to(global_step))

    def _answer_to(self, global_step: int) -> asyncio.Future[bool]:
        return self._answers.setdefault(global_step, asyncio.get_running_loop().create_future())

    async def controlled_by(self, controller: Any) -> None:
        """Ray Train's controller of the run is that actor."""
        self._controller = controller

    async def controller(self) -> Any:
        """That actor; None before it has started."""
        return self._controller


class Pace:
    """A driver's hold on a run that waits for it at the end of every epoch.

    Args:
        heard: called with every event, in a thread of its own; what it returns of an epoch says whether to go on.
        placements: an actor that is told what room the workers have.
        owner: whose it is, for that actor.
    """

    def __init__(self, heard: Callable[[Event], bool], placements: Any, owner: str) -> None:
        self.heard, self.placements, self.owner = heard, placements, owner
        self._mailbox: Any = None

    def open(self, mailbox: Any) -> None:
        """From here on the run listens."""
        self._mailbox = mailbox

    def __call__(self, event: Event) -> None:
        """Hear an event, and answer."""
        go_on = self.heard(event)
        if event["kind"] == "epoch":
            self._mailbox.answer.remote(event["global_step"], go_on)

    def abort(self, timeout_s: float) -> None:
        """End the run wherever it is, and give back its workers."""
        import ray

        if self._mailbox is not None:
            with suppress(ray.exceptions.RayError):
                controller = ray.get(self._mailbox.controller.remote(), timeout=timeout_s)
                if controller is not None:
                    ray.get(controller.abort.remote(), timeout=timeout_s)


@contextmanager
def drained(mailbox: Any, listener: Callable[[Event], None]) -> Iterator[None]:
    """Pass events on as they come; whatever is still there at the end is passed on before returning."""
    import ray

    stop = threading.Event()

    def pump() -> None:
        with suppress(ray.exceptions.RayError):
            while not stop.is_set():
                for event in ray.get(mailbox.drain.remote()):
                    listener(event)

    thread = threading.Thread(target=pump, name="events")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        mailbox.wake.remote()
        thread.join()  # before ray.shutdown(): its next ray.get would start a new cluster
        with suppress(ray.exceptions.RayError):
            ray.get(mailbox.wake.remote(), timeout=5)
            for event in ray.get(mailbox.drain.remote(), timeout=5):  # come since the thread last looked
                listener(event)


def announcing_restarts(listener: Callable[[Event], None], limit: int) -> Callable[[Event], None]:
    """The same listener, which also hears a note whenever the workers start again."""
    workers = losses = 0

    def listen(event: Event) -> None:
        nonlocal workers, losses
        if event["kind"] == "start":
            before, workers = workers, event["world_size"]
            if workers > before > 0:
                listener(
                    {"kind": "note", "text": f"there is room for more workers: all were started again, now {workers}"}
                )
            elif before:
                losses += 1
                text = f"a worker was lost: all were started again ({losses} of at most {limit} times)"
                listener({"kind": "note", "text": text, "warning": True})
        listener(event)

    return listen

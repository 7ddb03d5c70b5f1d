"""Following a job: an interrupt is never lost."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from densenet_dist.cluster import submit


class Deaf:
    """A connection that takes a cancellation for its own affair, as libraries do when it comes at the wrong moment."""

    def __init__(self, breaks: bool) -> None:
        self.breaks = breaks

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        while True:
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                if self.breaks:
                    raise ConnectionError("closed") from None
            yield "epoch\n"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("breaks", [False, True])
def test_an_interrupt_is_heard_though_the_connection_swallows_it(monkeypatch, breaks):
    client: Any = (Deaf(breaks), None)
    monkeypatch.setattr(submit, "_client", lambda address: client)
    written: list[str] = []
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        submit.follow(submit.Job("job", "http://nowhere"), written.append)
    timer.join()
    assert written

"""SIGINT, SIGTERM and SIGHUP (the terminal is closed), which ask a command to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

NUMBERS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handle(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Have a handler called on these signals; SIGHUP stays ignored if it is, as under nohup."""
    for number in NUMBERS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], Any] | None = None) -> Iterator[None]:
    """Have a handler called on these signals within the context; afterwards they are handled as before.

    Outside the main thread, which alone can handle signals, nothing changes.

    Args:
        handler: None where others set one meanwhile, as Ray does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in NUMBERS}
    try:
        if handler is not None:
            handle(handler)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)

"""Handlers of the signals that ask a command to end: SIGINT, SIGTERM and SIGHUP (the terminal was closed)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

HANDLED_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handle(handler: Callable[[int, FrameType | None], Any]) -> None:
    """Install a handler for these signals; SIGHUP stays ignored if it is already, as under nohup."""
    for number in HANDLED_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], Any] | None = None) -> Iterator[None]:
    """Install a handler for these signals, and restore the previous handlers at the end of the context.

    Does nothing outside the main thread, where Python cannot set handlers.

    Args:
        handler: None to only restore, if other code sets handlers in the context, as Ray does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    try:
        if handler is not None:
            handle(handler)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)

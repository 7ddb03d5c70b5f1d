"""What measurements share: a process of its own for each thing measured, its memory, medians with their spread."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from densenet_dist.errors import EnvironmentProblem


class MeasuringProcess:
    """A process that prepares something to measure, measures it when asked to, and waits in between.

    Its own exceptions are raised here. Where it dies, `EnvironmentProblem` says so.

    Args:
        prepare: a function of a module, called once in the process; it returns the function that `measure` calls.
        arguments: of `prepare`; they are pickled.
    """

    def __init__(self, prepare: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        # Ctrl-C reaches the whole process group: by default this process would print a traceback, now it just ends.
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
        )
        self._pid = self._pool.submit(os.getpid)
        self._prepared = self._last = self._pool.submit(_prepare, prepare, arguments)

    def wait(self) -> None:
        """Wait until it is prepared, so that preparing disturbs no measurement."""
        _result(self._prepared)

    def measure(self, *arguments: Any) -> Any:
        """Measure once."""
        self.wait()
        self._last = self._pool.submit(_measure, arguments)
        return _result(self._last)

    def stop(self) -> None:
        """End the process, in the middle of a measurement too."""
        if not self._last.done():
            with suppress(BrokenProcessPool, ProcessLookupError):
                os.kill(self._pid.result(), signal.SIGKILL)
        self._pool.shutdown(cancel_futures=True)


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except BrokenProcessPool:
        problem = "the measuring process ended: it was killed, perhaps because memory ran out"
        raise EnvironmentProblem(problem) from None


_prepared: Callable[..., Any]
"""In a measuring process: what it measures with."""


def _prepare(prepare: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    global _prepared
    _prepared = prepare(*arguments)


def _measure(arguments: tuple[Any, ...]) -> Any:
    gc.collect()  # what the last measurement left
    return _prepared(*arguments)


def median_and_spread(values: Sequence[float], digits: int = 5) -> tuple[float, tuple[float, float]]:
    """The median, and the lowest and the highest value; each to so many significant digits."""
    return rounded(statistics.median(values), digits), (rounded(min(values), digits), rounded(max(values), digits))


def rounded(value: float, digits: int = 5) -> float:
    """To so many significant digits, for a file that people read too."""
    return float(f"{value:.{digits}g}")


def reset_peak() -> float:
    """Let `peak_bytes` start anew; return the bytes that this process has in RAM then, NaN where Linux refuses."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # give back what the allocator keeps for later
    resident = psutil.Process().memory_info().rss
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return float(resident)


def peak_bytes() -> float:
    """The most memory that this process had in RAM since `reset_peak`; NaN where Linux does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    return float("nan")

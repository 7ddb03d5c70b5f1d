"""What the measurements share: a process for each thing measured, its peak memory, medians, tables for the terminal."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from densenet_dist.cluster.resources import local_threads
from densenet_dist.data.cifar import SPECS
from densenet_dist.environment import describe_environment
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.schema import Config


class MeasuringProcess:
    """A process that prepares something to measure, measures it on request, and is idle in between.

    Its exceptions are raised here; if it dies, `EnvironmentProblem` is raised.

    Args:
        prepare: a module-level function, called once in the process; it returns the function that `measure` calls.
        arguments: of `prepare`; they are pickled.
    """

    def __init__(self, prepare: Callable[..., Callable[..., Any]], *arguments: Any) -> None:
        # Ctrl-C reaches the whole process group: with the default handler this process would print a traceback.
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
        """End the process, even during a measurement."""
        if not self._last.done():
            with suppress(BrokenProcessPool, ProcessLookupError):
                os.kill(self._pid.result(), signal.SIGKILL)
        self._pool.shutdown(cancel_futures=True)


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except BrokenProcessPool:
        raise EnvironmentProblem("the measuring process was killed, perhaps because memory ran out") from None


_prepared: Callable[..., Any]
"""In a measuring process: the function that measures."""


def _prepare(prepare: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    global _prepared
    _prepared = prepare(*arguments)


def _measure(arguments: tuple[Any, ...]) -> Any:
    gc.collect()  # remains of the last measurement
    return _prepared(*arguments)


def reset_peak() -> float:
    """Reset `peak_bytes`; return the resident memory of this process in bytes, NaN where Linux refuses."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # return the memory that the allocator caches
    resident = proc_bytes("self/status", "VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return resident


def peak_bytes() -> float:
    """Return the peak resident memory of this process since `reset_peak`; NaN where Linux does not report it."""
    return proc_bytes("self/status", "VmHWM")


def proc_bytes(file: str, key: str) -> float:
    """Read a size from a file in ``/proc``; NaN where Linux does not report it."""
    with suppress(OSError):
        for line in Path("/proc", file).read_text().splitlines():
            if line.startswith(f"{key}:"):
                return float(line.split()[1]) * 1024
    return float("nan")


def conditions(config: Config, device: torch.device, seconds: float, rounds: int) -> dict[str, Any]:
    """Return how and where something was measured, for the result."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": local_threads(config.cluster),
        "seconds": seconds,
        "rounds": rounds,
        "environment": describe_environment(),
    }


def num_classes(config: Config) -> int:
    """Return the number of classes of the data set; 10 for a folder, which is not read."""
    return SPECS[config.data.name].num_classes if config.data.name in SPECS else 10


def median_and_spread(values: Sequence[float], digits: int = 5) -> tuple[float, tuple[float, float]]:
    """Return the median, and the lowest and highest value, each to `digits` significant digits."""
    return rounded(statistics.median(values), digits), (rounded(min(values), digits), rounded(max(values), digits))


def rounded(value: float, digits: int = 5) -> float:
    """Round to `digits` significant digits, for a file that people read too."""
    return float(f"{value:.{digits}g}")


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a title, a table with columns as wide as their contents, and notes below it."""
    lines = [*zip_longest(*(heading.split("\n") for heading in headings), fillvalue=""), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(title)
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    for note in notes:
        print(note)


def number(value: float | None) -> str:
    """Format to three significant digits, or as an integer from 100; a dash for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def interval(spread: Sequence[float] | None) -> str:
    """Format the lowest and highest value; a dash for None."""
    return "-" if spread is None else "-".join(map(number, spread))


def with_spread(value: float, spread: Sequence[float]) -> str:
    """Format a ratio with its lowest and highest value."""
    return f"{value:.2f} ({spread[0]:.2f}-{spread[1]:.2f})"


def conditions_line(found: dict[str, Any], device_suffix: str = "") -> str:
    """Format the `conditions` of a result for the title of its table."""
    device = str(found["device"])
    if device == "CPU":
        device = f"{found['environment']['cpu']}, {found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    rounds = "one round" if found["rounds"] == 1 else f"medians of {found['rounds']} rounds"
    return f"{device}{device_suffix}; {rounds}"

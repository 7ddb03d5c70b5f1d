"""What measurements share: processes that measure one thing each, their memory, medians with their spread."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, TypeVar

from densenet_dist.errors import DenseNetDistError, EnvironmentProblem

Answer = TypeVar("Answer")
_READY = "ready"


class Worker(Generic[Answer]):
    """A process that prepares something to measure, measures it when asked to, and waits in between.

    Args:
        prepare: a function of a module, called in the process; makes the function that answers `ask`.
        arguments: of `prepare`; plain values, as they go to another process.
    """

    def __init__(self, prepare: Callable[..., Callable[..., Answer]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, prepare, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._prepared = False

    def wait(self) -> None:
        """Wait until it is prepared, so that it disturbs nobody's measurement.

        Raises:
            DenseNetDistError: why it cannot be.
        """
        if not self._prepared:
            self._receive()
            self._prepared = True

    def ask(self, *question: Any) -> Answer:
        """Have it measure.

        Raises:
            DenseNetDistError: the process' own, or EnvironmentProblem where the process ended.
        """
        self.wait()
        with suppress(BrokenPipeError):  # then there is nothing to receive either
            self._connection.send(question)
        answer: Answer = self._receive()
        return answer

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            why = ": it was killed, perhaps for want of memory" if code == -signal.SIGKILL else ""
            raise EnvironmentProblem(f"the measuring process ended with code {code}{why}") from None
        if isinstance(answer, DenseNetDistError):
            raise answer
        return answer

    def stop(self) -> None:
        """End it."""
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def _serve(connection: Connection, prepare: Callable[..., Callable[..., Answer]], arguments: tuple[Any, ...]) -> None:
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        try:
            answer = prepare(*arguments)
        except DenseNetDistError as error:
            connection.send(error)
            return
        connection.send(_READY)
        while True:
            question = connection.recv()
            gc.collect()  # what the last measurement left
            try:
                connection.send(answer(*question))
            except DenseNetDistError as error:
                connection.send(error)


def median_and_spread(values: Sequence[float], digits: int = 5) -> tuple[float, tuple[float, float]]:
    """The median, and the lowest and the highest value; each to so many significant digits."""
    return rounded(statistics.median(values), digits), (rounded(min(values), digits), rounded(max(values), digits))


def rounded(value: float, digits: int = 5) -> float:
    """To so many significant digits, for a file that people read too."""
    return float(f"{value:.{digits}g}")


def reset_peak() -> bool:
    """Let `peak_bytes` start anew; False where Linux does not allow that: then it is that since the process began."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> float:
    """The most memory that this process had in RAM since `reset_peak`; NaN where Linux does not tell."""
    return _status("VmHWM")


def resident_bytes() -> float:
    """The memory that this process has in RAM, after the allocator gave back what it kept for later."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def available_bytes() -> float:
    """Memory that can still be had: of the machine, or of the container where that is less."""
    limits = [_field(Path("/proc/meminfo"), "MemAvailable")]
    with suppress(OSError, ValueError):  # no container, or no limit ("max")
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        # Cached files count as used, but are given up where memory is wanted.
        used = int((group / "memory.current").read_text()) - _cached_files(group / "memory.stat")
        limits.append(float(limit - used))
    return min(limits)


def _cached_files(path: Path) -> int:
    fields = dict(line.split() for line in path.read_text().splitlines())
    return int(fields.get("inactive_file", 0))


def _status(name: str) -> float:
    return _field(Path("/proc/self/status"), name)


def _field(path: Path, name: str) -> float:
    with suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return float(line.split()[1]) * 1024
    return float("nan")

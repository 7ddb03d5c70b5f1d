"""The exceptions of this package; each class has the exit code of the command line.

A message says what is wrong, where, and how to fix it. The command line prints only the message; ``--debug`` shows the
traceback too.
"""

import errno
import re
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from densenet_dist.credentials import without_credentials

_NO_MEMORY: Final = re.compile("unable to find an engine|_ALLOC_FAILED|out of memory")


class DenseNetDistError(Exception):
    """Base class of the errors that this package raises."""

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_credentials(arg) if isinstance(arg, str) else arg for arg in args))

    def _render_traceback_(self) -> list[str]:
        """Show only the message in IPython and notebooks."""
        return [f"{type(self).__name__}: {self}"]


class TrainingError(DenseNetDistError):
    """Training cannot continue, for instance after a NaN loss. Every rank raises it at the same step."""


class ConfigError(DenseNetDistError):
    """The configuration or the command line is wrong."""

    exit_code = 2


class EnvironmentProblem(DenseNetDistError):
    """This machine or cluster cannot run the configuration: no GPU, too few CPUs, a missing library."""

    exit_code = 3


class OutOfMemory(EnvironmentProblem):
    """A batch is too large for the memory of a device. In a sweep it ends only its own trial."""


class SmallerMicroBatches(OutOfMemory):
    """A step ran out of memory; workers that restart compute it in smaller micro-batches."""


class DataError(DenseNetDistError):
    """A data set is missing, damaged, or not the expected one."""

    exit_code = 4


class StorageError(DenseNetDistError):
    """A run's folder cannot be written, read, or is already in use."""

    exit_code = 5


class DamagedRecord(StorageError):
    """A file in a run's folder is damaged."""


class CheckpointError(DenseNetDistError):
    """A checkpoint is damaged or does not fit the model or data it is loaded into."""

    exit_code = 6


class Interrupted(DenseNetDistError):
    """The run or sweep in the folder `run` was stopped by a signal; `command` resumes it, with `options`."""

    def __init__(self, run: str, number: int = signal.SIGINT, command: str = "train", options: str = "") -> None:
        super().__init__(
            f"interrupted; resume from the last checkpoint: densenet-dist {command} --resume "
            f"{shlex.quote(run)}{options}"
        )
        self.exit_code = 128 + number


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device ran out of memory: cuDNN, cuBLAS and Triton report that as a plain RuntimeError."""
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)  # of PyTorch
    return isinstance(error, RuntimeError) and (named or _NO_MEMORY.search(str(error)) is not None)


def first_lines(lines: Sequence[str], most: int) -> list[str]:
    """Return the first lines, at most `most`, then how many more there are."""
    return [*lines[:most], *([f"... and {len(lines) - most} more"] if len(lines) > most else [])]


@contextmanager
def storage_errors(place: object = None) -> Iterator[None]:
    """Turn an OSError into a StorageError about `place`; without a place, only that of a full or failing disk."""
    try:
        yield
    except OSError as error:
        if place is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        place = place or error.filename or "a file, or the standard output,"
        raise StorageError(f"{place} cannot be written: {error.strerror or error}") from error

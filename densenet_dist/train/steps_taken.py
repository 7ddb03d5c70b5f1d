"""How far a run came before a loss: what was lost is known to the step, however long ago the last checkpoint was."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

from densenet_dist.run_folder import RunFolder

STEPS_FILE: Final = "steps.txt"
"""One line: the global steps completed, and how many steps of the run were taken again in all."""


class StepsTaken:
    """Written by rank 0 after every step, in place, without a flush: a process that is killed loses nothing of it.

    It tells what a loss cost, no more: training never depends on it. A few microseconds a step.

    Args:
        run: the run's folder. On an object store nothing is kept, and nothing known.

    Attributes:
        again: steps of this run that were taken again so far.
    """

    def __init__(self, run: RunFolder) -> None:
        self.again = 0
        self._reached = 0
        self._file: int | None = None
        if run.is_remote:
            return
        with suppress(OSError):  # of a folder that cannot be written to, others say more
            self._file = os.open(run.path / STEPS_FILE, os.O_RDWR | os.O_CREAT, 0o644)
            with suppress(ValueError):
                self._reached, self.again = map(int, os.pread(self._file, 64, 0).split())

    def begin_at(self, step: int) -> int:
        """Training goes on after that step; how many steps that costs it."""
        lost = max(0, self._reached - step)
        self.again += lost
        self.reached(step)
        return lost

    def reached(self, step: int) -> None:
        """So many steps are completed."""
        self._reached = step
        if self._file is not None:
            with suppress(OSError):
                os.pwrite(self._file, b"%12d %12d\n" % (step, self.again), 0)

    def close(self) -> None:
        """Nothing more comes."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

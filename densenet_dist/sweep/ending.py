"""How a sweep ended: the same for the console and for programs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.results import BEST_FILE, PAGE_FILE, RESULTS_FILE, TABLE_FILE, Trial


@dataclass(frozen=True)
class SweepEnding:
    """A sweep that came to its end.

    Attributes:
        sweep: what was searched.
        folder: the sweep's, a path or URI without a query.
        trials: all of them.
        best: the best one; None where no trial came to its first figure.
        ended_by: the budget that ended it early; None otherwise.
    """

    sweep: Sweep
    folder: str
    trials: Sequence[Trial]
    best: Trial | None
    ended_by: str | None

    @property
    def status(self) -> str:
        """How it ended, in words."""
        return self.ended_by or "finished"

    def figures(self) -> dict[str, str]:
        """What it came to."""
        count = {status: sum(trial.status == status for trial in self.trials) for status in ("stopped", "failed")}
        also = "".join(f", {number} {status}" for status, number in count.items() if number)
        found = {"trials": f"{len(self.trials)}{also}"}
        if self.best is not None:
            found["best trial"] = f"{self.best.name}   ({self.sweep.settings.metric} {self.best.metric:.4f})"
        return found

    def files(self) -> dict[str, str]:
        """Where to look."""
        found = {"sweep folder": self.folder, "page": f"{self.folder}/{PAGE_FILE}"}
        found |= {"results": f"{self.folder}/{RESULTS_FILE}", "table": f"{self.folder}/{TABLE_FILE}"}
        return found if self.best is None else found | {"best": self._best_file}

    def commands(self) -> dict[str, str]:
        """What to do next."""
        train = {} if self.best is None else {"train it again": f"densenet-dist train {shlex.quote(self._best_file)}"}
        return train | {"TensorBoard": f"tensorboard --logdir {shlex.quote(self.folder)}"}

    @property
    def _best_file(self) -> str:
        return "".join((self.folder, "/", BEST_FILE, *self.sweep.settings.storage.partition("?")[1:]))

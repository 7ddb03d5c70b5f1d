"""What Ray Tune calls while a sweep runs: record what its trials do, and decide when it stops. Imports Ray."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ray
from ray import tune

from densenet_dist.cluster.coordinator import explain_crash
from densenet_dist.errors import (
    DamagedRecord,
    DataError,
    DenseNetDistError,
    EnvironmentProblem,
    OutOfMemory,
    StorageError,
)
from densenet_dist.sweep.results import ERROR, State
from densenet_dist.sweep.space import decode

if TYPE_CHECKING:  # the process of `SweepState` needs no more than this module
    from densenet_dist.cluster.sweep import SweepRecord

_FATAL: Final = (StorageError, DataError, EnvironmentProblem)
"""Errors that end the sweep, because every other trial would run into them as well."""
_OF_ONE_TRIAL: Final = (DamagedRecord, OutOfMemory)
"""Their subclasses that concern one trial alone."""


class SweepState:
    """An actor that outlives trials: the placement groups of their workers, and whether the sweep is stopping."""

    def __init__(self) -> None:
        self._placement_groups: dict[str, list[Any]] = {}
        self._stopping = False

    def add(self, trial: str, placement_group: Any) -> None:
        """Record the placement group of a trial's workers."""
        self._placement_groups.setdefault(trial, []).append(placement_group)

    def take(self, trial: str) -> list[Any]:
        """Return and forget all placement groups of a trial."""
        return self._placement_groups.pop(trial, [])

    def stop(self) -> None:
        """Tell the trials that the sweep is stopping."""
        self._stopping = True

    def stopping(self) -> bool:
        """Return whether the sweep is stopping. Trials ask within epochs; otherwise Tune would have to kill them."""
        return self._stopping


class TuneHooks(tune.Callback, tune.Stopper):  # type: ignore[misc]  # Ray's classes are untyped
    """Record what happens to trials; stop a sweep early on its time limit, a signal, a fatal error or a lost lease.

    Args:
        max_hours: the time limit, from now on; None if there is none.
        record: the record to update.
        state: the `SweepState`, through which trials learn during an epoch that the sweep stops.

    Attributes:
        fatal: the error of a trial that all other trials would run into as well.
        running: names of the trials that have started and not ended.
        signals: numbers of the signals received.
        ended_by: a message about the time limit once it was reached.
    """

    def __init__(self, max_hours: float | None, record: SweepRecord, state: Any) -> None:
        self._max_hours, self._record, self._state = max_hours, record, state
        self._started = time.monotonic()
        self._stopping = False
        self.fatal: DenseNetDistError | None = None
        self.running: set[str] = set()
        self.signals: list[int] = []
        self.ended_by: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.stopper.NoopStopper, ()  # Tune pickles it for restoring an experiment, which is never done

    def on_trial_start(self, *, trial: Any, **info: Any) -> None:
        """Handle a trial that starts, or restarts after a crash."""
        self.running.add(str(trial))
        self._update(trial, "running", {})

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Handle the end of an epoch."""
        if "epoch" in result:
            self._update(trial, "epoch", result)

    def on_trial_complete(self, *, trial: Any, **info: Any) -> None:
        """Handle a trial that ended by itself or was stopped by the scheduler."""
        self.running.discard(str(trial))
        result = trial.last_result or {}
        error = result.get(ERROR)
        if error is None:
            self._update(trial, "finished" if ERROR in result else "stopped", result)
            return
        self._remove_placement_groups(trial)  # Ray Train's controller may have been lost
        if isinstance(error, _FATAL) and not isinstance(error, _OF_ONE_TRIAL):
            # Once its cause, such as a full disk, is removed, the trial can be resumed.
            self._update(trial, "interrupted", result, str(error))
            self.fatal = self.fatal or error
        else:
            self._update(trial, "failed", result, str(error))

    def on_trial_error(self, *, trial: Any, **info: Any) -> None:
        """Handle a trial that crashed more than ``max_failures`` times."""
        self.running.discard(str(trial))
        self._remove_placement_groups(trial)
        self._update(trial, "failed", trial.last_result or {}, explain_crash(_last_failure(trial), "the trial"))

    def on_trial_recover(self, *, trial: Any, **info: Any) -> None:
        """Handle a trial that crashed and is restarted."""
        self._remove_placement_groups(trial)
        text = f"{trial} crashed; restarting: {explain_crash(_last_failure(trial), 'the trial')}"
        self._record.listener({"kind": "note", "text": text, "warning": True})

    def _update(self, trial: Any, state: State, figures: dict[str, Any], error: str | None = None) -> None:
        self._record.update(str(trial), decode(trial.config), state, figures, error)

    def _remove_placement_groups(self, trial: Any) -> None:
        with suppress(ray.exceptions.RayError):  # if the cluster is lost, they are too
            for placement_group in ray.get(self._state.take.remote(str(trial)), timeout=10):
                ray.util.remove_placement_group(placement_group)

    def on_signal(self, number: int, frame: object) -> None:
        """Handle a signal: the first one stops the sweep gracefully, the second one at once."""
        self.signals.append(number)
        if len(self.signals) > 1:
            raise KeyboardInterrupt(number)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: single trials are stopped by the scheduler."""
        return False

    def stop_all(self) -> bool:
        """Return whether the sweep stops now."""
        if not self._stopping:
            if self.signals or self.fatal:
                self.stop()
            elif self._max_hours is not None and time.monotonic() - self._started > 3600 * self._max_hours:
                self.ended_by = f"limit of {self._max_hours:g} hour{'s' * (self._max_hours != 1)} reached"
                self.stop()
        return self._stopping

    def stop(self) -> None:
        """Stop the sweep; running trials end during their epoch, and are reported as interrupted."""
        self._stopping = True
        self._state.stop.remote()


def _last_failure(trial: Any) -> Any:
    # Tune copies this file later to the trial's storage, where `get_error` looks for it.
    path = trial.error_file
    if path is None or not os.path.exists(path):
        return trial.get_error()
    return Path(path).read_text(encoding="utf-8", errors="replace").rpartition("Failure # ")[2]

"""Connect Ray Tune's callbacks to a sweep: trial events, trial names, and when to stop. Imports Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune

from densenet_dist import errors
from densenet_dist.cluster.coordinator import explain_crash
from densenet_dist.cluster.trial import CAUSE, FATAL, OUTCOME
from densenet_dist.sweep.results import TRIAL_PREFIX, Trial, Usage
from densenet_dist.sweep.schema import SweepConfig
from densenet_dist.sweep.space import decode
from densenet_dist.train.context import Event


class TrialNames:
    """Name Tune's trials: resumed ones by their settings, new ones by the next number."""

    def __init__(self, recorded: Sequence[Trial]) -> None:
        self._resumed = [(trial.overrides, trial.name) for trial in recorded if trial.status == "interrupted"]
        numbers = [int(trial.name.removeprefix(TRIAL_PREFIX)) for trial in recorded]
        self._next = max(numbers, default=-1) + 1

    def __deepcopy__(self, memo: dict[int, Any]) -> TrialNames:
        return self  # Tune copies its arguments for every trial; the copies must share one counter

    def __call__(self, trial: Any) -> str:
        """Return the name of a new Tune trial."""
        overrides = decode(trial.config)
        for resumed in self._resumed:
            if resumed[0] == overrides:
                self._resumed.remove(resumed)
                return resumed[1]
        self._next += 1
        return f"{TRIAL_PREFIX}{self._next - 1:03d}"


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


class TrialEvents(tune.Callback):  # type: ignore[misc]  # Ray's classes are untyped
    """Turn Tune's callbacks into ``trial`` events: ``name``, ``overrides``, ``state``, ``figures``, ``cause``.

    Attributes:
        fatal: the error of a trial that all other trials would run into as well.
        running: names of the trials that have started and not ended.
    """

    def __init__(self, listener: Callable[[Event], None], state: Any) -> None:
        self._listener, self._state = listener, state
        self.fatal: errors.DenseNetDistError | None = None
        self.running: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()  # Tune pickles its callbacks, but the listener cannot be pickled

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Handle a trial that starts, or restarts after a crash."""
        self.running.add(str(trial))
        self._emit(trial, "running", {})

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Handle the end of an epoch."""
        if "epoch" in result:
            self._emit(trial, "epoch", result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Handle a trial that ended by itself or was stopped by the scheduler."""
        self.running.discard(str(trial))
        result = trial.last_result or {}
        if result.get(OUTCOME) == "failed":  # Ray Train's controller may have been lost
            self._remove_placement_groups(trial)
        cause, fatal = result.get(CAUSE), result.get(FATAL)
        # After a fatal error, such as a full disk, the trial can be resumed once its cause is removed.
        self._emit(trial, "interrupted" if fatal else result.get(OUTCOME, "stopped"), result, cause)
        if fatal and self.fatal is None:
            self.fatal = getattr(errors, fatal)(cause)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Handle a trial that crashed more than ``max_failures`` times."""
        self.running.discard(str(trial))
        self._remove_placement_groups(trial)
        self._emit(trial, "failed", trial.last_result or {}, explain_crash(_last_failure(trial), "the trial"))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Handle a trial that crashed and is started again."""
        self._remove_placement_groups(trial)
        text = f"{trial} crashed and is started again: {explain_crash(_last_failure(trial), 'the trial')}"
        self._listener({"kind": "note", "text": text, "warning": True})

    def _remove_placement_groups(self, trial: Any) -> None:
        with suppress(ray.exceptions.RayError):  # if the cluster is lost, they are too
            for placement_group in ray.get(self._state.take.remote(str(trial)), timeout=10):
                ray.util.remove_placement_group(placement_group)

    def _emit(self, trial: Any, state: str, result: dict[str, Any], cause: str | None = None) -> None:
        event = {"kind": "trial", "name": str(trial), "overrides": decode(trial.config), "state": state}
        self._listener(event | {"figures": result, "cause": cause})


class SweepStopper(tune.Stopper):  # type: ignore[misc]
    """Stop a sweep before all trials have ended: on a spent budget, a signal, a fatal error or a lost lease.

    Running trials are reported as interrupted rather than stopped, so that they can be resumed.

    Args:
        settings: the sweep's, with its budgets.
        usage: time used by the sweep so far; updated in place.
        gpus_per_trial: for the budget of GPU hours.
        events: the source of fatal errors.
        state: the `SweepState`, through which trials learn of it during an epoch.

    Attributes:
        signals: numbers of the signals received.
        spent: a message about the budget that is spent; None while there is some left.
    """

    def __init__(
        self, settings: SweepConfig, usage: Usage, gpus_per_trial: float, events: TrialEvents, state: Any
    ) -> None:
        self._settings, self._usage, self._gpus, self._events = settings, usage, gpus_per_trial, events
        self._state = state
        self._counted_until = time.monotonic()
        self._stopping = False
        self.signals: list[int] = []
        self.spent: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.stopper.NoopStopper, ()  # Tune pickles it for restoring an experiment, which is never done

    def on_signal(self, number: int, frame: object) -> None:
        """Handle a signal: the first one stops the sweep gracefully, the second one at once."""
        self.signals.append(number)
        if len(self.signals) > 1:
            raise KeyboardInterrupt(number)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Count a trial's time; never stops a single trial."""
        self._usage.gpu_hours += result.get("time_this_iter_s", 0.0) * self._gpus / 3600
        return False

    def stop_all(self) -> bool:
        """Return whether the sweep stops now."""
        now = time.monotonic()
        self._usage.hours += (now - self._counted_until) / 3600
        self._counted_until = now
        if not self._stopping:
            if not (self.signals or self._events.fatal):
                self.spent = self._usage.spent(self._settings)
            if self.signals or self._events.fatal or self.spent:
                self.stop()
        return self._stopping

    def stop(self) -> None:
        """Stop the sweep; running trials end during their epoch."""
        self._stopping = True
        self._state.stop.remote()


def _last_failure(trial: Any) -> Any:
    # Tune copies this file later to the trial's storage, where `get_error` looks for it.
    path = trial.error_file
    if path is None or not os.path.exists(path):
        return trial.get_error()
    return Path(path).read_text(encoding="utf-8", errors="replace").rpartition("Failure # ")[2]

"""What Ray Tune tells of a sweep, in our words; imports Ray, so it is imported only by what runs trials."""

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
from densenet_dist.cluster.failures import explain
from densenet_dist.cluster.trial import CAUSE, FATAL, OUTCOME
from densenet_dist.sweep.results import TRIAL_PREFIX, Trial
from densenet_dist.sweep.schema import SweepConfig
from densenet_dist.sweep.space import decode
from densenet_dist.train.context import Event


class Names:
    """Names trials: those of before by their settings, new ones by number."""

    def __init__(self, recorded: Sequence[Trial]) -> None:
        self._known = [(trial.overrides, trial.name) for trial in recorded if trial.overrides]
        numbers = [int(trial.name.removeprefix(TRIAL_PREFIX)) for trial in recorded]
        self._next = max(numbers, default=-1) + 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Names:
        return self  # Tune copies what it is given for every trial; numbers must not begin anew

    def __call__(self, trial: Any) -> str:
        """The name of a Tune trial that was just made."""
        overrides = decode(trial.config)
        for known in self._known:
            if known[0] == overrides:
                self._known.remove(known)
                return known[1]
        self._next += 1
        return f"{TRIAL_PREFIX}{self._next - 1:03d}"


class SweepState:
    """An actor that outlives trials: what room their workers have, for when a trial is lost; whether all is over."""

    def __init__(self) -> None:
        self._of: dict[str, list[Any]] = {}
        self._ending = False

    def add(self, trial: str, placement_group: Any) -> None:
        """A trial's workers were placed."""
        self._of.setdefault(trial, []).append(placement_group)

    def take(self, trial: str) -> list[Any]:
        """All that a trial ever had."""
        return self._of.pop(trial, [])

    def end(self) -> None:
        """The sweep ends."""
        self._ending = True

    def ending(self) -> bool:
        """Whether it does: asked by trials in the middle of an epoch, whom Tune would only kill, and later."""
        return self._ending


class Watcher(tune.Callback):  # type: ignore[misc]  # Ray's classes are untyped
    """Turns Tune's callbacks into ``trial`` events: ``name``, ``overrides``, ``state``, ``figures``, ``cause``.

    Attributes:
        fatal: what made a trial fail, where all others would fail as well.
        interrupted: whether trials were running when Tune ended.
    """

    def __init__(self, metric: str, listener: Callable[[Event], None], state: Any) -> None:
        self._metric, self._listener, self._state = metric, listener, state
        self.fatal: errors.DenseNetDistError | None = None
        self._running: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()  # Tune writes its callbacks down; a listener cannot be, and need not

    @property
    def interrupted(self) -> bool:
        """Whether trials were running when Tune ended."""
        return bool(self._running)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins, or goes on after a pause or a crash."""
        self._running.add(str(trial))
        self._tell(trial, "running", {})

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch is done."""
        if "epoch" in result:
            self._tell(trial, "epoch", result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended: on its own, or by the scheduler."""
        self._running.discard(str(trial))
        result = trial.last_result or {}
        cause, fatal = result.get(CAUSE), result.get(FATAL)
        # One that lacked only room on a disk can go on when there is some.
        self._tell(trial, "interrupted" if fatal else result.get(OUTCOME, "stopped"), result, cause)
        if fatal and self.fatal is None:
            self.fatal = getattr(errors, fatal)(cause)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial crashed more often than it may."""
        self._running.discard(str(trial))
        self._give_back(trial)
        self._tell(trial, "failed", trial.last_result or {}, explain(_last_failure(trial), "the trial"))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial crashed, and is started again."""
        self._give_back(trial)
        self._listener(
            {
                "kind": "note",
                "text": f"{trial} crashed and is started again: {explain(_last_failure(trial), 'the trial')}",
                "warning": True,
            }
        )

    def _give_back(self, trial: Any) -> None:
        with suppress(ray.exceptions.RayError):  # the cluster is lost, and all of it with it
            for placement_group in ray.get(self._state.take.remote(str(trial)), timeout=10):
                ray.util.remove_placement_group(placement_group)

    def _tell(self, trial: Any, state: str, result: dict[str, Any], cause: str | None = None) -> None:
        event = {"kind": "trial", "name": str(trial), "overrides": decode(trial.config), "state": state}
        self._listener(event | {"figures": result, "cause": cause})


class Ending(tune.Stopper):  # type: ignore[misc]
    """Ends a sweep before all its trials have: by its budget, a signal, or an error that all trials would run into.

    What was running is not told of as stopped, so that it can go on later.

    Args:
        settings: the sweep's, with its budgets: hours by the clock, from now on, and GPU hours of all trials together.
        gpus_per_trial: of each.
        watcher: hears of errors.
        state: the `SweepState`, for trials in the middle of an epoch.

    Attributes:
        signals: those that came.
        spent: which budget is spent, in words; None while there is some left.
    """

    def __init__(self, settings: SweepConfig, gpus_per_trial: float, watcher: Watcher, state: Any) -> None:
        self._settings, self._gpus, self._watcher, self._state = settings, gpus_per_trial, watcher, state
        self._started = time.monotonic()
        self._seconds: dict[str, float] = {}
        self._said = False
        self.signals: list[int] = []
        self.spent: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.stopper.NoopStopper, ()  # Tune writes it down for a later sweep, which has its own

    def hear(self, number: int, frame: object) -> None:
        """A signal: the first one ends the sweep in order, the next one at once."""
        self.signals.append(number)
        if len(self.signals) > 1:
            raise KeyboardInterrupt(number)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Count a trial's time; it is never stopped alone."""
        self._seconds[trial_id] = result.get("time_total_s", 0.0)
        return False

    def stop_all(self) -> bool:
        """Whether the sweep ends now."""
        if self._said:
            return True
        if not (self.signals or self._watcher.fatal):
            hours, gpu_hours = self._settings.max_hours, self._settings.max_gpu_hours
            if hours is not None and time.monotonic() - self._started > hours * 3600:
                self.spent = f"max_hours: {hours:g} hours are over"
            if gpu_hours is not None and sum(self._seconds.values()) * self._gpus > gpu_hours * 3600:
                self.spent = f"max_gpu_hours: {gpu_hours:g} GPU hours are used"
            if self.spent is None:
                return False
        self._said = True
        self._state.end.remote()
        return True


def _last_failure(trial: Any) -> Any:
    # Tune copies this file to the trial's storage, where `get_error` looks, only later.
    path = trial.error_file
    if path is None or not os.path.exists(path):
        return trial.get_error()
    return Path(path).read_text(encoding="utf-8", errors="replace").rpartition("Failure # ")[2]

"""Run a sweep: `tune` prepares its folder, runs the trials and records their results."""

from __future__ import annotations

import bisect
import math
import os
import shlex
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from densenet_dist.cluster.connection import connected, require_cluster
from densenet_dist.cluster.launch import absolute, prepare_data
from densenet_dist.config import migrate_test_limit
from densenet_dist.custom import trust_option
from densenet_dist.errors import ConfigError, StorageError
from densenet_dist.lease import Lease, hold
from densenet_dist.run_folder import WEIGHTS_FILE, RunFolder, join_location, open_run
from densenet_dist.sweep.definition import Sweep, load_sweep, stored_space
from densenet_dist.sweep.page import write_page
from densenet_dist.sweep.results import (
    SWEEP_FILE,
    TRIAL_PREFIX,
    State,
    Status,
    SweepResult,
    Trial,
    TrialFile,
    add_epoch,
    best_trial,
    format_results,
    trials_on_record,
)
from densenet_dist.trackers import require_trackers
from densenet_dist.train.context import Event
from densenet_dist.yaml_settings import read_yaml

_WRITE_EVERY_S: Final = 5.0
_TUNE_ENV: Final = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials have records of their own
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may fail before its first epoch
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # `TuneHooks.on_signal` handles signals
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",  # Tune's own state is never read
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def tune(sweep: Sweep, *, resume: bool = False, listener: Callable[[Event], None] | None = None) -> SweepResult:
    """Run the trials of a sweep.

    Args:
        sweep: from `densenet_dist.load_sweep`.
        resume: resume the sweep of that name, if there is one, instead of raising an error. Trials that ended are not
            run again, interrupted ones continue from their last checkpoints. A larger `trials` extends the sweep.
        listener: called with every event; by default they are shown on the console.

    Returns:
        The trials and the best of them. The sweep's folder then has sweep.json, sweep.html and best.yaml.

    Raises:
        ConfigError, EnvironmentProblem, DataError, StorageError: before any work is lost.
        KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP, once all resources are released and the results are written.
    """
    if listener is None:
        from densenet_dist.sweep.display import SweepConsole

        with SweepConsole() as console:
            return tune(sweep, resume=resume, listener=console)
    sweep = _absolute(sweep)
    config = sweep.config("base", {})
    require_trackers(config)
    require_cluster(config.cluster)
    folder = RunFolder(sweep.settings.storage, sweep.settings.name)
    if not resume:
        _refuse_used_name(folder)
    folder.create()
    with hold(folder, listener) as lease:
        return _tune(sweep, folder, lease, listener)


def _tune(sweep: Sweep, folder: RunFolder, lease: Lease, listener: Callable[[Event], None]) -> SweepResult:
    record = SweepRecord(folder, sweep, listener)
    recorded = len(record.trials)
    if recorded and stored_space(folder.fetch(SWEEP_FILE)) != sweep.space:
        raise ConfigError(
            f"space: {folder.uri} searches other keys or values, which a resumed sweep cannot change\n"
            "  restore the space of its sweep.yaml, or start another sweep with name=NEW"
        )
    remaining = recorded < sweep.trials or any(trial.status == "interrupted" for trial in record.trials)
    ended_by = None
    if remaining:
        prepare_data(sweep.config("data", {}))
    folder.write(SWEEP_FILE, sweep.to_yaml())
    listener({"kind": "sweep", "sweep": sweep, "trials": list(record.trials), "folder": folder.uri})
    with record:
        if remaining:
            try:
                ended_by = _run_trials(_with_shared_weights(sweep, folder), record, lease)
            finally:
                if lease.lost is None:
                    folder.remove("ray")
    try:
        write_page(folder, sweep, record.trials)  # not after an interruption: a job that is stopped has only seconds
    except Exception as error:
        text = f"the results are written, but the page of the sweep could not be: {error}"
        listener({"kind": "note", "text": text, "warning": True})
    return SweepResult(sweep, folder.uri, record.trials, best_trial(record.trials, sweep.settings.maximize), ended_by)


def _with_shared_weights(sweep: Sweep, folder: RunFolder) -> Sweep:
    """Write the weights that all trials start from to the sweep's folder, so that only this process needs the file."""
    config = sweep.config("base", {})
    starts_from_weights = config.model.weights or config.model.pretrained
    if not starts_from_weights or any(key.startswith(("model.", "options.model.")) for key in sweep.space):
        return sweep
    if not folder.exists(WEIGHTS_FILE):
        from densenet_dist.train.initial_weights import write_initial_weights

        write_initial_weights(folder, config)
    base = dict(sweep.base)
    base["model"] = {**base["model"], "weights": join_location(folder.location, WEIGHTS_FILE), "pretrained": False}
    return replace(sweep, base=base)


def _run_trials(sweep: Sweep, record: SweepRecord, lease: Lease) -> str | None:
    """Run the trials that have not ended; return which limit ended the sweep early, if any."""
    for key, value in _TUNE_ENV.items():
        os.environ.setdefault(key, value)
    with connected(sweep.config("base", {}).cluster, ships_code=any(sweep.custom_parts())) as is_private:
        from densenet_dist.cluster.ray_tune import run_trials

        return run_trials(sweep, record, lease, is_private)


def _refuse_used_name(folder: RunFolder) -> None:
    # A sweep that failed before its first trial (no data, no GPU) may be started again under its name.
    if folder.exists() or any(name.startswith(TRIAL_PREFIX) for name in folder.names("")):
        raise StorageError(
            f"the sweep {folder.uri} exists already\n"
            f"  resume it: densenet-dist tune --resume {shlex.quote(folder.location)}{trust_option()}\n"
            "  or choose another name: name=NEW"
        )


def open_sweep(folder: str | Path, *settings: str, trust: bool = False) -> Sweep:
    """Read the sweep of a folder.

    Args:
        folder: its path or URI, or its name under ``runs/``.
        settings: ``trials=N`` to extend it, ``max_hours=H`` to change its limit.
        trust: import the custom parts that the folder's files name, which runs their code.

    Raises:
        StorageError: there is no sweep.
        ConfigError: a setting is wrong, or cannot be changed.
    """
    for text in settings:
        if text.partition("=")[0] not in ("trials", "max_hours"):
            raise ConfigError(f"{text}: a resumed sweep has its own sweep.yaml; only trials and max_hours can change")
    found = open_run(folder, SWEEP_FILE, "sweep")
    file = found.fetch(SWEEP_FILE)
    base = read_yaml(file).get("settings")
    stored = (file, *(migrate_test_limit(base) if isinstance(base, dict) else ()))
    sweep = load_sweep(*stored, *settings, trust=trust)
    if settings and sweep.trials < (before := load_sweep(*stored, trust=trust).trials):
        raise ConfigError(f"trials: {sweep.trials}; the sweep has {before} trials and can only be extended")
    return sweep.stored_at(found.storage, found.name)


class SweepRecord:
    """The trials of a sweep, updated while it runs, and written at most every few seconds.

    On exit, trials that are still running become interrupted and everything is written.

    Args:
        folder: the sweep's folder, with what is recorded so far.
        sweep: what is searched.
        listener: called with every note, and with ``trial`` events that have the `Trial` itself as ``trial``, the best
            one so far as ``best`` and all as ``all``.

    Attributes:
        trials: all trials, in order of their names.
    """

    def __init__(self, folder: RunFolder, sweep: Sweep, listener: Callable[[Event], None]) -> None:
        self.listener = listener
        self.trials = trials_on_record(folder, sweep)
        self._folder, self._sweep = folder, sweep
        self._unwritten: dict[str, TrialFile] = {}
        self._written = -math.inf

    def __enter__(self) -> SweepRecord:
        self._write()
        return self

    def __exit__(self, *error: object) -> None:
        for trial in self.trials:
            if trial.status == "running":
                trial.status = "interrupted"
        self._write()

    def update(
        self, name: str, overrides: dict[str, Any], state: State, figures: Mapping[str, Any], error: str | None = None
    ) -> None:
        """Record what happened to a trial: it ended an epoch, or reached the status `state`."""
        settings = self._sweep.settings
        trial = next((trial for trial in self.trials if trial.name == name), None)
        if trial is None:
            trial = Trial(name, overrides)
            bisect.insort(self.trials, trial, key=attrgetter("name"))
        trial.error = error
        trial.parameters = figures.get("parameters", trial.parameters)
        if figures.get("epoch", 0) > trial.epochs:
            add_epoch(trial, figures, settings.metric, settings.maximize)
        if state == "running":
            trial.status = state
        elif state != "epoch":
            trial.metrics |= {key: value for key, value in figures.items() if key.startswith("test/")}
            self._end(trial, state)
        best = best_trial(self.trials, settings.maximize)
        self.listener({"kind": "trial", "state": state, "trial": trial, "best": best, "all": self.trials})
        if state != "epoch" or time.monotonic() - self._written > _WRITE_EVERY_S:
            with suppress(StorageError):  # if the fault persists, the write at the end reports it
                self._write()

    def _end(self, trial: Trial, status: Status) -> None:
        trial.status = status
        file = TrialFile(trial.overrides, parameters=trial.parameters)
        # summary.json marks a finished trial, and an interrupted one may be resumed: neither status is stored here.
        if status in ("stopped", "failed"):
            file = replace(file, status=status, error=trial.error)
        self._unwritten[trial.name] = file
        with suppress(StorageError):  # an error in a callback would make Tune restart the trial; the next write retries
            self._write_trial_files()

    def _write_trial_files(self) -> None:
        problem: StorageError | None = None
        for name in list(self._unwritten):
            try:
                run = RunFolder(self._sweep.folder, name)
                if run.exists():
                    self._unwritten[name].write(run)
                del self._unwritten[name]
            except StorageError as error:
                problem = error
        if problem is not None:
            raise problem

    def _write(self) -> None:
        self._folder.guard()
        for name, text in format_results(self._sweep, self.trials).items():
            self._folder.write(name, text)
        self._write_trial_files()
        self._written = time.monotonic()


def _absolute(sweep: Sweep) -> Sweep:
    config = absolute(sweep.config("data", {}, storage=sweep.settings.storage))
    base = dict(sweep.base)
    base["data"] = {**base["data"], "root": config.data.root}
    base["model"] = {**base["model"], "weights": config.model.weights}
    return replace(sweep.stored_at(config.storage, sweep.settings.name), base=base)

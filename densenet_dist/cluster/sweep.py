"""Run a sweep: `tune` prepares its folder, runs the trials and records their results."""

from __future__ import annotations

import bisect
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from densenet_dist.cluster.connection import require_cluster
from densenet_dist.cluster.launch import absolute, prepare_data
from densenet_dist.errors import ConfigError, StorageError
from densenet_dist.lease import Lease, hold
from densenet_dist.run_folder import RunFolder, open_run
from densenet_dist.sweep.definition import Sweep, load_sweep, with_storage
from densenet_dist.sweep.page import write_page
from densenet_dist.sweep.results import (
    SWEEP_FILE,
    TRIAL_PREFIX,
    Note,
    SweepResult,
    Trial,
    Usage,
    add_epoch,
    best_trial,
    format_results,
    read_usage,
    trials_on_record,
)
from densenet_dist.trackers.tracker import require_trackers
from densenet_dist.train.context import Event

_WRITE_EVERY_S = 5.0


def tune(sweep: Sweep, *, resume: bool = False, listener: Callable[[Event], None] | None = None) -> SweepResult:
    """Run the trials of a sweep.

    Args:
        sweep: from `densenet_dist.load_sweep`.
        resume: resume the sweep of that name, if there is one, instead of raising an error. Trials that ended are not
            run again, interrupted ones continue from their last checkpoints. A larger `trials` extends the sweep.
        listener: called with every event; by default they are shown on the console.

    Returns:
        The trials and the best of them. The sweep's folder then has sweep.json, sweep.csv, sweep.html and best.yaml.

    Raises:
        ConfigError, EnvironmentProblem, DataError, StorageError: before any work is lost.
        KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP, once all resources are released and the results are written.
    """
    if listener is None:
        from densenet_dist.sweep.console import SweepConsole

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
    recorded = trials_on_record(folder, sweep)
    usage = read_usage(folder) if recorded else Usage()
    remaining = len(recorded) < sweep.trials or any(trial.status == "interrupted" for trial in recorded)
    ended_by = usage.spent(sweep.settings) if remaining else None
    runs_trials = remaining and ended_by is None
    if runs_trials:
        prepare_data(sweep.config("data", {}))
    folder.write(SWEEP_FILE, sweep.to_yaml())
    listener({"kind": "sweep", "sweep": sweep, "trials": recorded, "folder": folder.uri})
    with SweepRecord(folder, sweep, recorded, usage, listener) as record:
        if runs_trials:
            from densenet_dist.cluster.ray_tune import run_trials

            try:
                ended_by = run_trials(sweep, recorded, usage, lease, record)
            finally:
                if lease.lost is None:
                    folder.remove("ray")
        record.end_running("stopped" if ended_by else "interrupted")
    write_page(folder, sweep, record.trials)  # not after an interruption: a job that is stopped has only seconds
    return SweepResult(sweep, folder.uri, record.trials, best_trial(record.trials, sweep.settings.maximise), ended_by)


def _refuse_used_name(folder: RunFolder) -> None:
    # A sweep that failed before its first trial (no data, no GPU) may be started again under its name.
    if folder.exists() or any(name.startswith(TRIAL_PREFIX) for name in folder.names("")):
        raise StorageError(
            f"the sweep {folder.uri} exists already\n"
            f"  resume it: densenet-dist tune --resume {shlex.quote(folder.location)}\n"
            "  or choose another name: name=NEW"
        )


def open_sweep(folder: str | Path, *settings: str) -> Sweep:
    """Read the sweep of a folder.

    Args:
        folder: its path or URI, or its name under ``runs/``.
        settings: ``trials=N`` to extend it, ``max_hours=H`` or ``max_gpu_hours=H`` to change a budget.

    Raises:
        StorageError: there is no sweep.
        ConfigError: a setting is wrong, or cannot be changed.
    """
    for text in settings:
        if text.partition("=")[0] not in ("trials", "max_hours", "max_gpu_hours"):
            raise ConfigError(
                f"{text}: a resumed sweep has its own sweep.yaml; only trials, max_hours and max_gpu_hours can change"
            )
    found = open_run(folder, SWEEP_FILE, "sweep")
    file = found.fetch(SWEEP_FILE)
    sweep = load_sweep(file, *settings)
    if settings and sweep.trials < (before := load_sweep(file).trials):
        raise ConfigError(f"trials: {sweep.trials}; the sweep has {before} trials and can only be extended")
    return with_storage(sweep, found.storage, found.name)


class SweepRecord:
    """Record a sweep's trials from their events, pass the events on, and write the results every few seconds.

    Writing happens in a thread, so that Tune's loop does not wait for storage. On exit, trials that are still running
    become interrupted and everything is written.

    Args:
        folder: the sweep's folder.
        sweep: what is searched.
        trials: from before.
        usage: time used so far.
        listener: called with ``trial`` events that have the `Trial` itself as ``trial``, the best one so far as
            ``best`` and all as ``all``.
    """

    def __init__(
        self,
        folder: RunFolder,
        sweep: Sweep,
        trials: Sequence[Trial],
        usage: Usage,
        listener: Callable[[Event], None],
    ) -> None:
        self._folder, self._sweep, self._usage, self._listener = folder, sweep, usage, listener
        self.trials = list(trials)
        self._by_name = {trial.name: trial for trial in trials}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._write_regularly, name="sweep record", daemon=True)

    def __enter__(self) -> SweepRecord:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
        self.end_running("interrupted")
        self._write()

    def __call__(self, event: Event) -> None:
        """Handle an event."""
        if event["kind"] != "trial":
            self._listener(event)
            return
        with self._lock:
            trial = self._by_name.get(event["name"])
            if trial is None:
                trial = self._by_name[event["name"]] = Trial(event["name"], event["overrides"])
                bisect.insort(self.trials, trial, key=attrgetter("name"))
            self._update(trial, event["state"], event["figures"], event["cause"])
        best = best_trial(self.trials, self._sweep.settings.maximise)
        self._listener({"kind": "trial", "state": event["state"], "trial": trial, "best": best, "all": self.trials})

    def _update(self, trial: Trial, state: Any, figures: Mapping[str, Any], cause: str | None) -> None:
        settings = self._sweep.settings
        trial.cause = cause
        trial.parameters = figures.get("parameters", trial.parameters)
        if figures.get("epoch", 0) > trial.epochs:
            add_epoch(trial, figures, settings.metric, settings.maximise)
        if state == "running":
            trial.status = "running"
        elif state != "epoch":
            trial.figures |= {key: value for key, value in figures.items() if key.startswith("test/")}
            self._end(trial, state)

    def _end(self, trial: Trial, status: Any) -> None:
        run = RunFolder(self._sweep.folder, trial.name)
        trial.status = status
        if not run.exists():
            return
        if status in ("stopped", "failed"):
            Note(trial.overrides, status, trial.cause, trial.parameters).write(run)
        else:  # whether it finished is in its summary, and an interrupted one may be resumed
            Note(trial.overrides, parameters=trial.parameters).write(run)

    def end_running(self, status: Any) -> None:
        """Set the status of trials that are still running."""
        with self._lock:
            for trial in self.trials:
                if trial.status == "running" and status == "stopped":
                    self._end(trial, status)
                elif trial.status == "running":
                    trial.status = status

    def _write_regularly(self) -> None:
        while not self._closed.wait(_WRITE_EVERY_S):
            with suppress(StorageError):  # a passing fault, or writing at the end will report it
                self._write()

    def _write(self) -> None:
        with self._lock:
            files = format_results(self._sweep, self.trials, self._usage)
        self._folder.guard()
        for name, text in files.items():
            self._folder.write(name, text)


def _absolute(sweep: Sweep) -> Sweep:
    config = absolute(sweep.config("data", {}, storage=sweep.settings.storage))
    places = {"data": {"root": config.data.root}, "model": {"weights": config.model.weights}}
    base = {**sweep.base, **{section: {**sweep.base[section], **place} for section, place in places.items()}}
    return replace(with_storage(sweep, config.storage, sweep.settings.name), base=base)

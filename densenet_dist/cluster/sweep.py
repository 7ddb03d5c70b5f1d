"""From a sweep file to its results: `tune` prepares the folder, runs the trials, and keeps the record of them."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from densenet_dist.cluster.connection import require_cluster
from densenet_dist.cluster.launch import absolute, prepare_data
from densenet_dist.errors import DamagedRecord, StorageError
from densenet_dist.lease import hold
from densenet_dist.run_folder import RunFolder, open_run
from densenet_dist.sweep.definition import Sweep, load_sweep, with_storage
from densenet_dist.sweep.page import write_page
from densenet_dist.sweep.results import (
    SWEEP_FILE,
    TRIAL_PREFIX,
    SweepResult,
    Trial,
    add_epoch,
    best_trial,
    read_figures,
    trials_on_record,
    write_note,
    write_results,
)
from densenet_dist.trackers.tracker import require_trackers
from densenet_dist.train.context import Event

_WRITE_EVERY_S = 5.0


def tune(sweep: Sweep, *, resume: bool = False, listener: Callable[[Event], None] | None = None) -> SweepResult:
    """Run a sweep's trials, or what is left of them.

    Args:
        sweep: from `densenet_dist.load_sweep`.
        resume: go on with the sweep of that name instead of refusing to touch it. Trials that ended are not run again,
            others go on from their last checkpoints.
        listener: called with every event; by default they are shown on the console.

    Returns:
        The trials, and the best of them. The sweep's folder then has sweep.json, sweep.csv, sweep.html and best.yaml.

    Raises:
        ConfigError, EnvironmentProblem, DataError, StorageError: before any work is lost.
        KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP, once all is given back; the record is whole.
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
    with hold(folder, listener):
        return _tune(sweep, folder, resume, listener)


def _tune(sweep: Sweep, folder: RunFolder, resume: bool, listener: Callable[[Event], None]) -> SweepResult:
    from densenet_dist.cluster.ray_tune import run_trials

    prepare_data(sweep.config("data", {}))
    if not resume:
        folder.write(SWEEP_FILE, sweep.to_yaml())
    recorded = trials_on_record(folder, sweep) if resume else []
    record = Record(folder, sweep, recorded, listener)
    listener({"kind": "sweep", "sweep": sweep, "trials": recorded, "folder": folder.uri})
    try:
        ended_by = run_trials(sweep, recorded, record)
    except BaseException:
        record.close("interrupted")  # no page: a job that is stopped has seconds
        folder.remove("ray")
        raise
    record.close("stopped" if ended_by else "interrupted")
    folder.remove("ray")
    write_page(folder, sweep, record.trials)
    return SweepResult(sweep, folder.uri, record.trials, best_trial(record.trials, sweep.settings.maximise), ended_by)


def _refuse_used_name(folder: RunFolder) -> None:
    # What failed before its first trial (no data, no GPU) has left nothing worth keeping, and may be started again.
    if folder.exists() or any(name.startswith(TRIAL_PREFIX) for name in folder.names("")):
        raise StorageError(
            f"the sweep {folder.uri} exists already\n"
            f"  go on with it: densenet-dist tune --resume {shlex.quote(folder.location)}\n"
            "  or choose another name: name=NEW"
        )


def open_sweep(folder: str | Path) -> Sweep:
    """The sweep of a folder: its path or URI, or its name under ``runs/``.

    Raises:
        StorageError: where there is no sweep.
    """
    found = open_run(folder, SWEEP_FILE, "sweep")
    return with_storage(load_sweep(found.fetch(SWEEP_FILE)), found.storage, found.name)


class Record:
    """Keeps the record of a sweep as its trials tell of themselves, and passes their events on.

    Args:
        folder: the sweep's.
        sweep: what is searched.
        trials: of before.
        listener: hears ``trial`` events with the `Trial` itself as ``trial``, and the best so far as ``best``.
    """

    def __init__(
        self, folder: RunFolder, sweep: Sweep, trials: Sequence[Trial], listener: Callable[[Event], None]
    ) -> None:
        self._folder, self._sweep, self._listener = folder, sweep, listener
        self._by_name = {trial.name: trial for trial in trials}
        self._ended = {trial.name for trial in trials if trial.status in ("finished", "stopped", "failed")}
        self._written = 0.0

    @property
    def trials(self) -> list[Trial]:
        """All trials, by name."""
        return [self._by_name[name] for name in sorted(self._by_name)]

    def __call__(self, event: Event) -> None:
        """Hear of something."""
        if event["kind"] != "trial":
            self._listener(event)
            return
        if event["name"] in self._ended:
            return  # told again for the scheduler's sake
        trial = self._by_name.setdefault(event["name"], Trial(event["name"], event["overrides"]))
        self._update(trial, event["state"], event)
        settings = self._sweep.settings
        self._listener(
            {
                "kind": "trial",
                "state": event["state"],
                "trial": trial,
                "best": best_trial(self.trials, settings.maximise),
                "all": self.trials,
            }
        )
        self._write(at_once=event["state"] not in ("running", "epoch"))

    def _update(self, trial: Trial, state: str, event: Event) -> None:
        figures: Mapping[str, Any] = event["figures"]
        trial.overrides, trial.cause = event["overrides"], event["cause"]
        trial.parameters = figures.get("parameters", trial.parameters)
        if state == "running":
            trial.status = "running"
        elif state == "epoch":
            if figures["epoch"] not in trial.history:
                add_epoch(trial, figures, self._sweep.settings.metric, self._sweep.settings.maximise)
        else:
            self._end(trial, state)

    def _end(self, trial: Trial, status: Any) -> None:
        run = RunFolder(self._sweep.folder, trial.name)
        if run.exists():
            try:
                read_figures(trial, self._sweep)
            except DamagedRecord as error:
                status, trial.cause = "failed", str(error)
            write_note(run, overrides=trial.overrides, parameters=trial.parameters)
            if status in ("stopped", "failed"):
                write_note(run, status=status, cause=trial.cause)
        trial.status = status
        self._ended.add(trial.name)

    def close(self, status: Any) -> None:
        """Give those that are still running their status, and write everything."""
        for trial in self.trials:
            if trial.status == "running":
                trial.status = status
                if status == "stopped":
                    self._end(trial, status)
        self._write(at_once=True)

    def _write(self, *, at_once: bool) -> None:
        if at_once or time.monotonic() - self._written > _WRITE_EVERY_S:
            self._written = time.monotonic()
            write_results(self._folder, self._sweep, self.trials)


def _absolute(sweep: Sweep) -> Sweep:
    config = absolute(sweep.config("data", {}, storage=sweep.settings.storage))
    base = dict(sweep.base) | {"data": dict(sweep.base["data"]) | {"root": config.data.root}}
    return replace(with_storage(sweep, config.storage, sweep.settings.name), base=base)

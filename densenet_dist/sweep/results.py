"""The results of a sweep: one record per trial, read from the run folders, and the files written from them."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import AliasChoices, Field

from densenet_dist.config import to_yaml
from densenet_dist.custom import trust_option
from densenet_dist.display.json_lines import finite
from densenet_dist.errors import ConfigError, DamagedRecord
from densenet_dist.run_folder import TRIAL_FILE, RunFolder
from densenet_dist.sweep.definition import Sweep
from densenet_dist.yaml_settings import to_yaml as dump_yaml

SWEEP_FILE: Final = "sweep.yaml"
RESULTS_FILE: Final = "sweep.json"
BEST_FILE: Final = "best.yaml"
PAGE_FILE: Final = "sweep.html"
TRIAL_PREFIX: Final = "trial-"
ERROR: Final = "error"
"""Key of the result of a trial that ended by itself: its `DenseNetDistError`, or None if it finished."""

Status: TypeAlias = Literal["running", "finished", "stopped", "failed", "interrupted"]
"""stopped: by the scheduler; interrupted: by anything else, it can be resumed."""
State: TypeAlias = Status | Literal["epoch"]
"""What an event reports of a trial: its new status, or the end of an epoch."""


@dataclass
class Trial:
    """One trial.

    Attributes:
        name: of its run folder, which is in the sweep's folder.
        overrides: its values of the searched keys, by dotted key.
        status: its status.
        error: why it failed.
        parameters: number of trainable parameters of its model; None if it never started.
        epochs: number of epochs trained.
        seconds: of training, without evaluation.
        metric: the sweep's metric at the best epoch; None before the first epoch.
        best_epoch: that epoch.
        history: the metric after each epoch, by epoch.
        metrics: of the best epoch and, once tested, ``test/...``.
    """

    name: str
    overrides: dict[str, Any]
    status: Status = "running"
    error: str | None = None
    parameters: int | None = None
    epochs: int = 0
    seconds: float = 0.0
    metric: float | None = None
    best_epoch: int | None = None
    history: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep; a notebook shows its trials as a table.

    Attributes:
        sweep: what was searched.
        folder: the sweep's folder, a path or URI without a query.
        trials: all trials.
        best: the best trial; None if no trial has a value of the metric.
        ended_by: the limit that ended it early; None otherwise.
    """

    sweep: Sweep
    folder: str
    trials: Sequence[Trial]
    best: Trial | None
    ended_by: str | None

    @property
    def status(self) -> str:
        """How it ended, as a message."""
        return self.ended_by or "finished"

    def figures(self) -> dict[str, str]:
        """The results that the console shows at the end."""
        statuses = ("stopped", "failed", "interrupted")
        count = {status: sum(trial.status == status for trial in self.trials) for status in statuses}
        also = "".join(f", {number} {status}" for status, number in count.items() if number)
        found = {"trials": f"{len(self.trials)}{also}"}
        if self.best is not None:
            found["best trial"] = f"{self.best.name}   ({self.sweep.settings.metric} {self.best.metric:.4f})"
        return found

    def files(self) -> dict[str, str]:
        """The files and folders that the console shows at the end."""
        found = {"sweep folder": self.folder, "page": f"{self.folder}/{PAGE_FILE}"}
        found["results"] = f"{self.folder}/{RESULTS_FILE}"
        return found if self.best is None else found | {"best": self._best_file}

    def commands(self) -> dict[str, str]:
        """The commands that the console suggests at the end."""
        again = f"densenet-dist train {shlex.quote(self._best_file)}{trust_option()}"
        train = {} if self.best is None else {"train it again": again}
        if self.ended_by is not None:
            train["resume"] = f"densenet-dist tune --resume {shlex.quote(self.sweep.folder)}{trust_option()}"
        return train | {"TensorBoard": f"tensorboard --logdir {shlex.quote(self.folder)}"}

    @property
    def _best_file(self) -> str:
        query = self.sweep.settings.storage.partition("?")[1:] if "://" in self.folder else ()
        return "".join((self.folder, "/", BEST_FILE, *query))

    def _repr_html_(self) -> str:
        """Return a table of the trials, the best one in bold, for IPython."""
        from densenet_dist.pages import escape
        from densenet_dist.sweep.display import format_metric, shown

        heads = "".join(f"<th>{head}</th>" for head in ("trial", "status", "metric", "epochs", "settings"))
        rows = []
        for trial in self.trials:
            settings = ", ".join(f"{key}={shown(value)}" for key, value in trial.overrides.items())
            cells = [trial.name, trial.status, format_metric(trial.metric), str(trial.epochs), trial.error or settings]
            style = ' style="font-weight:bold"' if trial is self.best else ""
            rows.append(f"<tr{style}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
        return f"<table><tr>{heads}</tr>{''.join(rows)}</table>"


def add_epoch(trial: Trial, record: Mapping[str, Any], metric: str, maximize: bool) -> None:
    """Add an epoch's record of metrics.jsonl to a trial."""
    trial.epochs = int(record["epoch"])
    trial.seconds += record.get("seconds", 0.0)
    value = record.get(metric)
    if value is None or not math.isfinite(value):
        return
    trial.history[trial.epochs] = value
    better = trial.metric is None or (value > trial.metric if maximize else value < trial.metric)
    if better:
        trial.metric, trial.best_epoch = value, trial.epochs
        tested = {key: value for key, value in trial.metrics.items() if key.startswith("test/")}
        trial.metrics = {key: value for key, value in record.items() if "/" in key} | tested


@dataclass(frozen=True)
class TrialFile:
    """The content of trial.json, which the sweep keeps in the run folder; see `Trial` for the fields."""

    overrides: dict[str, Any]
    status: Status | None = None
    error: Annotated[str | None, Field(validation_alias=AliasChoices("error", "cause"))] = None  # cause: older sweeps
    parameters: int | None = None

    def write(self, run: RunFolder) -> None:
        """Write trial.json."""
        run.write(TRIAL_FILE, json.dumps(asdict(self), indent=1) + "\n")


def trials_on_record(folder: RunFolder, sweep: Sweep) -> list[Trial]:
    """Read all trials of a sweep's folder, in order of their names.

    Trials that did not end are interrupted. A trial with damaged files has failed; it may lack overrides.
    """
    trials = []
    for name in sorted(name for name in folder.names("") if re.fullmatch(rf"{TRIAL_PREFIX}\d+", name)):
        run = RunFolder(sweep.folder, name)
        if run.exists():
            trial = Trial(name, {})
            try:
                file = run.read(TRIAL_FILE, TrialFile)
                if file is None:
                    raise DamagedRecord(f"{run.uri}/{TRIAL_FILE} is missing")
                trial = Trial(name, file.overrides, file.status or "interrupted", file.error, file.parameters)
                sweep.config(name, file.overrides)
                for record in run.read_records():
                    if "train/loss" in record:
                        add_epoch(trial, record, sweep.settings.metric, sweep.settings.maximize)
                    trial.metrics |= {key: value for key, value in record.items() if key.startswith("test/")}
                if run.read_summary():
                    trial.status = "finished"
            except (DamagedRecord, ConfigError) as error:
                trial.status, trial.error = "failed", str(error)
            trials.append(trial)
    return trials


def ranked(trials: Sequence[Trial], maximize: bool) -> list[Trial]:
    """Sort trials: best first, then those without a value of the metric, failed ones last."""
    sign = -1.0 if maximize else 1.0

    def rank(trial: Trial) -> tuple[bool, float]:
        return trial.status == "failed", math.inf if trial.metric is None else sign * trial.metric

    return sorted(trials, key=rank)


def best_trial(trials: Sequence[Trial], maximize: bool) -> Trial | None:
    """Return the best trial that did not fail and has a value of the metric."""
    found = [(trial.metric, trial) for trial in trials if trial.metric is not None and trial.status != "failed"]
    best = (max if maximize else min)(found, key=itemgetter(0), default=None)
    return None if best is None else best[1]


def results(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the content of sweep.json."""
    settings = sweep.settings
    best = best_trial(trials, settings.maximize)
    return {
        "sweep": settings.name,
        "metric": settings.metric,
        "mode": "max" if settings.maximize else "min",
        "best": best.name if best else None,
        "trials": [finite(vars(trial)) for trial in trials],  # asdict would copy each value
    }


def format_results(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, str]:
    """Return the text of sweep.json and, if some trial has a value of the metric, of best.yaml."""
    content = results(sweep, trials)
    lines = ",\n".join(map(json.dumps, content.pop("trials")))  # one per trial: json.dumps is slow with an indent
    files = {RESULTS_FILE: f'{json.dumps(content)[:-1]}, "trials": [\n{lines}\n]}}\n'}
    best = best_trial(trials, sweep.settings.maximize)
    return files if best is None else files | {BEST_FILE: best_yaml(sweep, best)}


def best_yaml(sweep: Sweep, trial: Trial) -> str:
    """Return the best trial's configuration for `train`, under another name and outside the sweep's folder."""
    config = sweep.config(f"{sweep.settings.name}-best", trial.overrides, storage=sweep.settings.storage)
    settings = sweep.settings
    lines = [
        f"The best of {settings.name}: {trial.name}, {settings.metric} {trial.metric:.4f}, epoch {trial.best_epoch}.",
        *(f"  {line}" for line in dump_yaml(trial.overrides).splitlines()),
    ]
    return "".join(f"# {line}\n" for line in lines) + to_yaml(config)

"""What a sweep has found: one record a trial, read from the trials' own run folders, and the files made of them."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal, TypeAlias

from densenet_dist.config import to_yaml
from densenet_dist.errors import ConfigError, DamagedRecord
from densenet_dist.run_folder import CONFIG_FILE, TRIAL_FILE, RunFolder
from densenet_dist.sweep.definition import Sweep
from densenet_dist.yaml_settings import flatten, read_yaml
from densenet_dist.yaml_settings import to_yaml as dump_yaml

SWEEP_FILE: Final = "sweep.yaml"
RESULTS_FILE: Final = "sweep.json"
TABLE_FILE: Final = "sweep.csv"
BEST_FILE: Final = "best.yaml"
PAGE_FILE: Final = "sweep.html"
TRIAL_PREFIX: Final = "trial-"

Status: TypeAlias = Literal["running", "finished", "stopped", "failed", "interrupted"]
"""stopped: by the scheduler or a budget; interrupted: neither, it can go on."""


@dataclass
class Trial:
    """One trial.

    Attributes:
        name: of its run folder, in the sweep's.
        overrides: its values of the space, by dotted key; with population based training those of its end.
        status: what became of it.
        cause: why it failed.
        parameters: trainable ones of its model; None where it never started.
        epochs: that it trained.
        seconds: of training, evaluation excluded.
        metric: the sweep's, at its best epoch; None before the first.
        best_epoch: which that was.
        history: the metric after each epoch, by epoch.
        figures: of the best epoch and, where it was tested, ``test/...``.
        origin: the trial whose weights it took over last (population based training).
    """

    name: str
    overrides: dict[str, Any]
    status: Status = "running"
    cause: str | None = None
    parameters: int | None = None
    epochs: int = 0
    seconds: float = 0.0
    metric: float | None = None
    best_epoch: int | None = None
    history: dict[int, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    origin: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """A sweep's end; a notebook shows its trials as a table.

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
        query = self.sweep.settings.storage.partition("?")[1:] if "://" in self.folder else ()
        return "".join((self.folder, "/", BEST_FILE, *query))

    def _repr_html_(self) -> str:
        """What a notebook shows: the trials, the best one in bold."""
        from densenet_dist.pages.render import escape
        from densenet_dist.sweep.console import figure, shown

        heads = "".join(f"<th>{head}</th>" for head in ("trial", "status", "metric", "epochs", "settings"))
        rows = []
        for trial in self.trials:
            settings = ", ".join(f"{key}={shown(value)}" for key, value in trial.overrides.items())
            cells = [trial.name, trial.status, figure(trial.metric), str(trial.epochs), trial.cause or settings]
            style = ' style="font-weight:bold"' if trial is self.best else ""
            rows.append(f"<tr{style}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
        return f"<table><tr>{heads}</tr>{''.join(rows)}</table>"


def add_epoch(trial: Trial, record: Mapping[str, Any], metric: str, maximise: bool) -> None:
    """Count an epoch's record of metrics.jsonl in."""
    trial.epochs = int(record["epoch"])
    trial.seconds += record.get("seconds", 0.0)
    value = record.get(metric)
    if value is None or not math.isfinite(value):
        return
    trial.history[trial.epochs] = value
    better = trial.metric is None or (value > trial.metric if maximise else value < trial.metric)
    if better:
        trial.metric, trial.best_epoch = value, trial.epochs
        tested = {key: value for key, value in trial.figures.items() if key.startswith("test/")}
        trial.figures = {key: value for key, value in record.items() if "/" in key} | tested


def read_figures(trial: Trial, sweep: Sweep) -> None:
    """Take a trial's figures anew from its run folder, which is the truth whatever was reported.

    Raises:
        DamagedRecord: a file in it is damaged.
    """
    run = RunFolder(sweep.folder, trial.name)
    trial.epochs, trial.seconds, trial.metric, trial.best_epoch = 0, 0.0, None, None
    trial.history, trial.figures = {}, {}
    taken = read_note(run).taken
    trial.origin = None if taken is None else taken[0]
    for record in run.read_records():
        if "train/loss" in record:
            add_epoch(trial, record, sweep.settings.metric, sweep.settings.maximise)
        trial.figures |= {key: value for key, value in record.items() if key.startswith("test/")}
    if run.read_summary():
        trial.status = "finished"


@dataclass(frozen=True)
class Note:
    """trial.json: what the sweep knows of a run; `taken` is the trial and checkpoint it took over, its overrides."""

    overrides: dict[str, Any] = field(default_factory=dict)
    status: Status | None = None
    cause: str | None = None
    parameters: int | None = None
    taken: tuple[str, str, dict[str, Any]] | None = None


def read_note(run: RunFolder) -> Note:
    """Read trial.json; a missing or damaged one says nothing."""
    return run.read(TRIAL_FILE, Note, strict=False) or Note()


def write_note(run: RunFolder, **changes: Any) -> None:
    """Change some of it.

    Raises:
        StorageError: where it cannot be written.
    """
    run.write(TRIAL_FILE, json.dumps(asdict(replace(read_note(run), **changes)), indent=1) + "\n")


def trials_on_record(folder: RunFolder, sweep: Sweep) -> list[Trial]:
    """All trials that have a folder in the sweep's, in order of their names.

    Those that did not end are interrupted. One whose files are damaged has failed; without overrides, if they are lost.
    """
    trials = []
    for name in sorted(name for name in folder.names("") if re.fullmatch(rf"{TRIAL_PREFIX}\d+", name)):
        run = RunFolder(sweep.folder, name)
        note = read_note(run)
        if run.exists():
            trial = Trial(name, {}, note.status or "interrupted", note.cause, note.parameters)
            try:
                values = {} if note.overrides else flatten(read_yaml(run.fetch(CONFIG_FILE)))
                overrides = note.overrides or {key: values.get(key) for key in sweep.space}
                sweep.config(name, overrides)
                trial.overrides = overrides
                read_figures(trial, sweep)
            except (DamagedRecord, ConfigError) as error:
                trial.status, trial.cause = "failed", str(error)
            trials.append(trial)
    return trials


def ranked(trials: Sequence[Trial], maximise: bool) -> list[Trial]:
    """Best first; then those that failed, and those without a figure, in their order."""
    sign = -1.0 if maximise else 1.0

    def rank(trial: Trial) -> tuple[bool, float]:
        return trial.status == "failed", math.inf if trial.metric is None else sign * trial.metric

    return sorted(trials, key=rank)


def best_trial(trials: Sequence[Trial], maximise: bool) -> Trial | None:
    """The best of those that did not fail and have their figures."""
    judged = [trial for trial in trials if trial.metric is not None and trial.status != "failed"]
    return ranked(judged, maximise)[0] if judged else None


def write_results(folder: RunFolder, sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Write sweep.json, sweep.csv and, where some trial has a figure, best.yaml.

    Raises:
        StorageError: where they cannot be written.
    """
    settings = sweep.settings
    best = best_trial(trials, settings.maximise)
    content = {
        "sweep": settings.name,
        "metric": settings.metric,
        "mode": "max" if settings.maximise else "min",
        "best": best.name if best else None,
        "trials": [asdict(trial) for trial in trials],
    }
    folder.write(RESULTS_FILE, json.dumps(content, indent=1) + "\n")
    folder.write(TABLE_FILE, _csv(sweep, ranked(trials, settings.maximise)))
    if best is not None:
        folder.write(BEST_FILE, best_yaml(sweep, best))


def best_yaml(sweep: Sweep, trial: Trial) -> str:
    """A configuration that `train` takes as it is: the best trial's, under a name and in a place of its own."""
    config = sweep.config(f"{sweep.settings.name}-best", trial.overrides, storage=sweep.settings.storage)
    settings = sweep.settings
    said = [
        f"The best of {settings.name}: {trial.name}, {settings.metric} {trial.metric:.4f}, epoch {trial.best_epoch}.",
        *(f"  {line}" for line in dump_yaml(trial.overrides).splitlines()),
    ]
    if trial.origin is not None:
        said.append(f"Its settings changed on the way, and its weights came from {trial.origin}: see sweep.json.")
    return "".join(f"# {line}\n" for line in said) + to_yaml(config)


def _csv(sweep: Sweep, trials: Sequence[Trial]) -> str:
    figures = sorted({key for trial in trials for key in trial.figures})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["trial", "status", *sweep.space, "parameters", "epochs", "seconds", "best_epoch", *figures, "cause"]
    writer.writerow(map(_as_text, columns))
    for trial in trials:
        values = [trial.overrides.get(key) for key in sweep.space]
        measured = [trial.figures.get(key) for key in figures]
        row = [trial.name, trial.status, *values, trial.parameters, trial.epochs, round(trial.seconds, 3)]
        writer.writerow(map(_as_text, [*row, trial.best_epoch, *measured, trial.cause]))
    return text.getvalue().encode(errors="replace").decode()  # a cause may name a file whose name is no UTF-8


def _as_text(value: Any) -> Any:
    """The value of a cell; text that a spreadsheet would take for a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value

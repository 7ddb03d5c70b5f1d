"""Output of a sweep: a line per trial, a status line on terminals and a table at the end; or JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.status import Status
from rich.table import Table

from densenet_dist.display.console import LastingConsole, print_closing
from densenet_dist.display.json_lines import JsonLines
from densenet_dist.display.progress import pluralize, wrapped
from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.results import SweepResult, Trial, ranked, results

if TYPE_CHECKING:  # it imports torch
    from densenet_dist.train.context import Event


class SweepConsole:
    """Show the events of a sweep; see `densenet_dist.cluster.sweep`."""

    def __init__(self, quiet: bool = False) -> None:
        # Without a terminal, rich would limit tables to 80 columns.
        width = None if sys.stdout.isatty() else 200
        self._console = LastingConsole(quiet=quiet, width=width)
        self._status = Status("", console=self._console, spinner="line")
        self._metric, self._total = "", 0

    def __enter__(self) -> SweepConsole:
        return self

    def __exit__(self, *error: object) -> None:
        self._status.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if event["kind"] == "sweep":
            self._begin(event["sweep"], event["trials"], event["folder"])
        elif event["kind"] == "note":
            self._console.note(event)
        elif event["kind"] == "trial":
            if event["state"] not in ("running", "epoch"):
                self._console.print(self._line(event["trial"], event["best"]), markup=False)
            if self._console.animates:
                self._status.update(self._summary(event["all"], event["best"]))
                self._status.start()

    def _begin(self, sweep: Sweep, recorded: Sequence[Trial], folder: str) -> None:
        settings = sweep.settings
        self._metric, self._total = settings.metric, max(sweep.trials, len(recorded))
        self._console.say(
            f"{self._total} trials, {settings.search.name} search, {settings.scheduler.name}, "
            f"{'highest' if settings.maximize else 'lowest'} {settings.metric}; folder {folder}"
        )
        for key, domain in sweep.space.items():
            self._console.say(f"  {key}: {shown(domain.describe())}")
        if recorded:
            known = ended(recorded)
            self._console.say(f"resumed: {pluralize(known, 'trial')} ended, {len(recorded) - known} to resume")

    def _line(self, trial: Trial, best: Trial | None) -> str:
        epochs = pluralize(trial.epochs, "epoch")
        what = {"stopped": f"stopped after {epochs}", "finished": f"finished {epochs}"}
        parts = [
            f"{trial.name}  {what.get(trial.status, trial.status):<24}",
            f"{self._metric} {format_metric(trial.metric)}",
        ]
        parts += [f"{short(key)}={shown(value)}" for key, value in trial.overrides.items()]
        lines = wrapped([*parts, "*"] if best is trial else parts, self._console.line_width, indent="  ")
        return "\n".join(lines if trial.error is None else [*lines, f"  {trial.error}"])

    def _summary(self, trials: Sequence[Trial], best: Trial | None) -> str:
        running = [trial for trial in trials if trial.status == "running"]
        now = ", ".join(f"{trial.name} epoch {trial.epochs}" for trial in running[:4])
        text = f"{ended(trials)} of {self._total} trials ended; running: {now or 'none'}"
        return text if best is None else f"{text}; best {self._metric} {format_metric(best.metric)} ({best.name})"

    def finish(self, result: SweepResult) -> None:
        """Print all trials, the best one, the files written and the commands to continue with.

        The trials are listed without their settings if the terminal is too narrow.
        """
        self._status.stop()
        keys = list(result.sweep.space)
        unbounded = self._console.options.update(max_width=10_000)
        wanted = self._console.measure(_table(result, keys, errors=False), options=unbounded).maximum
        if wanted > self._console.line_width:
            keys = []
        self._console.print()
        self._console.print(_table(result, keys, errors=any(trial.error for trial in result.trials)))
        title = f"{result.status}: {result.sweep.settings.name}"
        print_closing(self._console, title, result.figures(), result.files(), result.commands())


def _table(result: SweepResult, keys: Sequence[str], *, errors: bool) -> Table:
    settings = result.sweep.settings
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("trial", "status", settings.metric, "epoch", *map(short, keys), *["error"] * errors):
        table.add_column(heading, overflow="fold")
    for trial in ranked(result.trials, settings.maximize):
        values = [shown(trial.overrides.get(key)) for key in keys]
        best = "" if trial.best_epoch is None else f"{trial.best_epoch} of {trial.epochs}"
        error = [trial.error or ""] * errors
        table.add_row(trial.name, trial.status, format_metric(trial.metric), best, *values, *error)
    return table


class SweepJsonLines(JsonLines):
    """Write the notes of a sweep, and at its end its results, as JSON lines; see docs/commands.md."""

    def __call__(self, event: Event) -> None:
        """Write a note; ignore other events."""
        if event["kind"] == "note":
            self.note(event)

    def finish(self, result: SweepResult) -> None:
        """Write how the sweep ended, its folder and the content of sweep.json."""
        self.emit("end", status=result.status, folder=result.folder, **results(result.sweep, result.trials))


def ended(trials: Sequence[Trial]) -> int:
    """Count the trials that ended."""
    return sum(trial.status not in ("running", "interrupted") for trial in trials)


def format_metric(value: float | None) -> str:
    """Format a value of the metric, or a dash if there is none."""
    return "-" if value is None else f"{value:.4f}"


def short(key: str) -> str:
    """Shorten a dotted key to its last part, or to two parts if that is ``name``."""
    *before, last = key.split(".")
    return f"{before[-1]}.{last}" if last == "name" and before else last


def shown(value: Any) -> str:
    """Format the value of a setting briefly."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    return str(value)

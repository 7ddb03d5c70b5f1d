"""The page of a sweep: everything in one HTML file, pictures included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from densenet_dist.pages.frame import BEST, cell, code, details, document, escape, facts, section, table
from densenet_dist.run_folder import RunFolder
from densenet_dist.sweep.console import short, shown
from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.metric import Metric
from densenet_dist.sweep.plots import draw_plots, has_numbers
from densenet_dist.sweep.results import (
    BEST_FILE,
    PAGE_FILE,
    RESULTS_FILE,
    TABLE_FILE,
    Status,
    Trial,
    best_trial,
    ranked,
)

_STATUSES: Final[tuple[Status, ...]] = ("finished", "stopped", "failed", "interrupted", "running")
_LONGEST_CAUSE: Final = 2000
_TEST: Final = "test/top1"


def write_page(folder: RunFolder, sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Write sweep.html: what came out, all trials as a table, plots, and the sweep's settings.

    Raises:
        StorageError: where it cannot be written.
    """
    trials = [_finite(trial) for trial in trials]
    best = best_trial(trials, sweep.settings.maximise)
    parts = [
        f"<h1>{escape(sweep.settings.name)}</h1>",
        _facts(folder, sweep, trials, best),
        _table(sweep, trials, best),
        *(section(plot.title, plot.caption, plot.pictures, plot.legend) for plot in draw_plots(sweep, trials, best)),
        details("Settings of the sweep", f"<pre>{escape(sweep.to_yaml())}</pre>"),
    ]
    folder.write(PAGE_FILE, document(sweep.settings.name, parts))


def _finite(trial: Trial) -> Trial:
    """The trial without figures that cannot be drawn or ranked."""
    history = {epoch: value for epoch, value in trial.history.items() if math.isfinite(value)}
    metric = trial.metric if trial.metric is not None and math.isfinite(trial.metric) else None
    return replace(trial, history=history, metric=metric)


def _facts(folder: RunFolder, sweep: Sweep, trials: Sequence[Trial], best: Trial | None) -> str:
    settings = sweep.settings
    metric = Metric(settings.metric, settings.maximise)
    counts = {status: sum(trial.status == status for trial in trials) for status in _STATUSES}
    found = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    rows = {
        "Trials": escape(f"{len(trials)} of {max(sweep.trials, len(trials))}" + (f": {found}" if found else "")),
        "Metric": escape(
            f"{settings.metric} of each trial's best epoch; {'highest' if settings.maximise else 'lowest'} is best"
        ),
        "Search": escape(_search(sweep)),
        "Scheduler": escape(_scheduler(sweep)),
        "Best trial": "None: no trial that did not fail has a figure.",
    }
    if best is not None and best.metric is not None:
        text = f"{best.name}: {metric.text(best.metric)} at epoch {best.best_epoch} of {best.epochs}"
        if _TEST in best.figures:
            text += f"; test top-1 {best.figures[_TEST] * 100:.2f}\N{NO-BREAK SPACE}%"
        values = ", ".join(f"{key} {shown(best.overrides.get(key))}" for key in sweep.space)
        rows["Best trial"] = f"<strong>{escape(text)}</strong>"
        rows["Its settings"] = escape(values) + (
            escape(f". They changed on the way, and its weights came from {best.origin}.") if best.origin else ""
        )
        rows["Train it again"] = code("densenet-dist", "train", f"{folder.uri}/{BEST_FILE}")
    if counts["interrupted"] or counts["running"] or len(trials) < sweep.trials:
        rows["Go on"] = code("densenet-dist", "tune", "--resume", folder.uri)
    rows["Figures"] = f"<code>{escape(folder.uri)}/</code> has {RESULTS_FILE} and {TABLE_FILE}."
    return facts(rows)


def _search(sweep: Sweep) -> str:
    search = sweep.settings.search
    if search.name == "grid":
        return "grid"
    return f"{search.name}, seed {search.seed}" + (
        f", the first {search.startup_trials} at random" if search.name == "optuna" else ""
    )


def _scheduler(sweep: Sweep) -> str:
    wanted = sweep.settings.scheduler
    said = {
        "fifo": "every trial to its end",
        "asha": f"from epoch {wanted.grace_epochs} on, one of {wanted.reduction_factor} goes on from each rung",
        "median": f"from epoch {wanted.grace_epochs} on, trials above the median of at least {wanted.min_trials} go on",
        "pbt": f"every {wanted.perturb_epochs} epochs the worst {wanted.quantile:.0%} take over weights from the best",
    }
    return f"{wanted.name}: {said[wanted.name]}"


def _table(sweep: Sweep, trials: Sequence[Trial], best: Trial | None) -> str:
    metric = Metric(sweep.settings.metric, sweep.settings.maximise)
    tested = any(_TEST in trial.figures for trial in trials)
    caused = any(trial.cause for trial in trials)
    name = f"{metric.name} (%)" if metric.percent else metric.name
    heads = ["trial", "status", name, "best epoch", *map(short, sweep.space), "parameters", "seconds"]
    heads += ["test top-1 (%)"] * tested + ["cause of failure"] * caused
    words = {
        "trial",
        "status",
        "cause of failure",
        *(short(key) for key in sweep.space if not has_numbers(sweep.space[key])),
    }
    judged = [trial for trial in trials if trial.status != "failed"]
    failed = [trial for trial in trials if trial.status == "failed"]
    order = ranked(judged, metric.maximise) + ranked(failed, metric.maximise)
    rows = [_row(sweep, metric, trial, tested, caused, trial is best) for trial in order]
    note = (
        "Best first, failed trials last; a click on a heading sorts. Stopped: by the scheduler or a budget. "
        "Interrupted: by neither, such a trial can go on. Seconds are of training, evaluation excluded."
    )
    note += " Test figures played no part in the ranking." if tested else ""
    columns = [(text, text not in words) for text in heads]
    return f"<h2>All trials</h2><p>{note}</p>" + table(columns, rows)


def _row(sweep: Sweep, metric: Metric, trial: Trial, tested: bool, caused: bool, is_best: bool) -> str:
    epoch = "" if trial.best_epoch is None else f"{trial.best_epoch} of {trial.epochs}"
    test = trial.figures.get(_TEST)
    cells = [
        cell(f"★ {trial.name}" if is_best else trial.name, trial.name),
        cell(trial.status),
        cell(
            "" if trial.metric is None else f"{metric.scaled(trial.metric):.{2 if metric.percent else 4}f}",
            trial.metric,
        ),
        cell(epoch, trial.best_epoch),
        *(cell(shown(value) if (value := trial.overrides.get(key)) is not None else "", value) for key in sweep.space),
        cell("" if trial.parameters is None else f"{trial.parameters:,}", trial.parameters),
        cell(f"{trial.seconds:,.1f}", trial.seconds),
    ]
    if tested:
        cells.append(cell("" if test is None else f"{test * 100:.2f}", test))
    if caused:
        cells.append(f"<td>{_cause(trial.cause)}</td>")
    return f"<tr{BEST if is_best else ''}>{''.join(cells)}</tr>"


def _cause(cause: str | None) -> str:
    text = (cause or "").strip()
    first, _, more = text.partition("\n")
    if not more and len(first) <= 160:
        return escape(first)
    if len(text) > _LONGEST_CAUSE:
        text = f"{text[:_LONGEST_CAUSE]} ...\n(the rest is in {RESULTS_FILE})"
    return details(first[:160], f"<pre>{escape(text)}</pre>")

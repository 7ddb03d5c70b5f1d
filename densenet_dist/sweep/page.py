"""The page of a sweep: everything in one HTML file, pictures included."""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from densenet_dist.sweep.console import short, shown
from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.plots import Metric, Plot, draw_plots, has_numbers
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
from densenet_dist.train.run_folder import RunFolder

_STATUSES: Final[tuple[Status, ...]] = ("finished", "stopped", "failed", "interrupted", "running")
_LONGEST_CAUSE: Final = 2000
_TEST: Final = "test/top1"
_BEST: Final = ' class="best"'
_NUMBER: Final = ' class="number"'


def write_page(folder: RunFolder, sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Write sweep.html: what came out, all trials as a table, plots, and the sweep's settings.

    Raises:
        StorageError: where it cannot be written.
    """
    trials = [_finite(trial) for trial in trials]
    best = best_trial(trials, sweep.settings.maximise)
    name = _escape(sweep.settings.name)
    parts = [
        f"<h1>{name}</h1>",
        _facts(folder, sweep, trials, best),
        _table(sweep, trials, best),
        *map(_section, draw_plots(sweep, trials, best)),
        f"<details><summary>Settings of the sweep</summary><pre>{_escape(sweep.to_yaml())}</pre></details>",
    ]
    folder.write(PAGE_FILE, _PAGE % {"name": name, "style": _STYLE, "script": _SCRIPT, "body": "\n".join(parts)})


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
        "Trials": _escape(f"{len(trials)} of {max(sweep.trials, len(trials))}" + (f": {found}" if found else "")),
        "Metric": _escape(
            f"{settings.metric} of each trial's best epoch; {'highest' if settings.maximise else 'lowest'} is best"
        ),
        "Search": _escape(_search(sweep)),
        "Scheduler": _escape(_scheduler(sweep)),
        "Best trial": "None: no trial that did not fail has a figure.",
    }
    if best is not None and best.metric is not None:
        text = f"{best.name}: {metric.text(best.metric)} at epoch {best.best_epoch} of {best.epochs}"
        if _TEST in best.figures:
            text += f"; test top-1 {best.figures[_TEST] * 100:.2f}\N{NO-BREAK SPACE}%"
        values = ", ".join(f"{key} {shown(best.overrides.get(key))}" for key in sweep.space)
        rows["Best trial"] = f"<strong>{_escape(text)}</strong>"
        rows["Its settings"] = _escape(values) + (
            _escape(f". They changed on the way, and its weights came from {best.origin}.") if best.origin else ""
        )
        rows["Train it again"] = _code("densenet-dist", "train", f"{folder.uri}/{BEST_FILE}")
    if counts["interrupted"] or counts["running"] or len(trials) < sweep.trials:
        rows["Go on"] = _code("densenet-dist", "tune", "--resume", folder.uri)
    rows["Figures"] = f"<code>{_escape(folder.uri)}/</code> has {RESULTS_FILE} and {TABLE_FILE}."
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows.items()) + "</dl>"


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


def _section(plot: Plot) -> str:
    legend = "".join(
        f'<li><span style="color:var(--{colour})" aria-hidden="true">{sign}</span> {_escape(text)}</li>'
        for colour, sign, text in plot.legend
    )
    parts = [f"<h2>{_escape(plot.title)}</h2>"]
    if plot.pictures:
        parts.append(f'<ul class="legend">{legend}</ul>' if legend else "")
        parts.append(f'<div class="pictures">{"".join(plot.pictures)}</div>')
    return f"<figure>{''.join(parts)}<figcaption>{_escape(plot.caption)}</figcaption></figure>"


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
    head = "".join(
        f'<th scope="col"{"" if text in words else _NUMBER}><button>{_escape(text)}</button></th>' for text in heads
    )
    judged = [trial for trial in trials if trial.status != "failed"]
    failed = [trial for trial in trials if trial.status == "failed"]
    order = ranked(judged, metric.maximise) + ranked(failed, metric.maximise)
    rows = "\n".join(_row(sweep, metric, trial, tested, caused, trial is best) for trial in order)
    note = (
        "Best first, failed trials last; a click on a heading sorts. Stopped: by the scheduler or a budget. "
        "Interrupted: by neither, such a trial can go on. Seconds are of training, evaluation excluded."
    )
    note += " Test figures played no part in the ranking." if tested else ""
    return (
        f"<h2>All trials</h2><p>{note}</p>"
        f'<div class="table"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>'
    )


def _row(sweep: Sweep, metric: Metric, trial: Trial, tested: bool, caused: bool, is_best: bool) -> str:
    epoch = "" if trial.best_epoch is None else f"{trial.best_epoch} of {trial.epochs}"
    test = trial.figures.get(_TEST)
    cells = [
        _cell(f"★ {trial.name}" if is_best else trial.name, trial.name),
        _cell(trial.status),
        _cell(
            "" if trial.metric is None else f"{metric.scaled(trial.metric):.{2 if metric.percent else 4}f}",
            trial.metric,
        ),
        _cell(epoch, trial.best_epoch),
        *(_cell(shown(value) if (value := trial.overrides.get(key)) is not None else "", value) for key in sweep.space),
        _cell("" if trial.parameters is None else f"{trial.parameters:,}", trial.parameters),
        _cell(f"{trial.seconds:,.1f}", trial.seconds),
    ]
    if tested:
        cells.append(_cell("" if test is None else f"{test * 100:.2f}", test))
    if caused:
        cells.append(f"<td>{_cause(trial.cause)}</td>")
    return f"<tr{_BEST if is_best else ''}>{''.join(cells)}</tr>"


def _cell(text: str, value: Any = None) -> str:
    """A cell that sorts by its number where it has one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td{_NUMBER} data-value="{value!r}">{_escape(text)}</td>'
    return f"<td>{_escape(text)}</td>"


def _cause(cause: str | None) -> str:
    text = (cause or "").strip()
    first, _, more = text.partition("\n")
    if not more and len(first) <= 160:
        return _escape(first)
    if len(text) > _LONGEST_CAUSE:
        text = f"{text[:_LONGEST_CAUSE]} ...\n(the rest is in {RESULTS_FILE})"
    return f"<details><summary>{_escape(first[:160])}</summary><pre>{_escape(text)}</pre></details>"


def _code(*words: str) -> str:
    return f"<code>{_escape(shlex.join(words))}</code>"


def _escape(text: str) -> str:
    """Text for HTML, whatever it holds."""
    clean = "".join(
        letter if letter.isprintable() or letter in "\n\t\xa0" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    return html.escape(clean)


_PAGE: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%(name)s</title>
<style>
%(style)s</style>
</head>
<body>
%(body)s
<script>
%(script)s</script>
</body>
</html>
"""
_STYLE: Final = """\
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --ink: #1d1d1b; --muted: #6e6d69; --grid: #e3e2de; --raised: #f3f2ee;
  --best: #e0570c; --finished: #2a78d6; --stopped: #8a8983; --interrupted: #6a4fc4; --running: #12906a;
  --failed: #c62f3f;
  --shade0: #bfd5ef; --shade1: #a3c4ea; --shade2: #82afe2; --shade3: #5f97d6; --shade4: #3f7dc6; --shade5: #2463ae;
  --shade6: #10407c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #191918; --ink: #ecebe7; --muted: #a2a19b; --grid: #343431; --raised: #242422;
    --best: #f08a3c; --finished: #5a9ff0; --stopped: #8f8e88; --interrupted: #a48df0; --running: #3bbd93;
    --failed: #f0697a;
    --shade0: #34506f; --shade1: #365880; --shade2: #3a6799; --shade3: #4178b8; --shade4: #5c95d6; --shade5: #89b7eb;
    --shade6: #c6defa;
  }
}
body {
  max-width: 76rem; margin: 0 auto; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif;
}
h1 { margin: 0.5rem 0; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 0.4rem; font-size: 1.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1.2rem; margin: 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: 0.88rem/1.5 ui-monospace, monospace; }
pre { margin: 0.4rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
p, figcaption { max-width: 48rem; color: var(--muted); font-size: 0.9rem; margin: 0.4rem 0; }
figure { margin: 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; overflow-x: auto; }
.pictures svg { flex: none; max-width: 100%; height: auto; }
.pictures svg.wide { max-width: none; }
svg * { stroke-linejoin: round; }
svg text {
  font-family: inherit !important; paint-order: stroke; stroke: var(--paper); stroke-width: 3px;
}
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 1.2rem; margin: 0; padding: 0; list-style: none; }
.legend { font-size: 0.9rem; }
.table { max-height: 32rem; overflow: auto; }
thead th { position: sticky; top: 0; background: var(--paper); }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--grid); text-align: left; }
th, td { vertical-align: top; white-space: nowrap; }
td.number, th.number { text-align: right; }
td details { min-width: 18rem; white-space: normal; }
tr.best { background: var(--raised); font-weight: 600; }
th button { padding: 0; border: 0; background: none; color: var(--muted); font: inherit; cursor: pointer; }
th[aria-sort] button { color: var(--ink); }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
details { margin-top: 1.5rem; }
td details { margin-top: 0; }
summary { cursor: pointer; }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.5rem; } }
"""
_SCRIPT: Final = """\
for (const button of document.querySelectorAll("th button")) {
  button.onclick = () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => {
      const cell = row.cells[head.cellIndex];
      return cell.dataset.value ? Number(cell.dataset.value) : cell.textContent.replace("★ ", "");
    };
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");  // what is missing is last either way
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  };
}
"""

"""docs/reliability.md: what was tried, and what came of it."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence

from densenet_dist.chaos.running import Outcome
from densenet_dist.train.environment import cpu_name

_HEAD = """# Reliability

*Kill anything at any time; the final weights are those of the undisturbed run.* This page is written by the command
that tries it, on real processes, real Ray clusters and a real S3 server:

```bash
densenet-dist chaos --out benchmarks/results/reliability.json --page docs/reliability.md
```

`densenet-dist chaos --list` names the cases; given some of the names, it tries only those and keeps what the file says
of the others. What each run does when it is stopped or loses something: [restarts](restarts.md). What is let in:
[security](security.md).

"equal" means that final weights, every line of metrics.jsonl and every curve in TensorBoard are those of a run to which
nothing happened, bit for bit, but for what a clock says. The net has two layers and the images are generated, so that
a run takes seconds; a checkpoint is written after every step unless said otherwise.
"""


def page_of(outcomes: Sequence[Outcome], seed: int) -> str:
    """The page, Markdown."""
    lines = [_HEAD, _summary(outcomes, seed), ""]
    groups = dict.fromkeys(outcome.case.group for outcome in outcomes)
    for group in groups:
        lines += [f"## {group}", "", "| fault | expected | observed | tried | |", "| --- | --- | --- | ---: | --- |"]
        lines += [_row(outcome) for outcome in outcomes if outcome.case.group == group] + [""]
    return "\n".join([*lines, *_figures(outcomes)]).rstrip() + "\n"


def _summary(outcomes: Sequence[Outcome], seed: int) -> str:
    commits = ", ".join(dict.fromkeys(_short(outcome.commit) for outcome in outcomes))
    counts = [sum(outcome.status == status for outcome in outcomes) for status in ("expected", "unexpected", "skipped")]
    tried = sum(outcome.observed.count for outcome in outcomes)
    minutes = sum(outcome.seconds for outcome in outcomes) / 60
    return (
        f"**{len(outcomes)} cases, {tried:,} times tried: {counts[0]} as expected, {counts[1]} not, "
        f"{counts[2]} skipped.** "
        f"{minutes:.0f} minutes on {os.cpu_count()} cores ({cpu_name()}), commit {commits}, seed {seed}."
    )


def _short(commit: str) -> str:
    revision, plus, rest = commit.partition("+")
    return revision[:10] + plus + rest


def _row(outcome: Outcome) -> str:
    cells = [outcome.case.fault, outcome.case.expected, outcome.observed.text.splitlines()[0]]
    mark = {"expected": "as expected", "unexpected": "**not as expected**", "skipped": "skipped"}[outcome.status]
    return "| " + " | ".join([*(_cell(cell) for cell in cells), str(outcome.observed.count), mark]) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _figures(outcomes: Sequence[Outcome]) -> list[str]:
    values: dict[str, list[float]] = {}
    for outcome in outcomes:
        for name, found in outcome.observed.figures.items():
            values.setdefault(name, []).extend(found)
    if not values:
        return []
    lines = ["## Figures", "", "| | median | worst | of |", "| --- | ---: | ---: | ---: |"]
    for name, found in values.items():
        lines.append(f"| {name} | {statistics.median(found):.1f} | {max(found):.1f} | {len(found)} |")
    return lines

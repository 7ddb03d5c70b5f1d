"""docs/reliability.md, made from the results of tests/chaos."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "reliability.json"

MARKS = {"passed": "as expected", "failed": "**not as expected**", "skipped": "skipped"}
HEAD = """# Reliability

*Kill anything at any time; the final weights are those of the undisturbed run.* This page is written by the tests
in `tests/chaos/`, which inject faults into real processes and real Ray clusters, with a real S3 server:

```bash
make chaos                                # all cases, then this page
make chaos ARGS='-k "killed or flipped"'  # some of them; for the others the page keeps what was observed last
```

`pytest tests/chaos -m "nightly or not nightly" --collect-only -q` lists the cases. What each run does when it is
stopped or loses something: [restarts](restarts.md). Which input is checked: [security](security.md).

"equal" means that final weights, every line of metrics.jsonl and every curve in TensorBoard are those of a run to which
nothing happened, bit for bit, except for what depends on the clock. The model has two layers and the images are
generated, so that a run takes seconds; a checkpoint is written after every step unless said otherwise.
"""


def load_results() -> dict[str, dict[str, Any]]:
    """What was observed so far, by the name of the test."""
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def write(page: Path, results: dict[str, dict[str, Any]], machine: str) -> None:
    """Write the results and the page."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    page.write_text(page_of(list(results.values()), machine))


def page_of(cases: Sequence[dict[str, Any]], machine: str) -> str:
    """The page, as Markdown."""
    tried = sum(case["count"] for case in cases)
    passed, failed, skipped = (sum(case["status"] == status for case in cases) for status in MARKS)
    summary = f"**{len(cases)} cases, {tried} times tried: {passed} as expected, {failed} not, {skipped} skipped.**"
    minutes = sum(case["seconds"] for case in cases) / 60
    lines = [HEAD, f"{summary} {minutes:.0f} minutes on {machine}.", ""]
    for group in dict.fromkeys(case["group"] for case in cases):
        lines += [f"## {group}", ""]
        lines += ["| fault | expected | observed | tried | | version |", "| --- | --- | --- | ---: | --- | --- |"]
        lines += [_row(case) for case in cases if case["group"] == group] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _row(case: dict[str, Any]) -> str:
    mark = MARKS[case["status"]]
    observed = (case["observed"].splitlines() or [""])[0]
    cells = [case["fault"], case["expected"], observed, str(case["count"]), mark, f"{case['commit']}, {case['date']}"]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"

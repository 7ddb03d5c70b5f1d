"""docs/reliability.md, made from the results of tests/chaos."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "reliability.json"

MARKS = {"passed": "as expected", "failed": "**not as expected**", "skipped": "skipped"}


def load_results() -> dict[str, dict[str, Any]]:
    """What was observed so far, by the name of the test."""
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def write(page: Path, results: dict[str, dict[str, Any]], machine: str) -> None:
    """Write the results, and the page after what people wrote at its beginning."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    head = PAGE.read_text().partition("\n**")[0]
    page.write_text(f"{head}\n{tables(list(results.values()), machine)}")


def tables(cases: Sequence[dict[str, Any]], machine: str) -> str:
    """All cases, by group, as Markdown."""
    tried = sum(case["count"] for case in cases)
    passed, failed, skipped = (sum(case["status"] == status for case in cases) for status in MARKS)
    summary = f"**{len(cases)} cases, {tried} times tried: {passed} as expected, {failed} not, {skipped} skipped.**"
    minutes = sum(case["seconds"] for case in cases) / 60
    lines = [f"{summary} {minutes:.0f} minutes on {machine}.", ""]
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

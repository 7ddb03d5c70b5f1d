"""Generate docs/reliability.md from the results of tests/chaos."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "reliability.json"
STATUSES = ("passed", "failed", "skipped")


def load_results() -> dict[str, dict[str, Any]]:
    """Read the last observation of each case, by the name of the test."""
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def write(page: Path, results: dict[str, dict[str, Any]], machine: str) -> None:
    """Write the results, and the page: its hand-written head, then the tables."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    head = PAGE.read_text().partition("\n**")[0]
    page.write_text(f"{head}\n{tables(list(results.values()), machine)}")


def tables(cases: Sequence[dict[str, Any]], machine: str) -> str:
    """Format all cases as Markdown, one table per group; cases with the same outcome share a row."""
    tried = sum(case["count"] for case in cases)
    passed, failed, skipped = (sum(case["status"] == status for case in cases) for status in STATUSES)
    summary = f"**{len(cases)} cases, {tried} tries: {passed} as expected, {failed} not, {skipped} skipped.**"
    minutes = sum(case["seconds"] for case in cases) / 60
    versions = Counter(f"{case['commit']} ({case['date']})" for case in cases)
    counts = ", ".join(f"{version}: {count}" for version, count in sorted(versions.items()))
    lines = [f"{summary} {minutes:.0f} minutes on {machine}.", "", f"Cases by commit: {counts}.", ""]
    for group in dict.fromkeys(case["group"] for case in cases):
        outcomes: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for case in cases:
            if case["group"] == group:
                outcomes.setdefault((case["expected"], _observed(case)), []).append(case)
        lines += [f"## {group}", "", "| fault | expected | observed |", "| --- | --- | --- |"]
        for (expected, observed), same in outcomes.items():
            cells = (_faults(same), expected, observed)
            escaped = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
            lines.append(f"| {' | '.join(escaped)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _observed(case: dict[str, Any]) -> str:
    first = (case["observed"].splitlines() or [""])[0]
    return first if case["status"] == "passed" else f"**{case['status']}**: {first}"


def _faults(cases: Sequence[dict[str, Any]]) -> str:
    """Join the faults of a row; those of the form "what: which" name a common "what" once."""
    which: dict[str, list[str]] = {}
    for case in cases:
        head, colon, tail = case["fault"].partition(": ")
        which.setdefault(head + colon, []).append(tail)
    return "; ".join(head + "; ".join(tails) for head, tails in which.items())

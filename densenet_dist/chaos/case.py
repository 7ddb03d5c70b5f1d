"""What a case is, and the list of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from densenet_dist.chaos.lab import Lab, Observed

GROUPS: Final = (
    *("Killed", "Nodes that come and go", "Stopped", "Hung", "Checkpoints", "Two jobs on one folder"),
    *("Another run's checkpoint, other settings", "Hostile input", "Soak"),
)
"""In the order of the page."""

Experiment: TypeAlias = Callable[[Lab], Observed]


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        name: for the command line.
        group: heading on the page.
        fault: what is done.
        expected: what must come of it.
        run: does it; raises `Unexpected` where something else came of it, `Skipped` where it cannot be tried here.
    """

    name: str
    group: str
    fault: str
    expected: str
    run: Experiment


CASES: Final[dict[str, Case]] = {}
"""By name; `in_order` for the page's order."""


def in_order() -> list[Case]:
    """All cases, group by group."""
    return sorted(CASES.values(), key=lambda case: GROUPS.index(case.group))


def case(group: str, fault: str, expected: str) -> Callable[[Experiment], Experiment]:
    """Put a function on the list, under its own name."""

    def register(run: Experiment) -> Experiment:
        add(run.__name__.replace("_", "-"), group, fault, expected, run)
        return run

    return register


def add(name: str, group: str, fault: str, expected: str, run: Experiment) -> None:
    """Put a case on the list."""
    CASES[name] = Case(name, group, fault, expected, run)

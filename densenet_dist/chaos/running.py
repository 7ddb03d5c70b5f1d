"""Runs cases one after the other."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from densenet_dist.chaos import checkpoints, folders, hanging, hostile, killed, nodes, soak, stopped
from densenet_dist.chaos.case import CASES, Case, in_order
from densenet_dist.chaos.lab import Lab, Observed, Skipped, Unexpected
from densenet_dist.errors import ConfigError
from densenet_dist.train.environment import git_commit

MODULES = (killed, nodes, stopped, hanging, checkpoints, folders, hostile, soak)
"""Imported for the cases they hold."""


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        status: expected, unexpected or skipped.
        observed: what was seen; for others than expected ones the reason.
        seconds: that it took.
        commit: of the code.
    """

    case: Case
    status: str
    observed: Observed
    seconds: float
    commit: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"case": self.case.name} | {key: value for key, value in asdict(self).items() if key != "case"}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Outcome | None:
        """The reverse; None where there is no such case any more."""
        case = CASES.get(plain["case"])
        if case is None:
            return None
        return cls(case, plain["status"], Observed(**plain["observed"]), float(plain["seconds"]), plain["commit"])


def choose(names: Sequence[str]) -> list[Case]:
    """The cases of those names, or those whose names begin so; all where none is given.

    Raises:
        ConfigError: where there is none of a name.
    """
    chosen: dict[str, Case] = {}
    for name in names:
        found = {key: case for key, case in CASES.items() if key == name} or {
            key: case for key, case in CASES.items() if key.startswith(name)
        }
        if not found:
            raise ConfigError(f"there is no case {name!r}\n  see them all: densenet-dist chaos --list")
        chosen |= found
    return list(chosen.values()) if names else in_order()


def run_cases(
    cases: Sequence[Case], seed: int, tell: Callable[[Outcome], None], keep: Path | None = None
) -> list[Outcome]:
    """Run them; each has its share of chance from the seed and its name, whichever others are run.

    Args:
        cases: which.
        seed: of all that is chosen by chance.
        tell: called with each outcome.
        keep: where the runs of cases are kept; nowhere by default.
    """
    base = Path(tempfile.mkdtemp(prefix="chaos-"))
    outcomes = []
    shared: Lab | None = None
    try:
        for case in cases:
            shared = shared or Lab(base, seed)
            shared.random.seed(f"{seed}/{case.name}")
            outcomes.append(_run(case, shared))
            tell(outcomes[-1])
    finally:
        if shared is not None:
            shared.close()
        if keep is None:
            shutil.rmtree(base, ignore_errors=True)
        else:
            shutil.move(base, keep)
    return outcomes


def merged(before: Sequence[dict[str, Any]], now: Sequence[Outcome]) -> list[Outcome]:
    """Outcomes of now, and of cases that were not run now those of before, in the order of the page."""
    known = {outcome.case.name: outcome for plain in before if (outcome := Outcome.from_dict(plain))}
    known |= {outcome.case.name: outcome for outcome in now}
    return [known[case.name] for case in in_order() if case.name in known]


def _run(case: Case, lab: Lab) -> Outcome:
    began = time.monotonic()
    try:
        status, observed = "expected", case.run(lab)
    except Skipped as reason:
        status, observed = "skipped", Observed(str(reason), 0)
    except Unexpected as problem:
        status, observed = "unexpected", Observed(str(problem), 0)
    except Exception as error:  # of the case itself: the others still count
        status, observed = "unexpected", Observed(f"{type(error).__name__}: {error}", 0)
    finally:
        lab.close()
    commit = git_commit() or "unknown"
    return Outcome(case, status, observed, round(time.monotonic() - began, 1), commit)

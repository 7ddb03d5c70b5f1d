"""Cases are tests marked with ``fault(fault, expected)``; all but the quick ones run nightly and by `make chaos`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from chaos_lab import Lab
from chaos_page import load_results, write

from densenet_dist.environment import cpu_name, git_commit

QUICK = ("test_process_killed[plateau]", "test_damaged_checkpoint[weights-flipped]")
CASES = pytest.StashKey[dict[str, pytest.Item]]()
COMMIT = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--page", type=Path, metavar="FILE", help="write the results of the cases and this page of them")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(fault, expected): a case of docs/reliability.md")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[CASES] = {item.name: item for item in items if item.get_closest_marker("fault")}
    config.stash[COMMIT] = git_commit() or "unknown"  # before the page changes: that would be a dirty checkout
    for name, item in config.stash[CASES].items():
        if name not in QUICK:
            item.add_marker(pytest.mark.nightly)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Add what came of a case to the results and the page, so that nothing is lost when the tests are interrupted."""
    report = yield
    marker = item.get_closest_marker("fault")
    if marker and call.when == "call" and item.config.getoption("--page", None):
        lab: Lab = item.funcargs["lab"]
        results = load_results()
        results[item.name] = {
            "group": item.path.stem.removeprefix("test_").replace("_", " ").capitalize(),
            "fault": marker.args[0],
            "expected": marker.args[1],
            "status": report.outcome,
            "observed": call.excinfo.exconly() if call.excinfo else lab.observed,
            "count": lab.count,
            "seconds": round(call.duration, 1),
            "commit": re.sub(r"^(\w{10})\w*", r"\1", item.config.stash[COMMIT]),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
        }
        known = {name: results[name] for name in item.config.stash[CASES] if name in results}
        write(item.config.getoption("--page"), known, f"{os.cpu_count()} cores ({cpu_name()})")
    return report


@pytest.fixture
def lab(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Lab]:
    lab = Lab(tmp_path, request.node.name)
    yield lab
    lab.kill_everything()


@pytest.fixture(scope="session")
def cases(request: pytest.FixtureRequest) -> dict[str, tuple[str, str]]:
    """Fault and expectation of every case that was collected, by name."""
    found = request.config.stash[CASES]
    return {name: item.get_closest_marker("fault").args for name, item in found.items()}

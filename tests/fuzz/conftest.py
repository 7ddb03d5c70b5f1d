"""``pytest -m nightly`` gives the fuzz tests their large budget, and selects them with it."""

import fuzz_budget
import pytest


def pytest_configure(config: pytest.Config) -> None:
    asked = str(config.getoption("markexpr"))
    fuzz_budget.nightly = "nightly" in asked and "not nightly" not in asked

"""``pytest -m nightly`` selects the fuzz tests with their large number of inputs."""

import fuzzing
import pytest


def pytest_configure(config: pytest.Config) -> None:
    asked = str(config.getoption("markexpr"))
    fuzzing.nightly = "nightly" in asked and "not nightly" not in asked

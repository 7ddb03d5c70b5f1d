"""Runs and sweeps that tests start as a user does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_runs import SWEEP, TINY, UNDISTURBED, Run, Start, starter


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start ``densenet-dist train`` on a tiny configuration."""
    with starter(tmp_path, "train", TINY) as begin:
        yield begin


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A finished run that nothing happened to, for others to be compared with."""
    with starter(tmp_path_factory.mktemp("undisturbed"), "train", TINY) as begin:
        run = begin(*UNDISTURBED)
        assert run.wait() == 0, run.text()
        yield run


@pytest.fixture(scope="module")
def start_sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start ``densenet-dist tune`` on a tiny sweep, for all tests of a module side by side under names of their own."""
    with starter(tmp_path_factory.mktemp("sweeps"), "tune", SWEEP) as begin:
        yield begin

"""Commands in this process, and the scripts in ``benchmarks/`` as modules."""

import importlib
from pathlib import Path

import pytest

from densenet_dist.cli import main


@pytest.fixture
def bench():
    """Run ``densenet-dist bench``; returns its exit code."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["bench", *map(str, arguments)])
        return stop.value.code

    return run


@pytest.fixture
def script(monkeypatch):
    """Import a script by its name, in its folder, so that it finds the others."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module

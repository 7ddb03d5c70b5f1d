"""Limits of the repository's size; `make size` prints the current figures."""

import runpy
from pathlib import Path

import pytest

LIMITS = {
    "lines of densenet_dist": 23_300,
    "lines of the training loop": 120,
    "lines of tests": 16_500,
    "words of README.md": 1_400,
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name):
    sizes = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "size.py"))["sizes"]()
    assert 0 < sizes[name] <= LIMITS[name]

"""Limits of the repository's size; `make size` prints the current figures."""

import runpy
from pathlib import Path

LIMITS = {
    "lines of densenet_dist": 21_760,
    "lines of the main path": 3_000,
    "lines of the training loop": 120,
    "lines of tests": 16_000,
    "words of README.md": 1_400,
    "words of docs without the log": 15_000,
}


def test_sizes_are_within_their_limits():
    sizes = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "size.py"))["sizes"]()
    assert {name: sizes[name] for name, most in LIMITS.items() if not 0 < sizes[name] <= most} == {}

"""Limits of the repository's size; `make size` prints the current figures."""

import pytest
from size import sizes

LIMITS = {
    "lines of densenet_dist": 23_300,
    "lines of the training loop": 120,
    "lines of tests": 16_500,
    "words of README.md": 1_400,
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name):
    assert 0 < sizes()[name] <= LIMITS[name]

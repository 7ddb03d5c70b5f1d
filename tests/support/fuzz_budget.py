"""How many inputs the fuzz tests try: the same few hundred in an ordinary run, many new ones with ``-m nightly``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, configuration, settings

nightly = False  # set by tests/fuzz/conftest.py
# Hypothesis keeps a folder .hypothesis where it was started, even where told to remember nothing.
configuration.set_hypothesis_home_dir(os.path.join(tempfile.gettempdir(), f"hypothesis-{os.getuid()}"))


def budget(ordinary: int, at_night: int) -> Callable[[Any], Any]:
    """So many inputs in an ordinary run, the same every time; so many at night, others every time."""
    limits = settings(
        max_examples=at_night if nightly else ordinary,
        derandomize=not nightly,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    if not nightly:
        return limits
    return lambda test: pytest.mark.nightly(pytest.mark.timeout(7200)(limits(test)))

"""The page of a sweep: everything in one HTML file, pictures included."""

from __future__ import annotations

from collections.abc import Sequence

from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.results import Trial
from densenet_dist.train.run_folder import RunFolder


def write_page(folder: RunFolder, sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Write sweep.html."""

"""How a sweep's metric is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Metric(NamedTuple):
    """A metric as people read it: accuracies in per cent."""

    name: str
    maximise: bool

    @property
    def percent(self) -> bool:
        """Whether it is an accuracy."""
        return not self.name.endswith("loss")

    @property
    def label(self) -> str:
        """Its name and unit."""
        return f"{self.name} (%)" if self.percent else f"{self.name} (nats)"

    def scaled(self, value: float) -> float:
        """In its unit."""
        return value * 100 if self.percent else value

    def text(self, value: float) -> str:
        """In words."""
        return f"{value * 100:.2f}\N{NO-BREAK SPACE}%" if self.percent else f"{value:.4f}"

    def log(self, values: Sequence[float]) -> bool:
        """Whether a logarithmic scale is needed: a diverged trial's loss must not flatten all the others."""
        return not self.percent and bool(values) and min(values) > 0 and max(values) > 10 * min(values)

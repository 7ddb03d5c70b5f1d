"""Axes of parallel coordinates and plots: where a value lies, and what ticks say."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from densenet_dist.pages.figures import shortened
from densenet_dist.pages.render import printable
from densenet_dist.sweep.console import shown as short_text
from densenet_dist.sweep.space import Choice, Domain

ROUND: Final = (1, 2, 2.5, 5, 10)


class Axis(NamedTuple):
    """One axis of parallel coordinates, from 0 to 1."""

    low: float
    high: float
    log: bool
    ticks: Sequence[tuple[float, str]]
    choices: Sequence[str] | None = None

    @property
    def width(self) -> int:
        """Letters of its longest tick."""
        return max((len(text) for _, text in self.ticks), default=0)

    def place(self, value: Any) -> float:
        """Where a value is; NaN where it has no place."""
        if self.choices is not None:
            return _of_choices(self.choices, as_json(value))
        return _between(self.low, self.high, self.log, value) if is_number(value) else math.nan


def axis_of(domain: Domain, values: Sequence[Any]) -> Axis:
    """An axis for the values of a searched key; those outside its domain (perturbed ones) have their place too."""
    if not isinstance(domain, Choice):
        ends = [*filter(is_number, values), domain.low, domain.high]
        return number_axis(min(ends), max(ends), domain.log and min(ends) > 0, domain.integer)
    choices = [as_json(value) for value in domain.values]
    every = math.ceil(len(choices) / 16)
    ticks = [
        (_of_choices(choices, choice), shortened(printable(short_text(value))))
        for i, (choice, value) in enumerate(zip(choices, domain.values, strict=True))
        if i % every == 0
    ]
    return Axis(0.0, 1.0, False, ticks, choices)


def number_axis(low: float, high: float, log: bool, integer: bool = False) -> Axis:
    """An axis from `low` to `high`, with round ticks."""
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    ticks = [(_between(low, high, log, value), text) for value, text in number_ticks(low, high, log, integer)]
    return Axis(low, high, log, ticks)


def _of_choices(choices: Sequence[str], choice: str) -> float:
    if choice not in choices:
        return math.nan
    return choices.index(choice) / (len(choices) - 1) if len(choices) > 1 else 0.5


def _between(low: float, high: float, log: bool, value: float) -> float:
    if log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def number_ticks(low: float, high: float, log: bool, integer: bool = False) -> list[tuple[float, str]]:
    """Up to eight round numbers of a range, with their texts."""
    from matplotlib.ticker import MaxNLocator

    found: Sequence[float]
    ticks: list[float] = []
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits, step in ((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), math.ceil(len(decades) / 6)):
            found = [float(f"{digit}e{decade}") for decade in decades[::step] for digit in digits]
            ticks = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
            if len(ticks) <= 8:
                break
    if len(ticks) < 2:
        found = MaxNLocator(nbins=6, steps=ROUND, integer=integer).tick_values(low, high)
        margin = 1e-9 * (high - low)
        ticks = [float(tick) for tick in found if low - margin <= tick <= high + margin and (tick > 0 or not log)]
    return [(tick, f"{tick:.6g}") for tick in ticks]


def is_number(value: Any) -> bool:
    """Whether it can lie on an axis of numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def as_json(value: Any) -> str:
    """What tells choices apart, lists and all."""
    return json.dumps(value, sort_keys=True, default=str)

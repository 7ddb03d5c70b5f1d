"""Runs that differ in their seed alone, taken together: means and intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from densenet_dist.config import to_dict
from densenet_dist.errors import ConfigError
from densenet_dist.report.record import RunRecord
from densenet_dist.yaml_settings import flatten

_NO_MATTER: Final = (
    *("name", "storage", "seed", "fault.", "log.", "checkpoint.every_steps", "checkpoint.keep"),
    *("data.root", "data.url", "data.download", "data.prefetch"),
    *("cluster.address", "cluster.max_failures", "cluster.timeout_s"),
)
"""Settings that change no figure of a run, by how their keys begin."""
_LONGEST_LABEL: Final = 80


class Interval(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: of the values.
        half: half the width of its 95 % confidence interval, by Student's t; None for a single value.
    """

    mean: float
    half: float | None


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one experiment.

    Attributes:
        label: in what its settings differ from those of other groups.
    """

    label: str
    members: tuple[RunRecord, ...]

    def interval(self, figure: Callable[[RunRecord], float | None]) -> Interval | None:
        """A figure's mean over the members that have it; None where none has."""
        values = [value for member in self.members if (value := figure(member)) is not None and math.isfinite(value)]
        return interval(values) if values else None


def interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % confidence interval, the values being normally distributed with unknown variance."""
    from scipy.stats import t

    count, mean = len(values), statistics.fmean(values)
    if count < 2:
        return Interval(mean, None)
    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, half)


def group(members: Sequence[RunRecord]) -> list[Group]:
    """Put runs together that differ in nothing but seed, name and place, in the order in which they are given.

    Raises:
        ConfigError: they are of different data sets, whose figures say nothing about each other.
    """
    _require_same_data(members)
    settings = [_settings(member) for member in members]
    together: dict[str, list[int]] = {}
    for number, found in enumerate(settings):
        together.setdefault(repr(sorted(found.items())), []).append(number)
    firsts = [settings[numbers[0]] for numbers in together.values()]
    keys = list(_different(firsts))
    return [
        Group(_label(first, keys, members[numbers[0]]), tuple(members[number] for number in numbers))
        for first, numbers in zip(firsts, together.values(), strict=True)
    ]


def differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The settings that differ between groups: their values, a group each, by key."""
    settings = [_settings(found.members[0]) for found in groups]
    return {key: [found.get(key) for found in settings] for key in _different(settings)}


def _settings(run: RunRecord) -> dict[str, Any]:
    return {key: value for key, value in flatten(to_dict(run.config)).items() if not key.startswith(_NO_MATTER)}


def _different(settings: Sequence[dict[str, Any]]) -> Iterator[str]:
    for key in dict.fromkeys(key for found in settings for key in found):
        if any(found.get(key) != settings[0].get(key) for found in settings):
            yield key


def _label(settings: dict[str, Any], keys: Sequence[str], run: RunRecord) -> str:
    text = ", ".join(f"{key}={settings.get(key)}" for key in keys)
    return text if 0 < len(text) <= _LONGEST_LABEL else run.name


def _require_same_data(members: Sequence[RunRecord]) -> None:
    sets: dict[str, list[str]] = {}
    for member in members:
        sets.setdefault(member.config.data.name, []).append(member.name)
    names = {member.results.class_names for member in members if member.results is not None}
    if len(sets) > 1:
        raise ConfigError(
            "runs of different data sets cannot be compared:\n  "
            + "\n  ".join(f"{name}: {', '.join(runs)}" for name, runs in sets.items())
            + "\n  make a report of those of each set"
        )
    if len(names) > 1:
        raise ConfigError("the runs' pictures are of different classes: make a report of those of each set")

"""The page that compares runs: runs that differ only in their seed form a group with means and intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from densenet_dist.config import to_dict
from densenet_dist.errors import ConfigError
from densenet_dist.pages import render
from densenet_dist.pages.figures import PAGE, RUNS, color, drawing, new_figure, set_epoch_axes, set_logarithmic, to_svg
from densenet_dist.report.figures import line, metric_points
from densenet_dist.report.record import RunRecord
from densenet_dist.yaml_settings import flatten

_IRRELEVANT: Final = (
    *("name", "storage", "seed", "fault.", "log.", "train.profile"),
    *("checkpoint.every_steps", "checkpoint.keep"),
    *("data.root", "data.url", "data.download", "data.prefetch"),
    *("cluster.address", "cluster.max_failures", "cluster.timeout_s"),
)
"""Prefixes of the settings that do not affect the results of a run."""
_MAX_LABEL: Final = 80

Metric: TypeAlias = Callable[[RunRecord], float | None]


class Interval(NamedTuple):
    """A mean over seeds, and half the width of its 95 % confidence interval by Student's t; None for few values."""

    mean: float
    half: float | None


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        label: the name of a single run, and the settings that distinguish the group from others.
        members: its runs.
        color: a variable of the page's style sheet.
        settings: its values of the settings that differ between groups.
    """

    label: str
    members: tuple[RunRecord, ...]
    color: str
    settings: dict[str, Any]

    def interval(self, metric: Metric) -> Interval | None:
        """Return the mean of a metric over the members that have it; None if there are none."""
        values = [value for member in self.members if (value := metric(member)) is not None and math.isfinite(value)]
        return interval(values) if values else None


class _Column(NamedTuple):
    name: str
    unit: float
    format: str
    value: Metric


def _test(name: str) -> Metric:
    return lambda run: None if run.test is None else run.test.get(f"test/{name}")


_COLUMNS: Final = (
    _Column("test top-1 (%)", 100.0, ",.2f", _test("top1")),
    _Column("test top-5 (%)", 100.0, ",.2f", _test("top5")),
    _Column("test loss", 1.0, ",.4f", _test("loss")),
    _Column("ECE (%)", 100.0, ",.2f", lambda run: run.results.calibration.ece if run.results else None),
    _Column("best val top-1 (%)", 100.0, ",.2f", lambda run: (run.best or {}).get("val/top1")),
    _Column("training (s)", 1.0, ",.1f", lambda run: run.summary.get("train_seconds")),
)
_PARAMETERS: Final = _Column(
    "parameters", 1.0, ",.0f", lambda run: None if isinstance(run.model, str) else run.model.parameters.trainable
)


def comparison_page(runs: Sequence[RunRecord]) -> str:
    """Render the template ``comparison.html``. Errors are those of `group`."""
    groups = group(runs)
    data = [found.members[0].config.data for found in groups]
    columns = [column for column in _COLUMNS if any(column.value(run) is not None for run in runs)] + [_PARAMETERS]
    return render(
        "comparison.html",
        title=f"{len(runs)} runs on {data[0].name}",
        of_shapes=data[0].name == "shapes",
        limits_differ=len({each.test_limit for each in data}) > 1,
        columns=columns,
        headings=[(column.name, True) for column in columns],
        groups=groups,
        group_headings=[(found.label, True) for found in groups],
        differences=[] if all("=" in found.label for found in groups) else list(groups[0].settings),
        curves=_curves(groups),
        repeat_after=RUNS,
        total_seconds=sum(run.summary.get("train_seconds", 0.0) for run in runs),
        legend=[(found.color, "●", found.label) for found in groups],
        runs=[(found, run) for found in groups for run in found.members],
    )


def group(runs: Sequence[RunRecord]) -> list[Group]:
    """Group the runs that differ only in settings that do not affect results, in the given order.

    Raises:
        ConfigError: they use different data sets, whose results cannot be compared.
    """
    _require_same_data(runs)
    members: dict[str, list[RunRecord]] = {}
    for run in runs:
        members.setdefault(repr(sorted(_settings(run).items())), []).append(run)
    settings = [_settings(found[0]) for found in members.values()]
    keys = dict.fromkeys(key for found in settings for key in found)
    different = [key for key in keys if any(found.get(key) != settings[0].get(key) for found in settings)]
    groups = []
    for number, (first, found) in enumerate(zip(settings, members.values(), strict=True)):
        values = {key: first.get(key) for key in different}
        label = ", ".join(f"{key}={value}" for key, value in values.items())
        if not 0 < len(label) <= _MAX_LABEL:
            label = found[0].name
        elif len(found) == 1:
            label = f"{found[0].name}: {label}"
        groups.append(Group(label, tuple(found), f"run{number % RUNS}", values))
    return groups


def _settings(run: RunRecord) -> dict[str, Any]:
    settings = flatten(to_dict(run.config)) | {"data.stratified": run.config.data.is_stratified}
    return {key: value for key, value in settings.items() if not key.startswith(_IRRELEVANT)}


def _require_same_data(runs: Sequence[RunRecord]) -> None:
    by_data: dict[str, list[str]] = {}
    for run in runs:
        by_data.setdefault(run.config.data.name, []).append(run.name)
    if len(by_data) > 1:
        raise ConfigError(
            "runs of different data sets cannot be compared:\n  "
            + "\n  ".join(f"{name}: {', '.join(names)}" for name, names in by_data.items())
            + "\n  write one report per data set"
        )
    if len({run.results.class_names for run in runs if run.results is not None}) > 1:
        raise ConfigError("the runs have different classes: write one report per data set")


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and, from three values on, its 95 % confidence interval, for normally distributed values.

    With two values Student's t is 12.7, and the interval says nothing.
    """
    from scipy.stats import t

    count, mean = len(values), statistics.fmean(values)
    if count < 3:
        return Interval(mean, None)
    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, half)


def _curves(groups: Sequence[Group]) -> list[str]:
    with drawing(PAGE):
        return [
            _curve(groups, key, unit, label)
            for key, unit, label in (
                ("val/top1", 100.0, "validation top-1 (%)"),
                ("val/loss", 1.0, "validation loss (nats)"),
                ("train/loss", 1.0, "training loss (nats)"),
            )
            if any(key in record for found in groups for run in found.members for record in run.epochs)
        ]


def _curve(groups: Sequence[Group], key: str, unit: float, label: str) -> str:
    figure = new_figure(3.95, 3.3)
    axes = figure.add_subplot()
    values: list[float] = []
    for found in groups:
        means = _means(found, key, unit)
        line(axes, [(epoch, mean.mean) for epoch, mean in means], color(found.color))
        band = [(epoch, mean.mean - mean.half, mean.mean + mean.half) for epoch, mean in means if mean.half is not None]
        if band:
            x, low, high = zip(*band, strict=True)
            axes.fill_between(x, low, high, color=color(found.color), alpha=0.18, lw=0)
        values += [mean.mean for _, mean in means]
    if key.endswith("loss") and values and min(values) > 0 and max(values) > 20 * min(values):
        set_logarithmic(axes.yaxis)
    set_epoch_axes(axes, label)
    return to_svg(figure, f"{label} of {len(groups)} groups against epoch")


def _means(found: Group, key: str, unit: float) -> list[tuple[float, Interval]]:
    by_epoch: dict[float, list[float]] = {}
    for run in found.members:
        for epoch, value in metric_points(run.epochs, key, unit):
            by_epoch.setdefault(epoch, []).append(value)
    return [(epoch, interval(values)) for epoch, values in sorted(by_epoch.items())]

"""The page of several runs: side by side, and where they differ in their seed alone, with means and intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from densenet_dist.pages.render import render
from densenet_dist.pages.svg import RUNS, colour, drawing, new_figure, to_svg
from densenet_dist.report.figures import line, logarithmic, points_of, whole_epochs
from densenet_dist.report.groups import Group, Interval, differences, group, interval
from densenet_dist.report.record import RunRecord


class _Column(NamedTuple):
    """A column of figures: its heading, unit, format, and where the figure comes from."""

    name: str
    unit: float
    format: str
    value: Callable[[RunRecord], float | None]


def _test(name: str) -> Callable[[RunRecord], float | None]:
    return lambda member: None if member.test is None else member.test.get(f"test/{name}")


def _parameters(member: RunRecord) -> float | None:
    return None if isinstance(member.model, str) else member.model.parameters.trainable


_COLUMNS: Final = (
    _Column("test top-1 (%)", 100.0, ",.2f", _test("top1")),
    _Column("test top-5 (%)", 100.0, ",.2f", _test("top5")),
    _Column("test loss", 1.0, ",.4f", _test("loss")),
    _Column("ECE (%)", 100.0, ",.2f", lambda member: member.results.calibration.ece if member.results else None),
    _Column("best val top-1 (%)", 100.0, ",.2f", lambda member: (member.best or {}).get("val/top1")),
    _Column("training (s)", 1.0, ",.1f", lambda member: member.summary.get("train_seconds")),
    _Column("parameters", 1.0, ",.0f", _parameters),
)


def comparison_page(members: Sequence[RunRecord]) -> str:
    """The page's HTML, from the template ``comparison.html``.

    Raises:
        ConfigError: the runs are of different data sets.
    """
    groups = group(members)
    data = [found.members[0].config.data for found in groups]
    columns = [column for column in _COLUMNS if any(column.value(member) is not None for member in members)]
    run_columns = [column for column in columns if column.value is not _parameters]
    colours = [f"run{number % RUNS}" for number in range(len(groups))]
    labels = [found.label for found in groups]
    return render(
        "comparison.html",
        title=f"{len(members)} runs on {data[0].name}",
        of_shapes=data[0].name == "shapes",
        limits_differ=len({each.limit for each in data}) > 1,
        columns=[column[:3] for column in columns],
        headings=[(column.name, True) for column in columns],
        groups=[
            {
                "label": found.label,
                "colour": colours[number],
                "size": len(found.members),
                "means": {column.name: found.interval(column.value) for column in columns},
            }
            for number, found in enumerate(groups)
        ],
        group_headings=[(label, True) for label in labels],
        # Where labels name the settings that differ, they say it all.
        differences={} if all("=" in label for label in labels) else differences(groups),
        curves=_curves(groups, colours),
        legend=[(role, "●", label) for role, label in zip(colours, labels, strict=True)],
        repeat_after=RUNS,
        total_seconds=sum(member.summary.get("train_seconds", 0.0) for member in members),
        run_columns=[column[:3] for column in run_columns],
        run_headings=[(column.name, True) for column in run_columns],
        runs=[
            _row(member, colours[number], run_columns)
            for number, found in enumerate(groups)
            for member in found.members
        ],
        classes=_classes(groups) if all(member.results is not None for member in members) else [],
    )


def _row(run: RunRecord, colour: str, columns: Sequence[_Column]) -> dict[str, Any]:
    revision, dirty, _ = str(run.environment.get("git") or "").partition("+")
    return {
        "name": run.name,
        "uri": run.folder.uri,
        "colour": colour,
        "seed": run.config.seed,
        "status": run.summary.get("status", "not finished"),
        "epochs": run.epochs[-1]["epoch"],
        "figures": {column.name: column.value(run) for column in columns},
        "commit": revision[:9] + dirty,
    }


def _classes(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The accuracy of each class, by group."""
    first = groups[0].members[0].results
    names = first.class_names if first is not None else ()

    def accuracy(label: int) -> Callable[[RunRecord], float | None]:
        return lambda member: None if member.results is None else float(member.results.class_accuracy[label])

    return [
        {"name": name, "means": [found.interval(accuracy(label)) for found in groups]}
        for label, name in enumerate(names)
    ]


def _curves(groups: Sequence[Group], roles: Sequence[str]) -> list[str]:
    with drawing():
        return [
            _curve(groups, roles, key, unit, label)
            for key, unit, label in (
                ("val/top1", 100.0, "validation top-1 (%)"),
                ("val/loss", 1.0, "validation loss (nats)"),
                ("train/loss", 1.0, "training loss (nats)"),
            )
            if any(key in record for found in groups for member in found.members for record in member.epochs)
        ]


def _curve(groups: Sequence[Group], roles: Sequence[str], key: str, unit: float, label: str) -> str:
    figure = new_figure(3.95, 3.3)
    axes = figure.add_subplot()
    middles: list[float] = []
    for role, found in zip(roles, groups, strict=True):
        means = _means(found, key, unit)
        line(axes, [(epoch, mean.mean) for epoch, mean in means], colour(role))
        wide = [(epoch, mean.mean, mean.half) for epoch, mean in means if mean.half is not None]
        if wide:
            low, high = [mean - half for _, mean, half in wide], [mean + half for _, mean, half in wide]
            axes.fill_between([epoch for epoch, *_ in wide], low, high, color=colour(role), alpha=0.18, lw=0)
        middles += [mean.mean for _, mean in means]
    if key.endswith("loss") and middles and min(middles) > 0 and max(middles) > 20 * min(middles):
        logarithmic(axes)
    whole_epochs(axes)
    axes.set(xlabel="epoch", ylabel=label)
    return to_svg(figure, f"{label} of {len(groups)} groups against epoch")


def _means(found: Group, key: str, unit: float) -> list[tuple[float, Interval]]:
    by_epoch: dict[float, list[float]] = {}
    for member in found.members:
        for epoch, value in points_of(member.epochs, key, unit):
            by_epoch.setdefault(epoch, []).append(value)
    return [(epoch, interval(values)) for epoch, values in sorted(by_epoch.items())]

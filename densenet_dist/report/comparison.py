"""The page of several runs: side by side, and where they differ in their seed alone, with means and intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from densenet_dist.pages.frame import cell, document, escape, section, table
from densenet_dist.pages.svg import RUNS, colour, drawing, new_figure, to_svg
from densenet_dist.report.figures import Points, line, logarithmic, points_of, whole_epochs
from densenet_dist.report.groups import Group, Interval, Member, differences, group, interval
from densenet_dist.report.page import duration
from densenet_dist.report.record import RunRecord
from densenet_dist.report.style import STYLE

Figure: TypeAlias = Callable[[Member], float | None]

_PARAMETERS: Final = "parameters"


def comparison_page(members: Sequence[Member]) -> str:
    """The page's HTML.

    Raises:
        ConfigError: the runs are of different data sets.
    """
    groups = group(members)
    title = f"{len(members)} runs on {members[0].run.config.data.name}"
    parts = [f"<h1>{escape(title)}</h1>", _results(groups), *_differences(groups), _curves(groups), _runs(groups)]
    if all(member.judged is not None for member in members):
        parts.append(_classes(groups))
    return document(title, parts, STYLE)


def _test(name: str) -> Figure:
    return lambda member: None if member.run.test is None else member.run.test.get(f"test/{name}")


def _validation(member: Member) -> float | None:
    return None if member.run.best is None else member.run.best.get("val/top1")


def _ece(member: Member) -> float | None:
    return None if member.judged is None else member.judged.calibration.ece


def _seconds(member: Member) -> float | None:
    return member.run.summary.get("train_seconds")


def _parameters(member: Member) -> float | None:
    return None if isinstance(member.run.model, str) else member.run.model.parameters.trainable


_COLUMNS: Final[tuple[tuple[str, float, int, Figure], ...]] = (
    ("test top-1 (%)", 100.0, 2, _test("top1")),
    ("test top-5 (%)", 100.0, 2, _test("top5")),
    ("test loss", 1.0, 4, _test("loss")),
    ("ECE (%)", 100.0, 2, _ece),
    ("best val top-1 (%)", 100.0, 2, _validation),
    ("training (s)", 1.0, 1, _seconds),
    (_PARAMETERS, 1.0, 0, _parameters),
)
"""Heading, unit, decimals, and what the figure is."""


def _shown(members: Sequence[Member]) -> list[tuple[str, float, int, Figure]]:
    return [column for column in _COLUMNS if any(column[3](member) is not None for member in members)]


def _results(groups: Sequence[Group]) -> str:
    columns = _shown([member for found in groups for member in found.members])
    rows = []
    for number, found in enumerate(groups):
        cells = [f"<td>{_key(number)}{escape(found.label)}</td>", cell(f"{len(found.members)}", len(found.members))]
        cells += [_mean(found.interval(figure), unit, decimals) for _, unit, decimals, figure in columns]
        rows.append(f'<tr class="group">{"".join(cells)}</tr>')
    heads = [("settings", False), ("runs", True), *((name, True) for name, *_ in columns)]
    note = (
        "Runs that differ in nothing but seed, name and place are taken together: the mean over seeds, ± half of its "
    )
    note += "95 % confidence interval by Student's t. ECE: expected calibration error on the test images."
    if any(found.members[0].run.config.data.name == "shapes" for found in groups):
        note += " The generated set shapes is drawn from the seed, so that the images differ between seeds too."
    if len({found.members[0].run.config.data.limit for found in groups}) > 1:
        note += " data.limit differs: these are not the same test images."
    return f"<h2>Results</h2><p>{note}</p>{table(heads, rows)}"


def _mean(found: Interval | None, unit: float, decimals: int) -> str:
    if found is None:
        return "<td></td>"
    text = f"{found.mean * unit:,.{decimals}f}"
    if not found.half:  # one value, or all of them equal
        return cell(text, found.mean)
    half = f"<span> ± {found.half * unit:,.{decimals}f}</span>"
    return cell(text, found.mean).replace("</td>", f"{half}</td>")


def _key(number: int) -> str:
    return f'<span class="key" style="background:var(--{_role(number)})"></span>'


def _role(number: int) -> str:
    return f"run{number % RUNS}"


def _differences(groups: Sequence[Group]) -> list[str]:
    found = differences(groups)
    if not found or all("=" in one.label for one in groups):  # the labels say it all
        return []
    heads = [("setting", False), *((one.label, False) for one in groups)]
    rows = [f"<tr>{cell(key)}{''.join(cell(f'{value}') for value in values)}</tr>" for key, values in found.items()]
    return [f"<h2>What differs</h2>{table(heads, rows)}"]


def _curves(groups: Sequence[Group]) -> str:
    with drawing():
        pictures = tuple(
            _curve(groups, key, unit, label)
            for key, unit, label in (
                ("val/top1", 100.0, "validation top-1 (%)"),
                ("val/loss", 1.0, "validation loss (nats)"),
                ("train/loss", 1.0, "training loss (nats)"),
            )
            if any(key in record for found in groups for member in found.members for record in member.run.epochs)
        )
    caption = "A line is a group's mean over the seeds that came to the epoch, the band its 95 % confidence interval."
    caption += f" Colours repeat after {RUNS} groups." if len(groups) > RUNS else ""
    legend = [(_role(number), "●", found.label) for number, found in enumerate(groups)]
    return section("Validation and training", caption, pictures, legend)


def _curve(groups: Sequence[Group], key: str, unit: float, label: str) -> str:
    figure = new_figure(3.95, 3.3)
    axes = figure.add_subplot()
    middles: list[float] = []
    for number, found in enumerate(groups):
        means = _means(found, key, unit)
        line(axes, [(epoch, mean.mean) for epoch, mean in means], _role(number))
        wide = [(epoch, mean.mean, mean.half) for epoch, mean in means if mean.half is not None]
        if wide:
            low, high = [mean - half for _, mean, half in wide], [mean + half for _, mean, half in wide]
            axes.fill_between([epoch for epoch, *_ in wide], low, high, color=colour(_role(number)), alpha=0.18, lw=0)
        middles += [mean.mean for _, mean in means]
    if key.endswith("loss") and middles and min(middles) > 0 and max(middles) > 20 * min(middles):
        logarithmic(axes)
    whole_epochs(axes)
    axes.set(xlabel="epoch", ylabel=label)
    return to_svg(figure, f"{label} of {len(groups)} groups against epoch")


def _means(found: Group, key: str, unit: float) -> list[tuple[float, Interval]]:
    by_epoch: dict[float, list[float]] = {}
    lines: list[Points] = [points_of(member.run.epochs, key, unit) for member in found.members]
    for epoch, value in (point for points in lines for point in points):
        by_epoch.setdefault(epoch, []).append(value)
    return [(epoch, interval(values)) for epoch, values in sorted(by_epoch.items())]


def _runs(groups: Sequence[Group]) -> str:
    columns = [column for column in _shown([m for found in groups for m in found.members]) if column[0] != _PARAMETERS]
    rows = []
    for number, found in enumerate(groups):
        for member in found.members:
            run = member.run
            cells = [f'<td title="{escape(run.folder.uri)}">{_key(number)}{escape(run.name)}</td>']
            cells += [cell(f"{run.config.seed}", run.config.seed), cell(run.summary.get("status", "not finished"))]
            cells.append(cell(f"{run.epochs[-1]['epoch']}", run.epochs[-1]["epoch"]))
            for _, unit, decimals, figure in columns:
                value = figure(member)
                cells.append(cell("" if value is None else f"{value * unit:,.{decimals}f}", value))
            cells.append(cell(_commit(run)))
            rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = [("run", False), ("seed", True), ("status", False), ("epochs", True)]
    heads += [*((name, True) for name, *_ in columns), ("git commit", False)]
    total = sum(_seconds(member) or 0.0 for found in groups for member in found.members)
    note = "A click on a heading sorts; a commit with + had changes that were not committed. "
    note += f"All together: {duration(total)} of training."
    return f"<h2>Runs</h2><p>{escape(note)}</p>{table(heads, rows)}"


def _commit(run: RunRecord) -> str:
    revision, dirty, _ = str(run.environment.get("git") or "").partition("+")
    return revision[:9] + dirty


def _classes(groups: Sequence[Group]) -> str:
    judged = groups[0].members[0].judged
    assert judged is not None
    rows = []
    for label, name in enumerate(judged.class_names):

        def accuracy(member: Member, label: int = label) -> float | None:
            return None if member.judged is None else float(member.judged.class_accuracy[label])

        cells = [_mean(found.interval(accuracy), 100.0, 2) for found in groups]
        rows.append(f"<tr>{cell(name)}{''.join(cells)}</tr>")
    heads = [("class", False), *((found.label, True) for found in groups)]
    note = "Share of each class' test images that are recognised, in per cent; mean over seeds, ± half of its 95 % "
    note += "confidence interval."
    return f"<h2>Accuracy of each class</h2><p>{note}</p>{table(heads, rows)}"

"""The outcome of ``bench time-to-accuracy`` for people: a table, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(found: dict[str, Any]) -> None:
    """Print what `densenet_dist.bench.time_to_accuracy.time_to_accuracy` found."""
    console, runs = Console(highlight=False), found["runs"]
    where = ", ".join(found["environment"]["gpus"]) or found["environment"]["cpu"]
    of = f"{len(runs)} seed{'s' if len(runs) != 1 else ''}"
    console.print(
        f"{found['config']['model.variant']} on {found['config']['data.name']}, {found['config']['train.epochs']} "
        f"epochs, {of}; {where}",
        soft_wrap=True,
    )
    if not runs:
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("test top-1", "reached by", "seconds of training", "epochs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for target in found["summary"]["targets"]:
        reached = f"{target['seeds']} of {target['of']}"
        seconds, epochs = (_spread(target[key]) if key in target else "-" for key in ("seconds", "epochs"))
        table.add_row(f"{target['top1']:.2%}", reached, seconds, epochs)
    console.print(table)
    last = found["summary"]["last"]
    console.print(
        f"at the end: {_spread(last['test/top1'], 100)} % top-1, {_spread(last['test/top5'], 100)} % top-5 "
        f"after {_spread(last['seconds'])} s",
        soft_wrap=True,
    )
    clock = "the clock stands still while test images are judged"
    console.print(f"{clock}; +- is a 95 % confidence interval" if len(runs) > 1 else clock, soft_wrap=True)


def _spread(value: dict[str, float | None], scale: float = 1.0) -> str:
    mean, half = value["mean"], value["half"]
    assert mean is not None
    return f"{mean * scale:.2f}" + ("" if half is None else f" +- {half * scale:.2f}")


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw each seed's test top-1 over seconds of training, and the targets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for run in found["runs"]:
        seconds, top1 = zip(*((epoch["seconds"], 100 * epoch["test/top1"]) for epoch in run["epochs"]), strict=True)
        axes.plot(seconds, top1, marker=".", linewidth=1, label=f"seed {run['seed']}")
    for target in found["targets"]:
        axes.axhline(100 * target, color="tab:gray", linestyle="--", linewidth=1)
        axes.annotate(
            f"{target:.2%}", (1, 100 * target), xycoords=("axes fraction", "data"), ha="right", va="bottom", size=8
        )
    axes.set(xlabel="seconds of training", ylabel="test top-1 (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)

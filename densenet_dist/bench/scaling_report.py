"""The outcome of ``bench scaling`` for people: tables, and a picture of one or several nets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 130
_HEADINGS = (
    "mode", "workers", "images", "images/s", "lowest-\nhighest", "step\nms", "without\nexchange", "exposed\nms",
    "efficiency\n(low-high)", "of com-\nputing", "predicted\nms", "error",
)  # fmt: skip
_SHOWN_GPUS = (8, 16, 64, 256, 1024)
_COLOURS = ("tab:green", "tab:blue", "tab:orange")


def print_table(found: dict[str, Any]) -> None:
    """Print what `densenet_dist.bench.scaling.bench_scaling` found."""
    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)  # a file has none of its own; on a narrow terminal lines are broken
    _line(console, f"{_title(found)}; {_place(found)}; medians of {found['rounds']} rounds")
    _line(console, f"gradients: {found['message_bytes'] / 2**20:.3g} MiB in {_buckets(found)}")
    table = _table(_HEADINGS)
    for row in found["rows"]:
        table.add_row(*_cells(row))
    console.print(table)
    for workers, fit in found["fits"].items():
        speed = "no limit found" if fit["gb_per_s"] is None else f"{fit['gb_per_s']:.3g} GB/s"
        _line(console, f"all-reduce of {workers} {found['backend']} workers: {fit['latency_us']:.3g} us a hop, {speed}")
    for note in found["notes"]:
        _line(console, note)
    _print_predictions(console, found)


def _print_predictions(console: Console, found: dict[str, Any]) -> None:
    gpu = found["gpu"]
    _line(
        console, f"\npredicted for GPUs that take {gpu['step_ms']:.3g} ms for {gpu['images']} images ({gpu['source']})"
    )
    table = _table(("connection", "mode", *(f"{count} GPUs" for count in _SHOWN_GPUS)))
    by_key = {(row["fabric"], row["mode"], row["gpus"]): row for row in found["predictions"]}
    for fabric in _fabrics(found):
        for mode in ("weak", "strong"):
            rows = [by_key.get((fabric, mode, count)) for count in _SHOWN_GPUS]
            table.add_row(fabric, mode, *("-" if row is None else f"{row['efficiency']:.1%}" for row in rows))
    console.print(table)


def _table(headings: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("mode", "connection") else "right", no_wrap=True)
    return table


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _title(found: dict[str, Any]) -> str:
    return f"{found['name']}: {found['model']['variant']}, {found['parameters']:,} parameters, {found['precision']}"


def _place(found: dict[str, Any]) -> str:
    if found["device"] != "CPU":
        return f"{found['device']}, {found['backend']}"
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''} a worker"
    return f"{found['environment']['cpu']}, {threads}, {found['backend']}"


def _buckets(found: dict[str, Any]) -> str:
    ready = next(iter(found["ready"]["1"].values()))
    return ", ".join(
        f"{size / 2**20:.3g} MiB (filled at {share:.0%} of a step)"
        for size, share in zip(found["buckets"], ready, strict=True)
    )


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["mode"],
        f"{row['workers']}{'*' if row['oversubscribed'] else ''}",
        str(row["images"]),
        _number(row["images_per_s"]),
        "-".join(map(_number, row["images_per_s_spread"])),
        _number(row["step_ms"]),
        _number(row["local_ms"]),
        _number(row["exposed_ms"]),
        "{:.2f} ({:.2f}-{:.2f})".format(row["efficiency"], *row["efficiency_spread"]),
        f"{row['compute_efficiency']:.2f}",
        _number(row["predicted_ms"]),
        f"{row['predicted_error']:+.1%}",
    ]


def _number(value: float) -> str:
    """To three digits, or to the unit where it has more."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _fabrics(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["fabric"] for row in found["predictions"]))


def draw(outcomes: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw efficiency and speed against the number of GPUs, a column for each net; what was measured on it.

    Args:
        outcomes: what `densenet_dist.bench.scaling.bench_scaling` found, for one net each.
        path: of the picture, in the format that its ending names.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = len(outcomes)
    figure, axes = plt.subplots(
        2, columns, figsize=(max(9.5, 5 * columns), 8.4), squeeze=False, sharex=True, constrained_layout=True
    )
    for column, found in enumerate(outcomes):
        efficiency, speed = axes[0, column], axes[1, column]
        for place, fabric in enumerate(_fabrics(found)):
            _draw_fabric(efficiency, speed, place, fabric, found)
        _draw_measured(efficiency, speed, found)
        efficiency.set(title=_heading(found), ylim=(0, max(1.0, *_efficiencies(found)) + 0.08))
        efficiency.axhline(1, color="gray", linewidth=0.8)
        speed.set_yscale("log")
        speed.set_xlabel("GPUs, or measured workers (open: more than cores)")
        for one in (efficiency, speed):
            _scale(one)
    axes[0, 0].set_ylabel("efficiency")
    axes[1, 0].set_ylabel("images/s")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if columns < 3 else 4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _heading(found: dict[str, Any]) -> str:
    gpu = found["gpu"]
    kind = "estimated" if gpu["source"].startswith("estimate") else gpu["source"]
    return (
        f"{found['name']}, {found['message_bytes'] / 2**20:.3g} MiB of gradients\n"
        f"a GPU: {gpu['images']} images in {gpu['step_ms']:.3g} ms ({kind})"
    )


def _efficiencies(found: dict[str, Any]) -> list[float]:
    """The highest ones measured."""
    return [max(row["efficiency_spread"]) for row in found["rows"]]


def _draw_fabric(efficiency: Axes, speed: Axes, place: int, fabric: str, found: dict[str, Any]) -> None:
    for mode, style in (("weak", "-"), ("strong", ":")):
        rows = [row for row in found["predictions"] if (row["fabric"], row["mode"]) == (fabric, mode)]
        gpus = [row["gpus"] for row in rows]
        # The first is the widest, so that it shows beneath the others.
        look: dict[str, Any] = {"color": _COLOURS[place], "linestyle": style, "linewidth": (4, 2, 1.5)[place]}
        efficiency.plot(gpus, [row["efficiency"] for row in rows], **look, label=f"{fabric}, {mode} (predicted)")
        speed.plot(gpus, [row["images_per_s"] for row in rows], **look)


def _draw_measured(efficiency: Axes, speed: Axes, found: dict[str, Any]) -> None:
    """Points with bars from the lowest to the highest round; lines from what the model says of them."""
    for mode, marker, aside, style in (("weak", "o", 0.96, "--"), ("strong", "s", 1.04, "-.")):
        rows = [row for row in found["rows"] if row["mode"] == mode]
        places = [aside * row["workers"] for row in rows]
        predicted = [row["efficiency"] / (1 + row["predicted_error"]) for row in rows]  # T(1) is the measured one
        label = f"{found['backend']}, {mode} (predicted)"
        efficiency.plot(places, predicted, style, color="black", linewidth=1, label=label if rows else None)
        for place, row in zip(places, rows, strict=True):
            look: dict[str, Any] = {"marker": marker, "color": "black", "linestyle": "none"}
            look["markerfacecolor"] = "white" if row["oversubscribed"] else "black"
            low, high = row["efficiency_spread"]
            bars = ([max(0.0, row["efficiency"] - low)], [max(0.0, high - row["efficiency"])])
            label = f"{found['backend']}, {mode} (measured)"
            efficiency.errorbar(
                place, row["efficiency"], bars, **look, capsize=3, label=label if row is rows[0] else None
            )
            speed.plot(place, row["images_per_s"], **look)


def _scale(axes: Axes) -> None:
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    ticks = [4**power for power in range(6)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)

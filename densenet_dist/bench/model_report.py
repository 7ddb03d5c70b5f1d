"""The outcome of ``bench model`` for people: a table, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 140
_HEADINGS = (
    "arm", "batch", "images/s", "lowest-\nhighest", "step\nms", "fwd\nms", "bwd\nms", "TFLOP/s,\nof peak",
    "GB/s,\nof copy", "peak\nMiB", "saved\n/image", "time/ref.\n(low-high)", "mem.\n/ref.",
)  # fmt: skip
_STYLES: dict[str, dict[str, Any]] = {  # of two that coincide both can be seen
    "reference": {"color": "tab:gray", "marker": "o", "linewidth": 3, "markersize": 8},
    "compiled": {"color": "tab:orange", "marker": "s", "linewidth": 1.5, "markersize": 5},
    "fused": {"color": "tab:blue", "marker": "^", "linewidth": 3, "markersize": 9},
    "graph": {"color": "tab:green", "marker": "D", "linewidth": 1.5, "markersize": 5},
    "padded": {"color": "tab:brown", "marker": "v", "linewidth": 1.5, "markersize": 5},
    "compiled_graph": {"color": "tab:red", "marker": "P", "linewidth": 1.5, "markersize": 6},
}


def print_table(found: dict[str, Any]) -> None:
    """Print what `densenet_dist.bench.model.bench_model` found."""
    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)  # a file has none of its own; on a narrow terminal lines are broken
    roofline = found["roofline"]
    console.print(f"{_title(found)}; {_rounds(found)}", soft_wrap=True)
    console.print(
        f"an image: {found['flops_per_image'] / 1e9:.4g} GFLOP; this machine at most: "
        f"{_number(roofline['tflop_per_s'])} TFLOP/s (matrix product), {_number(roofline['gb_per_s'])} GB/s (copy)",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for row in found["rows"]:
        table.add_row(*_cells(row))
    console.print(table)
    for row in found["rows"]:
        if row["note"]:
            size = "" if row["batch_size"] is None else f", batch {row['batch_size']}"
            console.print(f"{row['arm']}{size}: {row['note']}", markup=False, soft_wrap=True)
    for note in [*found["notes"], "GB/s is modelled: feature maps that the arm's kernels must at least read and write"]:
        console.print(note, markup=False, soft_wrap=True)


def _title(found: dict[str, Any]) -> str:
    device, threads, side = found["device"], found["threads"], found["image_size"]
    if device == "CPU":
        device = f"{found['environment']['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{found['model']['variant']} on {side}x{side}, {found['precision']}; {device}"


def _rounds(found: dict[str, Any]) -> str:
    return "one round" if found["rounds"] == 1 else f"medians of {found['rounds']} rounds"


def _cells(row: dict[str, Any]) -> list[str]:
    if row["images_per_s"] is None:
        return [row["arm"], str(row["batch_size"] or "any"), *["-"] * (len(_HEADINGS) - 2)]
    ratio = row["time_ratio"]
    return [
        row["arm"],
        str(row["batch_size"]),
        _number(row["images_per_s"]),
        "-".join(_number(value) for value in row["images_per_s_spread"]),
        _number(row["step_ms"]),
        _number(row["forward_ms"]),
        _number(row["backward_ms"]),
        f"{_number(row['tflop_per_s'])} {row['share_of_compute']:3.0%}",
        f"{_number(row['gb_per_s'])} {row['share_of_bandwidth']:3.0%}",
        _number(row["peak_mib"]),
        _number(row["saved_mib_per_image"]),
        "-" if ratio is None else "{:.2f} ({:.2f}-{:.2f})".format(ratio, *row["time_ratio_spread"]),
        "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}",
    ]


def _number(value: float | None) -> str:
    """To three digits, or to the unit where it has more."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw speed with its ceilings, and memory, against the batch size.

    Args:
        found: what `densenet_dist.bench.model.bench_model` found.
        path: of the picture, in the format that its ending names.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measured = sorted((row for row in found["rows"] if row["images_per_s"]), key=lambda row: row["batch_size"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5.8), constrained_layout=True)
    for arm in dict.fromkeys(row["arm"] for row in found["rows"] if row["images_per_s"]):
        _draw_arm(left, right, arm, [row for row in measured if row["arm"] == arm])
        # Dashes of arms with the same ceiling fill each other's gaps.
        dashes = (5 * (arm == "graph"), (5, 5))
        left.axhline(found["ceilings"]["bandwidth"][arm], color=_STYLES[arm]["color"], linestyle=dashes)
    left.axhline(found["ceilings"]["compute"], color="black", linestyle=":", label="ceiling by arithmetic")
    left.plot([], [], color="black", linestyle="--", label="ceiling by bandwidth, in an arm's colour")
    left.set(title="Speed of a training step", ylabel="images/s")
    right.set(title=f"Peak memory ({'all tensors' if found['device'] != 'CPU' else 'what a step adds'})", ylabel="MiB")
    for axes in (left, right):
        _scale(axes, sorted({row["batch_size"] for row in measured}))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    roofline, rounds = found["roofline"], f"{_rounds(found)}, bars from lowest to highest"
    ceilings = f"ceilings: {_number(roofline['gb_per_s'])} GB/s, {_number(roofline['tflop_per_s'])} TFLOP/s"
    figure.suptitle(f"{_title(found)}\n{rounds}; {ceilings}", size=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_arm(left: Axes, right: Axes, arm: str, rows: Sequence[dict[str, Any]]) -> None:
    speeds = [row["images_per_s"] for row in rows]
    below = [row["images_per_s"] - row["images_per_s_spread"][0] for row in rows]
    above = [row["images_per_s_spread"][1] - row["images_per_s"] for row in rows]
    left.errorbar(
        [row["batch_size"] for row in rows], speeds, (below, above), **_STYLES[arm], elinewidth=1, capsize=3, label=arm
    )
    known = [row for row in rows if row["peak_mib"]]
    right.plot([row["batch_size"] for row in known], [row["peak_mib"] for row in known], **_STYLES[arm])


def _scale(axes: Axes, sizes: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel("images a step")
    axes.grid(alpha=0.3)

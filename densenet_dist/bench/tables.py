"""What ``bench`` measured, as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_data(outcome: dict[str, Any]) -> None:
    """Print what `densenet_dist.bench.data.bench_data` returned."""
    gpu = outcome["device"] != "CPU"
    headings = ["loader", "batch", "images/s", "lowest", "highest", "images/CPU-s", "peak MiB"]
    rows = []
    for row in outcome["rows"]:
        figures = [row["images_per_s"], *row["spread"], row["images_per_cpu_s"], row["peak_mib"]]
        figures += [row["gpu_peak_mib"]] if gpu else []
        rows.append([row["loader"], str(row["batch_size"]), *(f"{figure:,.0f}" for figure in figures)])
    title = f"{outcome['data']['name']}, {outcome['data']['augment']}; {_machine(outcome)}; {_rounds(outcome)}"
    print_table(title, [*headings, "GPU MiB (torch's)"] if gpu else headings, rows, outcome["notes"])


def print_model(outcome: dict[str, Any]) -> None:
    """Print what `densenet_dist.bench.model.bench_model` returned."""
    headings = ["variant", "batch", "images/s", "lowest-\nhighest", "step\nms", "peak\nMiB"]
    headings += ["time/ref.\n(low-high)", "mem.\n/ref."]
    rows = []
    for row in outcome["rows"]:
        figures = [number(row["images_per_s"]), interval(row["images_per_s_spread"])]
        figures += [number(row["step_ms"]), number(row["peak_mib"])]
        ratio = "-" if row["time_ratio"] is None else _with_spread(row["time_ratio"], row["time_ratio_spread"])
        memory = "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
        rows.append([row["arm"], str(row["batch_size"]), *figures, ratio, memory])
    failed = [f"{row['arm']}, batch {row['batch_size']}: {row['note']}" for row in outcome["rows"] if row["note"]]
    title = f"{outcome['model']['variant']} on {outcome['image_size']}x{outcome['image_size']}, {outcome['precision']}"
    print_table(f"{title}; {_machine(outcome)}; {_rounds(outcome)}", headings, rows, [*failed, *outcome["notes"]])


def print_scaling(outcome: dict[str, Any]) -> None:
    """Print what `densenet_dist.bench.scaling.bench_scaling` returned."""
    headings = ["mode", "workers", "images", "images/s", "lowest-\nhighest", "step\nms", "without\nexchange"]
    headings += ["exposed\nms", "efficiency\n(low-high)", "of com-\nputing"]
    rows = []
    for row in outcome["rows"]:
        workers = f"{row['workers']}{'*' if row['oversubscribed'] else ''}"
        speed = [number(row["images_per_s"]), interval(row["images_per_s_spread"])]
        times = [number(row[name]) for name in ("step_ms", "local_ms", "exposed_ms")]
        efficiency = [_with_spread(row["efficiency"], row["efficiency_spread"]), f"{row['compute_efficiency']:.2f}"]
        rows.append([row["mode"], workers, str(row["images"]), *speed, *times, *efficiency])
    title = f"{outcome['name']}: {outcome['model']['variant']}, {outcome['parameters']:,} parameters"
    place = f"{_machine(outcome)} a worker, {outcome['backend']}"
    print_table(f"{title}, {outcome['precision']}; {place}; {_rounds(outcome)}", headings, rows, outcome["notes"])


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a line, a table whose columns are as wide as they need to be, and lines below it."""
    console = Console(highlight=False)
    console.width = max(console.width, 140)  # a file has none of its own; on a narrow terminal lines are broken
    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, soft_wrap=True)


def number(value: float | None) -> str:
    """A figure to three digits, or to the unit where it has more; a dash for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def interval(spread: Sequence[float] | None) -> str:
    """Lowest and highest, or a dash."""
    return "-" if spread is None else "-".join(map(number, spread))


def _with_spread(value: float, spread: Sequence[float]) -> str:
    return f"{value:.2f} ({spread[0]:.2f}-{spread[1]:.2f})"


def _machine(outcome: dict[str, Any]) -> str:
    if outcome["device"] != "CPU":
        return str(outcome["device"])
    return f"{outcome['environment']['cpu']}, {outcome['threads']} thread{'s' if outcome['threads'] > 1 else ''}"


def _rounds(outcome: dict[str, Any]) -> str:
    return "one round" if outcome["rounds"] == 1 else f"medians of {outcome['rounds']} rounds"

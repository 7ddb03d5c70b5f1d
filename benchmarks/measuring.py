"""What the measurements share: arguments, conditions, medians, tables for the terminal, and files of results."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from densenet_dist.data.cifar import SPECS
from densenet_dist.environment import describe_environment
from densenet_dist.schema import Config


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments of model.py, data.py, scaling.py and predict_scaling.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="CONFIG | key=value")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements; medians are reported")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the results to this file")
    return parser


def write_json(found: dict[str, Any], path: Path | None) -> None:
    """Write results to a file, if there is one."""
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


def conditions(device: str, threads: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Return how and where something was measured, for the result."""
    return {
        "device": device,
        "threads": threads,
        "seconds": seconds,
        "rounds": rounds,
        "environment": describe_environment(),
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def num_classes(config: Config) -> int:
    """Return the number of classes of the data set; 10 for a folder, which is not read."""
    return SPECS[config.data.name].num_classes if config.data.name in SPECS else 10


def median_and_spread(values: Sequence[float], digits: int = 5) -> tuple[float, tuple[float, float]]:
    """Return the median, and the lowest and highest value, each to `digits` significant digits."""
    return rounded(statistics.median(values), digits), (rounded(min(values), digits), rounded(max(values), digits))


def rounded(value: float, digits: int = 5) -> float:
    """Round to `digits` significant digits, for a file that people read too."""
    return float(f"{value:.{digits}g}")


def print_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a title, a table with columns as wide as their contents, and notes below it."""
    lines = [*zip_longest(*(heading.split("\n") for heading in headings), fillvalue=""), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(title)
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    for note in notes:
        print(note)


def number(value: float | None) -> str:
    """Format to three significant digits, or as an integer from 100; a dash for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def interval(spread: Sequence[float] | None) -> str:
    """Format the lowest and highest value; a dash for None."""
    return "-" if spread is None else "-".join(map(number, spread))


def with_spread(value: float, spread: Sequence[float]) -> str:
    """Format a ratio with its lowest and highest value."""
    return f"{value:.2f} ({spread[0]:.2f}-{spread[1]:.2f})"


def conditions_line(found: dict[str, Any], device_suffix: str = "") -> str:
    """Format the `conditions` of a result for the title of its table."""
    device = found["device"]
    if device == "CPU":
        device = f"{found['environment']['cpu']}, {found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    rounds = "one round" if found["rounds"] == 1 else f"medians of {found['rounds']} rounds"
    return f"{device}{device_suffix}; {rounds}"

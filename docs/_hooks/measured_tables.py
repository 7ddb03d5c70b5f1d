"""Tables of what was measured, from benchmarks/results: no figure is written by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
_PEERS = {
    "ours_fused": "this project, fused",
    "ours_reference": "this project, reference form",
    "keras": "Keras with TensorFlow",
    "torchvision": "torchvision",
    "torchvision_memory_efficient": "torchvision, `memory_efficient`",
    "timm": "timm",
    "timm_memory_efficient": "timm, `memory_efficient`",
}
_INPUTS = {
    "project_torch": "this project, torch",
    "project_dali": "this project, DALI in its CPU mode",
    "keras": "Keras `ImageDataGenerator.flow`",
    "torchvision_pil": "torchvision v2 on PIL, `DataLoader` with 2 workers",
    "torchvision_tensor": "torchvision v2 on tensors, `DataLoader` with 2 workers",
}


def peers() -> str:
    """Other implementations of DenseNet by instruction set, each in the faster of its memory layouts."""
    tables = []
    for isa in ("AVX-512", "AVX2"):
        file = f"peers_{isa.replace('-', '').lower()}.json"
        found = _read(file)
        rows = []
        for name, title in _PEERS.items():
            cells = [_fastest(found["nets"][net]["rounds"], name) for net in ("bc100", "notebook")]
            if any(cells):
                rows.append([title, *(f"{cell[0]:.1f}, {cell[1]:,.0f} MiB" if cell else "-" for cell in cells)])
        head = [f"{isa}, {found['settings']['threads']} threads", "DenseNet-BC (100, 12)", "notebook"]
        tables.append(_table(head, rows) + _source(file))
    return "\n\n".join(tables)


def _fastest(rounds: Sequence[dict[str, Any]], name: str) -> tuple[float, float] | None:
    """Median speed and peak memory of a variant, as it is or with channels_last."""
    variants = [
        key for key in rounds[0] if key.replace("+channels_last", "") == name and "images_per_s" in rounds[0][key]
    ]
    medians = [
        (median(found[key]["images_per_s"] for found in rounds), median(found[key]["peak_mib"] for found in rounds))
        for key in variants
    ]
    return max(medians, default=None)


def inputs() -> str:
    """What makes augmented batches of CIFAR-10."""
    found = _read("input_peers.json")["summary"]
    rows = [
        [_INPUTS.get(name, name), *(f"{of[key]['median']:,.0f}" for key in ("images_per_cpu_s", "images_per_s"))]
        for name, of in sorted(found.items(), key=lambda item: -item[1]["images_per_cpu_s"]["median"])
    ]
    return _table(["", "images a CPU-second", "images/s"], rows) + _source("input_peers.json")


def loaders() -> str:
    """The two engines, by batch size."""
    sizes: dict[int, dict[str, float]] = {}
    for row in _read("loaders_cpu.json")["rows"]:
        if row["batch_size"] is not None:  # an earlier version measured the definition in NumPy, image by image
            sizes.setdefault(row["batch_size"], {})[row["loader"]] = row["images_per_cpu_s"]
    rows = [[str(size), *(f"{of[name]:,.0f}" for name in ("torch", "dali"))] for size, of in sizes.items()]
    return _table(["batch", "torch, images a CPU-second", "DALI"], rows) + _source("loaders_cpu.json")


def ray_overhead() -> str:
    """What Ray costs a run, in words."""
    found = _read("ray_overhead.json")
    ratio = found["ratio_images_per_s"]
    return (
        f"A run under Ray makes {ratio['median']:.3f} of the images/s of the same run without it "
        f"({ratio['min']:.3f} to {ratio['max']:.3f} over {len(found['pairs'])} pairs, one worker of one thread), "
        f"and takes {found['extra_seconds_a_run']:.0f} s more to start and end." + _source("ray_overhead.json")
    )


def scaling() -> str:
    """Two and four workers against one."""
    rows = []
    for name in ("bc100", "notebook10", "notebook100"):
        found = _read(f"scaling_{name}.json")
        for row in found["rows"]:
            if row["workers"] > 1:
                star = "*" if row["oversubscribed"] else ""
                cells = [f"`{found['name']}`", row["mode"], f"{row['workers']}{star}", f"{row['images_per_s']:.1f}"]
                rows.append([*cells, f"{row['efficiency']:.2f}", f"{100 * row['predicted_error']:+.1f} %"])
    head = ["configuration", "scaling", "workers", "images/s", "efficiency", "model's error"]
    return _table(head, rows) + _source(*(f"scaling_{name}.json" for name in ("bc100", "notebook10", "notebook100")))


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _source(*names: str) -> str:
    """Where figures come from: command, machine and versions of the measurement."""
    told = []
    for name in names:
        said = _read(name)["environment"]
        versions = ", ".join(f"{package} {said['packages'][package]}" for package in ("torch", "ray"))
        command = re.sub(r"^\S*/bin/| storage=\S+", "", said["command"]).replace("/tmp/cifar", "CIFAR")
        told.append(
            f"`benchmarks/results/{name}`: `{command}`, {said['time'][:10]}, {said['cpus']} hardware threads of an "
            f"{said['cpu']}, {versions}, commit {said['git'][:7]}"
        )
    return '\n\n??? note "How it was measured"\n\n' + "\n".join(f"    - {line}" for line in told) + "\n"

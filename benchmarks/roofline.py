"""What a training step must at least compute and move, against what this machine can at most.

    python benchmarks/model.py configs/cifar10_notebook.yaml --out model.json
    python benchmarks/roofline.py model.json --plot model.png

prints of each measured row how many of this machine's FLOP/s and bytes/s it reached, on the device it was measured on.
FLOPs are counted, of the net's definition: 2 a multiplication and addition of convolutions and matrix products. Bytes
are *modeled*: what a step really moves only hardware counters tell. `traffic` adds up, pass by pass, the feature maps
that a variant's kernels read and write, each once. Weights, dropout's masks and what a library does besides are left
out, so it is a lower bound of what the variant moves, as long as maps do not stay in a cache between passes: then the
share of the bandwidth can be above 1.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from measuring import number, print_table
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from densenet_dist.model import DenseNet
from densenet_dist.model.architecture import Architecture
from densenet_dist.model.variants import densenet
from densenet_dist.train.network import AUTOCAST


def net_on_meta(outcome: Mapping[str, Any]) -> DenseNet:
    """The reference net that model.py measured, without weights."""
    with torch.device("meta"):
        settings = {**outcome["model"], "block": "reference"}
        return densenet(**settings, num_classes=outcome["classes"], image_size=outcome["image_size"])


def count_flops(model: DenseNet) -> float:
    """FLOPs of forward and backward an image; of a model on the meta device nothing is computed.

    Args:
        model: in the reference form: what another form saves or adds is not what is asked for.
    """
    device, side = model.classifier.weight.device, model.architecture.image_size
    images = torch.empty(2, 3, side, side, device=device)  # a batch of one may have no statistics
    labels = torch.zeros(2, dtype=torch.long, device=device)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(images), labels).backward()
    return float(counter.get_total_flops()) / 2


class Passes(NamedTuple):
    """How often a part of a net reads or writes the maps it takes in, and those it makes; each once is 1."""

    taken_forward: float
    taken_backward: float
    made_forward: float
    made_backward: float


# Each part's kernels, with the maps they read (r) and write (w). The reference form runs PyTorch's operators: forward
# batch normalization rrw (its statistics first), ReLU rw, convolution r; backward input gradient w, weight gradient r,
# ReLU rrw, batch normalization rr rrw.
_UNIT: Final = Passes(6, 10, 1, 2)
_REFERENCE: Final[Mapping[str, Passes]] = {
    "stem": Passes(1, 1, 1, 1),
    "stem_pool": Passes(6, 9, 1, 1),  # of the stem for large images: batch normalization, ReLU, max pooling
    "entry": Passes(0, 0, 0, 0),
    "layer": _UNIT,
    "bottleneck": _UNIT,
    "inner": _UNIT,  # the 3x3 convolution behind a bottleneck
    "cat": Passes(2, 0, 0, 0),
    "cat_gradient": Passes(0, 3, 0, 0),  # what came back to the layer and through the cat are added: rrw
    "drop": Passes(2, 2, 0, 0),
    "inner_drop": Passes(2, 2, 0, 0),
    "transition_drop": Passes(2, 2, 0, 0),
    "transition": _UNIT,
    "pool": Passes(1, 1, 1, 1),
    "head": Passes(6, 9, 0, 0),
}
# Inductor fuses pointwise work between convolutions: forward the statistics into the cat, normalization and ReLU rw,
# convolution r; backward input gradient w, weight gradient r, reduction rr, the rest with the sum of gradients rrrw.
_COMPILED: Final[Mapping[str, Passes]] = {
    **_REFERENCE,
    "stem_pool": Passes(2, 5, 1, 1),
    "layer": Passes(3, 7, 1, 2),
    "bottleneck": Passes(3, 7, 1, 2),
    "inner": Passes(4, 7, 1, 2),  # no cat before it to take the statistics in
    "cat_gradient": Passes(0, 1, 0, 0),
    "transition": Passes(3, 7, 1, 2),
    "head": Passes(1, 3, 0, 0),
}
# The fused block (`densenet_dist.model.fused`): forward normalization and ReLU rw, convolution r, then the maps made
# go into the buffer rw; backward normalization and ReLU again rw, input gradient w, weight gradient r, and the sum of
# gradients r, with maps and sum rrw once for every four layers: 5.75. The gradient of what a layer made is finished
# rrw, then read by both convolutions.
_FUSED: Final[Mapping[str, Passes]] = {
    **_REFERENCE,
    "entry": Passes(2, 3, 0, 0),
    "layer": Passes(3, 5.75, 3, 5),
    "bottleneck": Passes(3, 5.75, 2, 5),  # what it makes stays where it is and is read for its statistics
    "inner": Passes(3, 7, 3, 5),
    "cat": Passes(0, 0, 0, 0),
    "cat_gradient": Passes(0, 0, 0, 0),
    "drop": Passes(0, 0, 0, 0),
    "inner_drop": Passes(1, 0, 0, 0),
    "transition": Passes(3, 5.75, 1, 2),
    "head": Passes(3, 2.75, 0, 0),
}
PASSES: Final[Mapping[str, Mapping[str, Passes]]] = {
    "reference": _REFERENCE,
    "compiled": _COMPILED,
    "fused": _FUSED,
    "graph": _FUSED,
    "padded": _REFERENCE,
    "compiled_graph": _COMPILED,
    "padded_compiled_graph": _COMPILED,
}
"""The passes of each variant of model.py over the maps of each part of a net."""


class _Part(NamedTuple):
    name: str
    taken: float
    """Values it takes in, an image."""
    made: float
    """Values it makes, an image."""


def traffic(architecture: Architecture, variant: str, bytes_per_value: int) -> float:
    """Bytes that the variant's kernels must at least move an image, forward and backward; see the module."""
    passes, total = PASSES[variant], 0.0
    for part in _parts(architecture):
        of = passes[part.name]
        total += (of.taken_forward + of.taken_backward) * part.taken + (of.made_forward + of.made_backward) * part.made
    return total * bytes_per_value


def _parts(arch: Architecture) -> Iterator[_Part]:
    """The net from the image to its last pooling; dropout's masks, the classifier and the loss are left out."""
    k, drops = arch.growth_rate, arch.drop_rate > 0
    yield from _stem(arch)
    sides, widths = arch.block_sides(), arch.block_widths()
    for i, (side, (entering, leaving)) in enumerate(zip(sides, widths, strict=True)):
        pixels = side**2
        yield _Part("entry", pixels * entering, 0)
        for before, after in pairwise(range(entering, leaving + 1, k)):
            if arch.bn_size is None:
                yield _Part("layer", pixels * before, pixels * k)
            else:
                inner = pixels * arch.bn_size * k
                yield _Part("bottleneck", pixels * before, inner)
                yield _Part("inner", inner, pixels * k)
                if drops:
                    yield _Part("inner_drop", inner, 0)
            if drops:
                yield _Part("drop", pixels * k, 0)
            yield _Part("cat", pixels * after, 0)
            yield _Part("cat_gradient", pixels * before, 0)
        if i + 1 == len(widths):
            yield _Part("head", pixels * leaving, 0)
            return
        made = pixels * widths[i + 1][0]
        yield _Part("transition", pixels * leaving, made)
        if drops:
            yield _Part("transition_drop", made, 0)
        yield _Part("pool", made, made / 4)


def _stem(arch: Architecture) -> Iterator[_Part]:
    image, stride = arch.image_size**2 * arch.in_channels, 1 if arch.stem == "cifar" else 2
    made = (arch.image_size / stride) ** 2 * arch.stem_channels
    yield _Part("stem", image, made)
    if arch.stem == "imagenet":
        yield _Part("stem_pool", made, made / 4)


def _copy_speed(device: torch.device, seconds: float) -> float:
    source = torch.ones(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _shortest(lambda: target.copy_(source), device, seconds) / 1e9


def _product_speed(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    best, side, most, spent = 0.0, 512, 8192 if device.type == "cuda" else 2048, 0.0
    limit = max(seconds / 8, 0.05)  # a CPU without float16 products takes seconds for a small one
    while side <= most and spent < limit:
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        spent = _shortest(partial(torch.mm, a, b), device, seconds if side == most else 0)
        best, side = max(best, 2 * side**3 / spent / 1e12), 2 * side
    return best


def _shortest(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest time of one call in seconds, of at least two, the first one not counted."""
    best, started = float("inf"), time.perf_counter()
    for count in range(1000):
        before = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        best = min(best, now - before) if count else best
        if count > 1 and now - started > seconds:
            break
    return best


def peaks(device: torch.device, precision: str, seconds: float) -> tuple[float, float]:
    """TFLOP/s of a large matrix product, and GB/s of a large copy (read and written), on this machine."""
    if device.type == "cuda" and precision == "fp32" and torch.backends.cudnn.allow_tf32:
        torch.set_float32_matmul_precision("high")  # as convolutions are computed by default
    return _product_speed(device, AUTOCAST[precision], seconds / 2), _copy_speed(device, seconds / 2)


def evaluate(outcome: dict[str, Any], tflop_per_s: float, gb_per_s: float) -> dict[str, Any]:
    """Ceilings in images/s, and the shares of the peaks that each row reached."""
    net = net_on_meta(outcome)
    flops, width = count_flops(net), AUTOCAST[outcome["precision"]].itemsize
    rows = [row for row in outcome["rows"] if row["images_per_s"]]
    moved = {row["arm"]: traffic(net.architecture, row["arm"], width) for row in rows}
    return {
        "flops_per_image": flops,
        "bytes_per_image": moved,
        "compute_ceiling": tflop_per_s * 1e12 / flops,
        "bandwidth_ceilings": {name: gb_per_s * 1e9 / moved_bytes for name, moved_bytes in moved.items()},
        "rows": [
            {
                **row,
                "tflop_per_s": row["images_per_s"] * flops / 1e12,
                "share_of_compute": row["images_per_s"] * flops / 1e12 / tflop_per_s,
                "gb_per_s": row["images_per_s"] * moved[row["arm"]] / 1e9,
                "share_of_bandwidth": row["images_per_s"] * moved[row["arm"]] / 1e9 / gb_per_s,
            }
            for row in rows
        ],
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw speed with its ceilings, and memory, against the batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 5.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, variant in enumerate(found["bandwidth_ceilings"]):
        rows = sorted((row for row in found["rows"] if row["arm"] == variant), key=lambda row: int(row["batch_size"]))
        sizes, color = [row["batch_size"] for row in rows], f"C{index}"
        left.plot(sizes, [row["images_per_s"] for row in rows], marker="o", color=color, label=variant)
        left.fill_between(
            sizes, *zip(*(row["images_per_s_spread"] for row in rows), strict=True), color=color, alpha=0.2
        )
        left.axhline(found["bandwidth_ceilings"][variant], color=color, linestyle=(5 * index, (5, 5)))
        right.plot(sizes, [row["peak_mib"] for row in rows], marker="o", color=color)
    left.axhline(found["compute_ceiling"], color="black", linestyle=":", label="ceiling by arithmetic")
    left.plot([], [], color="black", linestyle="--", label="ceiling by bandwidth, in a variant's color")
    left.set(title="Speed of a training step", ylabel="images/s")
    right.set(title="Peak memory of a step", ylabel="MiB")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="images a step")
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outcome", type=Path, help="what `model.py --out` wrote")
    parser.add_argument("--seconds", type=float, default=2.0, help="to find this machine's peaks")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(arguments)
    outcome = json.loads(args.outcome.read_text())
    torch.set_num_threads(outcome["threads"])
    device = torch.device("cpu" if outcome["device"] == "CPU" else "cuda")
    tflop_per_s, gb_per_s = peaks(device, outcome["precision"], args.seconds)
    found = evaluate(outcome, tflop_per_s, gb_per_s)
    print_table(
        f"an image: {found['flops_per_image'] / 1e9:.4g} GFLOP; this machine at most: {number(tflop_per_s)} TFLOP/s "
        f"(matrix product), {number(gb_per_s)} GB/s (copy)",
        ["variant", "batch", "images/s", "TFLOP/s,\nof peak", "GB/s,\nof copy", "ceiling by\nbandwidth"],
        [
            [
                row["arm"],
                str(row["batch_size"]),
                number(row["images_per_s"]),
                f"{number(row['tflop_per_s'])} {row['share_of_compute']:3.0%}",
                f"{number(row['gb_per_s'])} {row['share_of_bandwidth']:3.0%}",
                number(found["bandwidth_ceilings"][row["arm"]]),
            ]
            for row in found["rows"]
        ],
        [f"ceiling by arithmetic: {number(found['compute_ceiling'])} images/s; GB/s are modeled"],
    )
    if args.plot:
        draw(found, args.plot)


if __name__ == "__main__":
    main()

"""Predict the training speed of the notebook's network on an H200 from FLOPs, bytes and kernel launches.

    python benchmarks/launch_model.py

Nothing is measured; the figures are to be compared with those of a visit (gpu.md) and may be off by 30 %. The time of a
step is that of its convolutions, of its other passes over the maps, and of its launches, one after another:

- memory: 4.3 TB/s, for the bytes that `roofline.traffic` counts in bfloat16; before the rows of a block began at
  multiples of 8 channels, most passes read 2 bytes at once and reached 70 % of it;
- cuDNN: 220, 200 and 160 useful TFLOP/s (fprop, dgrad, wgrad; products with padding do not count), at least 8 us;
- a small kernel: 2 us, and if it is not in a CUDA graph the host's time, hidden while the GPU is busy: 10 us for an
  operator of PyTorch; for the fused form what host_time.py measured on a Zen 5 core, 79 us per launch (30.6 ms per
  step), and 22 us if a pass is recorded once and repeated (8.6 ms; not in the package);
- custom convolutions for sm_90a: 55 % of 790 TFLOP/s, of which 35 of 40 columns are useful; they normalize what they
  read and add up statistics themselves, so that their bytes are hidden behind the products;
- launches per step: counted by tests/support/launches.py for eager and fused forms; estimated for the compiled one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from measuring import number, print_table
from roofline import traffic

from densenet_dist.model.architecture import Architecture
from densenet_dist.model.variants import variant_architecture

BATCH_SIZES: Final = (64, 256, 1024)
BYTES_PER_S: Final = 4.3e12
CUDNN: Final = (220e12, 200e12, 160e12)
CUSTOM: Final = (0.55 * 790e12 * 35 / 40,) * 3
CUDNN_CALL_S, KERNEL_S = 8e-6, 2e-6
NARROW_READS: Final = 0.7


class Form(NamedTuple):
    """One form of the training step.

    Attributes:
        name: for the table.
        passes: the variant of `roofline.PASSES`.
        launches: kernels per step.
        padded: whether all maps have widths that are multiples of 8.
        graph: whether the step is a CUDA graph.
        custom_sides: sides of the maps that custom convolutions serve.
        bandwidth: share of the memory's bandwidth that passes reach.
        host_s: seconds of the host per launch.
    """

    name: str
    passes: str
    launches: int
    padded: bool = False
    graph: bool = True
    custom_sides: tuple[int, ...] = ()
    bandwidth: float = 1.0
    host_s: float = 10e-6


FORMS: Final = (
    Form("padded, eager", "padded", 593, padded=True, graph=False),
    Form("padded, compiled, graph", "compiled_graph", 450, padded=True),
    Form("fused, graph, 1,811 launches (until 2026-11-29)", "graph", 1811, bandwidth=NARROW_READS),
    Form("fused, graph, 389 launches (today)", "graph", 389),
    Form("fused, one by one, 389 launches (today; DDP)", "fused", 389, graph=False, host_s=79e-6),
    Form("the same with recorded launches (not in the package)", "fused", 389, graph=False, host_s=22e-6),
    Form("custom convolutions at 32x32 and 16x16", "graph", 389, custom_sides=(32, 16)),
    Form("custom convolutions everywhere", "graph", 389, custom_sides=(32, 16, 8, 4)),
)


def layers(net: Architecture) -> Iterator[tuple[int, float]]:
    """The side and the FLOPs per image of each layer's forward convolution."""
    for side, (entering, leaving) in zip(net.block_sides(), net.block_widths(), strict=True):
        for read in range(entering, leaving, net.growth_rate):
            yield side, 2 * 9 * read * net.growth_rate * side**2


def bytes_by_side(net: Architecture, passes: str) -> dict[int, float]:
    """The bytes per image of all passes in bfloat16, divided among the blocks in proportion to their FLOPs."""
    weights = dict.fromkeys(net.block_sides(), 0.0)
    for side, flops in layers(net):
        weights[side] += flops
    total = traffic(net, passes, 2)
    return {side: total * weight / sum(weights.values()) for side, weight in weights.items()}


def step_seconds(form: Form, batch_size: int) -> float:
    """The predicted time of a training step."""
    useful = variant_architecture("notebook", num_classes=10)
    net = variant_architecture("notebook", num_classes=10, growth_rate=40) if form.padded else useful
    seconds = 0.0
    for side, flops in layers(useful):
        if side in form.custom_sides:
            seconds += sum(max(batch_size * flops / rate, KERNEL_S) for rate in CUSTOM)
        else:
            seconds += sum(max(batch_size * flops / rate, CUDNN_CALL_S) for rate in CUDNN)
    moved = sum(size for side, size in bytes_by_side(net, form.passes).items() if side not in form.custom_sides)
    seconds += batch_size * moved / (BYTES_PER_S * form.bandwidth)
    seconds += form.launches * KERNEL_S
    return seconds if form.graph else max(seconds, form.launches * form.host_s)


def main() -> None:
    rows = []
    for form in FORMS:
        speeds = [size / step_seconds(form, size) for size in BATCH_SIZES]
        rows.append([form.name, *(number(float(f"{speed:.3g}")) for speed in speeds)])
    print_table(
        "predicted images/s on an H200, +-30 %", ["training step, bf16", *(f"batch {s}" for s in BATCH_SIZES)], rows
    )


if __name__ == "__main__":
    main()

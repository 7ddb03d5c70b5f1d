"""What the Triton kernels' variants need: registers, spills, shared memory. Compiles them; no GPU is needed.

    python benchmarks/triton_registers.py --out benchmarks/results/triton_registers.json

The kernels' own Python callers run, as a dense block of each net would call them in bfloat16, on small tensors on the
CPU: which variants there are depends on types, widths and alignment, not on how many images there are. A driver that is
none says which GPU to compile for, and launches end at compiling. Spills are bytes a thread, as cuobjdump tells.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from densenet_dist.model.kernels.interface import Consumer, Norm
from densenet_dist.model.kernels.triton_conv import conv_dgrad, conv_forward, conv_wgrad
from densenet_dist.model.kernels.triton_pointwise import TritonPointwise

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Net(NamedTuple):
    """A net's first dense block."""

    entering: int
    growth: int
    bottleneck: int | None
    layers: int
    slot: int
    """Channels from one layer's maps to the next one's: the growth rate, or more of it for alignment."""


NETS = {
    "notebook k=35": Net(70, 35, None, 12, 35),
    "notebook k=35, slots of 40": Net(72, 35, None, 12, 40),
    "BC 100/12": Net(24, 12, 48, 16, 12),
}


class Driver:
    """Names the GPU to compile for, in place of the one that is there."""

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return self.sm  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """Compiles what is launched while it is entered, and notes each kernel once."""

    def __init__(self, sm: int) -> None:
        self.sm, self.net = sm, ""
        self.rows: list[dict[str, Any]] = []
        self.original = JITFunction.run

    def __enter__(self) -> "Compiler":
        triton.runtime.driver.set_active(Driver(self.sm))

        def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = self.original(function, *args, grid=grid, warmup=True, **kwargs)
            self.note(function, kernel, kwargs)
            return kernel

        JITFunction.run = run
        return self

    def __exit__(self, *_: object) -> None:
        JITFunction.run = self.original

    def note(self, function: Any, kernel: Any, kwargs: dict[str, Any]) -> None:
        for row in self.rows:
            if row["hash"] == kernel.hash:
                if self.net not in row["nets"]:
                    row["nets"].append(self.net)
                return
        options = {key: value for key, value in kwargs.items() if key.isupper()}
        self.rows.append(
            {
                "kernel": function.__name__.strip("_").removesuffix("_kernel"),
                "variant": " ".join(f"{key}={value}" for key, value in options.items()),
                "nets": [self.net],
                "sm": self.sm,
                **resources(kernel.asm["cubin"]),
                "shared": kernel.metadata.shared,
                "warps": kernel.metadata.num_warps,
                "hash": kernel.hash,
            }
        )


def resources(cubin: bytes) -> dict[str, int]:
    """Read a kernel's registers and its bytes of local memory, stack included, for each thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    assert found is not None, told
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "spills": stack + local}


def maps(channels: int, *, ld: int | None = None, start: int = 0) -> Tensor:
    """Images of four pixels: variants depend on how channels lie."""
    return torch.zeros(2, 2, 2, ld or channels, dtype=torch.bfloat16).permute(0, 3, 1, 2)[:, start : start + channels]


def mask(channels: int) -> Tensor:
    return torch.zeros(2, 2, 2, channels, dtype=torch.bool).permute(0, 3, 1, 2)


def norm(channels: int) -> Norm:
    return Norm(*torch.zeros(4, channels), 1e-3)


def padded(channels: int) -> int:
    """What cuDNN likes."""
    return -(-channels // 8) * 8


def pointwise(net: Net, layer: int) -> None:
    """A layer's passes with cuDNN's convolutions between them, and those over its maps' gradients (stage S3)."""
    kernels, k = TritonPointwise(), net.growth
    read, ld = net.entering + layer * net.slot, padded(net.entering + net.layers * net.slot)
    buffer, vectors = maps(ld), torch.zeros(3, ld)
    kernels.bn_relu(buffer[:, :read], norm(read), maps(padded(read)))
    if net.bottleneck is not None:
        between, sums = maps(net.bottleneck), torch.zeros(2, net.bottleneck)
        kernels.write(between, mask(net.bottleneck), 0.9, between, *vectors[:2, : net.bottleneck])
        kernels.bn_relu(between, norm(net.bottleneck), maps(net.bottleneck))
        kernels.gather(between, [Consumer(maps(net.bottleneck), norm(net.bottleneck), sums)], None, between)
    slot, settled = buffer[:, read : read + k], vectors[:, read : read + k]
    kernels.write(maps(padded(k)), None, 1.0, slot, settled[0], settled[1])
    kernels.write(maps(padded(k)), mask(k), 0.9, slot, settled[0], settled[1])
    for count in range(1, 5):
        gradients = [maps(k, ld=padded(read + (i + 1) * net.slot), start=read) for i in range(count)]
        norms = [norm(ld).narrow(read, read + k) for _ in range(count)]
        consumers = [
            Consumer(g, n, torch.zeros(2, ld)[:, read : read + k]) for g, n in zip(gradients, norms, strict=True)
        ]
        kernels.gather(slot, consumers, slot if count == 4 else None, slot)
    kernels.finish(slot, slot, (settled[0], settled[1], settled[2]), mask(k), 0.9, maps(padded(k)))


def convolutions(net: Net, layer: int) -> None:
    """A layer's fused convolutions (stage S4)."""
    k = net.growth
    read, ld = net.entering + layer * net.slot, padded(net.entering + net.layers * net.slot)
    buffer, vectors = maps(ld), torch.zeros(2, ld)
    slot, settled = buffer[:, read : read + k], vectors[:, read : read + k]
    steps = [(buffer[:, :read], slot, settled, 3)]
    if net.bottleneck is not None:
        between = maps(net.bottleneck)
        steps = [(buffer[:, :read], between, vectors[:, : net.bottleneck], 1), (between, slot, settled, 3)]
    for source, target, statistics, window in steps:
        c, made = source.shape[1], target.shape[1]
        weight, d_out = torch.zeros(made, c, window, window), maps(padded(made))
        conv_forward(source, norm(c), weight, mask(made), 0.9, target, *statistics)
        conv_dgrad(d_out, weight, source, norm(c), source, source, torch.zeros(2, c))
        conv_wgrad(source, norm(c), d_out, weight)


STAGES: dict[str, Callable[[Net, int], None]] = {"S3": pointwise, "S4": convolutions}


def compiled(sm: int, stages: list[str], layers: int) -> list[dict[str, Any]]:
    """Compile what the nets' first layers launch: all variants of all kernels, one row each."""
    with Compiler(sm) as compiler:
        for name, net in NETS.items():
            compiler.net = name
            for layer in range(min(net.layers, layers)):
                for stage in stages:
                    STAGES[stage](net, layer)
    return compiler.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--layers", type=int, default=100, help="of each net, from the first")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [row for sm in args.sm for row in compiled(sm, args.stages, args.layers)]
    for row in sorted(rows, key=lambda row: (row["kernel"], row["variant"], row["sm"])):
        print(
            f"{row['kernel']:16} sm_{row['sm']} {row['registers']:4} registers {row['spills']:4} spilled "
            f"{row['shared']:6} shared {row['warps']} warps  {row['variant']}  [{'; '.join(row['nets'])}]"
        )
    for sm in args.sm:
        for name in NETS:
            count = sum(name in row["nets"] for row in rows if row["sm"] == sm)
            print(f"sm_{sm}: {name}: {count} variants")
    if args.out:
        for row in rows:
            del row["hash"]
        args.out.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

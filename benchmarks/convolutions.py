"""How fast PyTorch's convolutions (cuDNN) are on the notebook's layers, alone and with the passes around them.

    python benchmarks/convolutions.py --batches 256 --sides 32 --out benchmarks/results/convolutions_gpu.json
    python benchmarks/convolutions.py --out benchmarks/results/convolutions_gpu.json     # the rest; again goes on
    python benchmarks/convolutions.py --device cpu --batches 4 --sides 8 --channels 35 80     # to try it out

A layer reads C maps, a range of the channels of a block's buffer, and makes K with a 3x3 convolution. Each block of the
notebook's net has C = 35, 70 .. 420 and K = 35; with padded widths C = 40, 80 .. 480 and K = 40. Of each case are timed

    torch    fprop, dgrad, wgrad    PyTorch's convolutions alone, on dense maps as wide as said, not padded further
    layer    forward, backward      a layer as `Convolutions` computes it: the passes and PyTorch's convolutions

The backward pass is dgrad, wgrad and the sum of gradients; without dropout.

TFLOP/s count the convolution's products alone, and GB/s the maps that must at least be read and written (MAPS), so that
both are effective figures. Calls follow each other on the same tensors: what fits the GPU's cache is read from there,
and GB/s may exceed the memory's. The queue is filled while the GPU waits, so that launches cost nothing. The cases'
rounds go through all that is timed, every second one backwards, and medians count. What --out holds already is left
out. "step" lines sum a net's 4 blocks of 12 layers where all its cases are there.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_dist.environment import describe_environment
from densenet_dist.model.fused.convolutions import Convolutions
from densenet_dist.model.fused.types import Unit
from densenet_dist.model.kernels import choose_kernels
from densenet_dist.model.kernels.interface import Norm, NormGrad, OutputGradient, Statistics

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHANNELS = (*range(40, 481, 40), 35, 210, 420)
MADE = (40, 35, 64)
NETS = {"padded": (range(40, 481, 40), 40), "unpadded": (range(35, 421, 35), 35)}
MAPS: dict[str, tuple[int, int]] = {
    "torch fprop": (1, 1),
    "torch dgrad": (1, 1),
    "torch wgrad": (1, 1),
    "layer forward": (3, 3),
    "layer backward": (8, 2),
}
"""How often each reads or writes the C maps and the K maps."""
UNFINISHED = 75
"""Exit code if cases are left."""
SLEEP = 8_000_000
"""Cycles for which the GPU waits while its queue is filled: about 4 ms."""


class Case(NamedTuple):
    side: int
    batch: int
    read: int
    made: int

    @property
    def flops(self) -> int:
        return 2 * 9 * self.read * self.made * self.batch * self.side**2

    def __str__(self) -> str:
        return f"{self.side:2}x{self.side:<2} batch {self.batch:3} C {self.read:3} K {self.made}"


class Timer:
    """Times work on a device, in rounds that go through all of it."""

    def __init__(self, device: torch.device, calls: int, rounds: int) -> None:
        self.device, self.calls, self.rounds = device, calls, rounds

    def once(self, work: Callable[[], object]) -> float:
        """Seconds a call."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            for _ in range(self.calls):
                work()
            return (time.perf_counter() - started) / self.calls
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP)
        start.record()
        for _ in range(self.calls):
            work()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3 / self.calls

    def medians(self, works: dict[str, Callable[[], object]]) -> dict[str, float]:
        taken: dict[str, list[float]] = {name: [] for name in works}
        for number in range(self.rounds):
            for name in list(works)[:: -1 if number % 2 else 1]:
                taken[name].append(self.once(works[name]))
        return {name: statistics.median(values) for name, values in taken.items()}


class Results:
    """Rows that a file keeps while they are made, and what it held before."""

    def __init__(self, out: Path | None, minutes: float, **about: Any) -> None:
        self.out, self.about, self.stop = out, about, time.monotonic() + 60 * minutes
        self.rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out and out.exists() else []

    def has(self, key: dict[str, Any]) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def left(self) -> bool:
        """Whether there is time for another case."""
        return time.monotonic() < self.stop

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.out:
            self.out.write_text(json.dumps({**self.about, "rows": self.rows}, indent=1) + "\n")


def channels_last(channels: int, case: Case, like: dict[str, Any]) -> Tensor:
    return torch.randn(case.batch, case.side, case.side, channels, **like).permute(0, 3, 1, 2)


def random_norm(channels: int, device: torch.device) -> Norm:
    gamma, beta, mean, var = torch.rand(4, channels, device=device).unbind()
    return Norm(gamma + 0.5, beta - 0.5, mean - 0.5, var + 0.5, 1e-3)


def alone(case: Case, like: dict[str, Any], weight: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """PyTorch's three."""
    rectified, d_made = channels_last(case.read, case, like).relu_(), channels_last(case.made, case, like)
    shape = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    weight = weight.to(rectified.dtype)
    yield "torch fprop", partial(torch.ops.aten.convolution, rectified, weight, None, *shape)
    back = partial(torch.ops.aten.convolution_backward, d_made, rectified, weight, None, *shape)
    yield "torch dgrad", partial(back, [True, False, False])
    yield "torch wgrad", partial(back, [False, True, False])


def layer(case: Case, like: dict[str, Any], weight: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """The layer on a block's buffers."""
    device, dtype = like["device"], like["dtype"]
    width = max(455 if case.read % 8 else 520, -(-(case.read + case.made) // 8) * 8)
    buffer, accumulator, out = (channels_last(width, case, like) for _ in range(3))
    maps, accumulator, out = (tensor[:, : case.read] for tensor in (buffer, accumulator, out))
    slot = buffer[:, case.read : case.read + case.made]
    norm = random_norm(case.read, device)
    into, (sums, share) = torch.zeros(2, case.made, device=device), torch.zeros(2, 2, case.read, device=device)
    unit = Unit(norm.gamma, norm.beta, weight, norm.eps)
    way = Convolutions(choose_kernels(device, dtype), maps, [unit])
    d_made = channels_last(way.padded(case.made), case, like)
    d_made[:, case.made :] = 0
    yield "layer forward", partial(way.forward, unit, maps, norm, None, slot, Statistics(*into))
    norm_grad, d_output = NormGrad(norm, sums, share), OutputGradient(d_made, d_made)
    yield "layer backward", partial(way.backward_accumulate, unit, maps, norm_grad, d_output, True, accumulator, out)


def measure(case: Case, like: dict[str, Any], timer: Timer) -> dict[str, Any]:
    """Milliseconds of all that works, and why the rest doesn't."""
    weight = torch.randn(case.made, case.read, 3, 3, device=like["device"]) / (3 * case.read**0.5)
    weight = weight.contiguous(memory_format=torch.channels_last)
    works, failed = {}, {}
    for name, work in (*alone(case, like, weight), *layer(case, like, weight)):
        try:
            for _ in range(2):  # the first call chooses or compiles a kernel
                work()
            if timer.device.type == "cuda":
                torch.cuda.synchronize()
            works[name] = work
        except Exception as error:  # one that can't be had must not hide the others
            if "CUDA error" in str(error):
                raise  # nothing works after it
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    milliseconds = {name: 1e3 * seconds for name, seconds in timer.medians(works).items()}
    return {**case._asdict(), "ms": milliseconds, "failed": failed}


def figures(case: Case, name: str, milliseconds: float, size: int) -> str:
    read, made = MAPS[name]
    moved = case.batch * case.side**2 * (read * case.read + made * case.made) * size
    flops = case.flops * (2 if name.endswith("backward") else 1)
    rates = f"{flops / milliseconds / 1e9:6.1f} TFLOP/s {moved / milliseconds / 1e6:5.0f} GB/s"
    return f"{name.split()[1]} {milliseconds:8.4f} ms {rates}"


def show(row: dict[str, Any], size: int) -> None:
    case = Case(row["side"], row["batch"], row["read"], row["made"])
    for family in ("torch", "layer"):
        parts = [figures(case, name, ms, size) for name, ms in row["ms"].items() if name.split()[0] == family]
        if parts:
            print(f"{case}  {family:6}  " + " | ".join(parts), flush=True)
    for name, reason in row["failed"].items():
        print(f"{case}  {name} failed: {reason}", flush=True)


def show_steps(rows: list[dict[str, Any]]) -> None:
    """What a net's layers take together, for each batch size, where they all are there."""
    held = {(r["batch"], r["made"], r["read"], r["side"]): r["ms"] for r in rows}
    for net, (widths, made) in NETS.items():
        for batch in sorted({key[0] for key in held}):
            parts = [held.get((batch, made, read, side)) for read in widths for side in (32, 16, 8, 4)]
            if any(part is None for part in parts):
                continue
            names = [name for name in MAPS if all(part and name in part for part in parts)]
            sums = {name: sum(part[name] for part in parts if part) for name in names}
            print(f"step {net} batch {batch}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in sums.items()))


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The heaviest first; widths that no tensor core likes with K = 35 alone, padded ones with every K."""
    for made in args.made:
        for side in args.sides:
            for batch in args.batches:
                for read in args.channels:
                    if read % 8 == 0 or made % 8:
                        yield Case(side, batch, read, made)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, else fp32")
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS, help="C")
    parser.add_argument("--made", type=int, nargs="+", default=MADE, help="K")
    parser.add_argument("--sides", type=int, nargs="+", default=(32, 16, 8, 4))
    parser.add_argument("--batches", type=int, nargs="+", default=(256, 64))
    parser.add_argument("--calls", type=int, help="one after another, to be timed together: 10 on a GPU, else 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0, help="no case begins after them")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(3, "convolutions.py: PyTorch sees no CUDA GPU here; --device cpu tries the script out\n")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    on_gpu = args.device == "cuda"
    dtype, device = args.dtype or ("bf16" if on_gpu else "fp32"), torch.device(args.device)
    timer = Timer(device, args.calls or (10 if on_gpu else 1), args.rounds)
    results = Results(args.out, args.minutes, calls=timer.calls, rounds=args.rounds, **describe_environment())
    about = {"dtype": dtype, "device": torch.cuda.get_device_name() if on_gpu else "cpu"}
    left_out = 0
    for case in cases(args):
        if results.has({**case._asdict(), **about}):
            continue
        if not results.left():
            left_out += 1
            continue
        row = measure(case, {"device": device, "dtype": DTYPES[dtype]}, timer)
        results.add({**row, **about})
        show(row, DTYPES[dtype].itemsize)
    show_steps([row for row in results.rows if all(row[name] == value for name, value in about.items())])
    if left_out:
        print(f"{left_out} cases are left: the same command with --out continues with them")
        raise SystemExit(UNFINISHED)


if __name__ == "__main__":
    main()

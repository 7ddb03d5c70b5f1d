"""Measure the host time of a training step of the fused form as a GPU run would spend it, without a GPU.

    OMP_NUM_THREADS=1 nice -n -20 taskset -c 1 python benchmarks/host_time.py [--nets notebook] [--profile 30]

A step is forward pass, loss, backward pass by autograd's engine, fused SGD and `zero_grad`, in bfloat16 under autocast.
Two images of 16 x 16 pixels on the CPU replace the batch: the number of operations does not depend on it. Assumptions:

- A small operator on a CPU costs the host what launching its kernel on a GPU does, a few microseconds.
- Convolutions allocate their results in Python (6 and 12 us, in place of cuDNN's host time). Multi-tensor operators
  (SGD, running statistics) are called and do nothing.
- Triton's launch is real but for its part in C. The replacement takes 2 us, about as long as cuLaunchKernelEx.
- The step waits for nothing: the queue of the GPU is never full.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import torch
import triton
from measuring import print_table
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel

from densenet_dist.model import fused_block
from densenet_dist.model.fused import backward, convolutions, forward, operator
from densenet_dist.model.kernels.triton_kernels import TritonKernels
from densenet_dist.model.variants import densenet

NETS: Final[dict[str, dict[str, Any]]] = {
    "notebook": {"variant": "notebook"},
    "bc100": {"variant": "densenet_bc", "depth": 100, "growth_rate": 12},
}
LAUNCHER: Final = {"global_scratch_size": 0, "profile_scratch_size": 0, "launch_cooperative_grid": False}
LIBRARY: Final = torch.library.Library("aten", "IMPL")  # operators are replaced while it exists


def launch(*arguments: Any) -> None:
    """Read the arguments as the launcher in C does."""
    for argument in arguments[13:]:
        if isinstance(argument, Tensor):
            argument.data_ptr()


def compiled(kernel: Any, key: str, signature: Any, device: int, *_: Any, **__: Any) -> Any:
    """Return and cache a kernel of Triton without its binary."""
    run, made = CudaLauncher.__new__(CudaLauncher), CompiledKernel.__new__(CompiledKernel)
    vars(run).update(LAUNCHER, global_scratch_align=0, profile_scratch_align=0, launch_pdl=False, launch=launch)
    vars(made).update(name="", src=None, module=0, function=0, _run=run, packed_metadata=())
    kernel.device_caches[device][0][key] = made
    return made


def convolution(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """Allocate the output of a convolution with the same height and width."""
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)


def convolution_backward(_: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    """Allocate the gradients that are needed."""
    needed = zip((x, weight), rest[-1], strict=False)
    return *(torch.empty_like(t, memory_format=torch.channels_last) if need else None for t, need in needed), None


def pretend_gpu() -> None:
    """Send the fused block on the CPU through Triton's path, and replace what computes."""
    for function in (convolution, convolution_backward):
        LIBRARY.impl(function.__name__, function, "CPU")
    for name in ("_foreach_add_.Scalar", "_foreach_lerp_.Scalar", "_fused_sgd_"):
        LIBRARY.impl(name, lambda *_, **__: None, "CPU")
    target = GPUTarget("cuda", 90, 32)
    driver = {"device": lambda: 0, "stream": lambda _: 0, "target": lambda: target}
    triton.runtime.driver.set_active(SimpleNamespace(**{f"get_current_{name}": get for name, get in driver.items()}))
    for owner, name, value in (
        (Tensor, "is_cuda", True),
        (triton.runtime.jit.JITFunction, "_do_compile", compiled),
        (fused_block, "_falls_back", lambda _: False),
        (operator, "choose_kernels", lambda *_: TritonKernels()),
        (forward, "choose_convolutions", convolutions.Convolutions),
        (backward, "choose_convolutions", convolutions.Convolutions),
    ):
        setattr(owner, name, value)


def training_step(net: str) -> Callable[[], None]:
    """Return a function that runs one step."""
    model = densenet(**NETS[net], num_classes=10, image_size=16, drop_rate=0, block="fused").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
    images, labels = torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(step: Callable[[], None], steps: int = 30) -> list[float]:
    """Return the medians of wall and CPU time of a step, in ms."""
    times = []
    for _ in range(steps):
        started = time.perf_counter(), time.process_time()
        step()
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return [1e3 * statistics.median(kind) for kind in zip(*times, strict=True)]


def main() -> None:
    """Measure, print a table, and on request where the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default=",".join(NETS), help="of these, separated by commas")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N functions that take longest")
    args, rows = parser.parse_args(), []
    warnings.filterwarnings("ignore", "Warning only once for all operators")
    pretend_gpu()
    for net in args.nets.split(","):
        step = training_step(net)
        measure(step, 5)  # warm up
        rounds = zip(*(measure(step) for _ in range(3)), strict=True)
        rows.append([net, *(", ".join(f"{ms:.2f}" for ms in sorted(kind)) for kind in rounds)])
        if args.profile:
            with cProfile.Profile() as profile:
                measure(step)
            pstats.Stats(profile).sort_stats("tottime").print_stats(args.profile)
    print_table("host time of a training step, ms, medians of three rounds", ["network", "wall", "CPU"], rows)


if __name__ == "__main__":
    main()

"""The experimental forward pass of a 3x3 layer for sm_90a: compile it, compare it with PyTorch, time it.

    python benchmarks/hopper/fprop.py --out hopper.json

`fprop.cu` has never run. It packs three horizontal taps of 40 maps into N = 120 columns (docs/log.md, 2026-11-30). It
is compiled with the NVRTC that PyTorch brings, which needs no GPU. On a GPU of compute capability 9.0 its result is
compared with `F.conv2d`, and only if they agree its speed is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SOURCE = Path(__file__).with_name("fprop.cu")
OPTIONS = (b"--gpu-architecture=sm_90a", b"--std=c++17", b"-default-device")
SIDE, ROWS, MADE, CHUNK, STAGES = 32, 8, 40, 64, 2
"""Side of the maps, rows of a tile, maps made, channels of a chunk, and chunks in shared memory, as in `fprop.cu`."""
THREADS, PRODUCERS = 384, 128
SHARED_BYTES = STAGES * 2 * CHUNK * ((ROWS + 2) * SIDE + 3 * 3 * MADE)
BFLOAT16, SWIZZLE_128B, PROMOTE_256B, MAX_DYNAMIC_SHARED = 9, 3, 3, 8
"""Constants of the driver's interface (cuda.h)."""


def compile_source(source: Path) -> bytes:
    """Return the cubin of a CUDA source.

    Raises:
        ValueError: with the compiler's log.
    """
    import nvidia

    folders = [Path(folder, "cu13", "lib") for folder in nvidia.__path__]
    builtins = next(path for folder in folders for path in folder.glob("libnvrtc-builtins.so*"))
    library = next(path for folder in folders for path in folder.glob("libnvrtc.so.13"))
    ctypes.CDLL(str(builtins))  # NVRTC looks it up by name
    nvrtc, program, size = ctypes.CDLL(str(library)), ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None)
    failed = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), (ctypes.c_char_p * len(OPTIONS))(*OPTIONS))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if failed:
        raise ValueError(log.value.decode())
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    return cubin.raw


def check_resources(cubin: bytes) -> dict[str, int]:
    """Return registers per thread, and bytes of stack and static shared memory.

    Raises:
        ValueError: the kernel would wait forever, because its warpgroups ask for more registers than a block has.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}
    (producer,), (consumer,) = (
        re.findall(rf"setmaxnreg\.{way}\S+ (\d+)", SOURCE.read_text()) for way in ("dec", "inc")
    )
    wanted = int(producer) * PRODUCERS + int(consumer) * (THREADS - PRODUCERS)
    if wanted > found["REG"] * THREADS:
        raise ValueError(f"setmaxnreg asks for {wanted} registers per block, which has {found['REG'] * THREADS}")
    return found


class Driver:
    """Launches the kernel in PyTorch's context through libcuda."""

    def __init__(self, cubin: bytes) -> None:
        torch.zeros(1, device="cuda")  # makes the context
        self._cuda, self._module, self._kernel = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), cubin)
        self._call("cuModuleGetFunction", ctypes.byref(self._kernel), self._module, b"fprop")
        self._call("cuFuncSetAttribute", self._kernel, MAX_DYNAMIC_SHARED, SHARED_BYTES)
        self._blocks = torch.cuda.get_device_properties(0).multi_processor_count

    def fprop(self, maps: Tensor, weights: Tensor, affine: Tensor, slot: Tensor, moments: Tensor) -> None:
        """Write the layer's maps into `slot`.

        Args:
            maps: (N, 32, 32, C), bfloat16, its last dimension contiguous, C a multiple of 8.
            weights: of `packed`.
            affine: (2, size), float32: factors, then summands; size is C rounded up to a multiple of 64.
            slot: (N, 32, 32, 40), bfloat16, a view of a wider buffer.
            moments: (4 N, 2, 40), float32: sums, and sums of squares, of each 8 rows.
        """
        images = len(maps)
        of_maps = self._tensor_map(maps, (1, ROWS + 2, SIDE, CHUNK))
        of_weights = self._tensor_map(weights, (3, 3 * MADE, CHUNK))
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (affine, slot, moments)]
        numbers = [ctypes.c_int(number) for number in (affine.shape[1], slot.stride(2), images)]
        arguments = [of_maps, of_weights, pointers[0], numbers[0], pointers[1], numbers[1], pointers[2], numbers[2]]
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        grid = (min(self._blocks, images * SIDE // ROWS), 1, 1)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._call("cuLaunchKernel", self._kernel, *grid, THREADS, 1, 1, SHARED_BYTES, stream, addresses, None)

    def _tensor_map(self, tensor: Tensor, box: Sequence[int]) -> Any:
        """A descriptor for the bulk copies; sizes begin with the innermost dimension, strides with the second."""
        rank = tensor.dim()
        memory = ctypes.create_string_buffer(192)  # 128 bytes that begin at a multiple of 64
        found = (ctypes.c_char * 128).from_buffer(memory, -ctypes.addressof(memory) % 64)
        sizes = (ctypes.c_uint64 * rank)(*reversed(tensor.shape))
        strides = (ctypes.c_uint64 * (rank - 1))(*(2 * stride for stride in reversed(tensor.stride()[:-1])))
        boxes, steps = (ctypes.c_uint32 * rank)(*reversed(box)), (ctypes.c_uint32 * rank)(*[1] * rank)
        address = ctypes.c_void_p(tensor.data_ptr())
        options = (0, SWIZZLE_128B, PROMOTE_256B, 0)  # not interleaved; zeros outside of the tensor
        self._call("cuTensorMapEncodeTiled", found, BFLOAT16, rank, address, sizes, strides, boxes, steps, *options)
        return found

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._cuda, name)(*arguments):
            raise RuntimeError(f"{name} failed with error {code}")


def packed(weight: Tensor, size: int) -> Tensor:
    """(40, C, 3, 3) as (3, 120, size): for each vertical tap, the maps of each horizontal tap; channels last."""
    found = weight.new_zeros(3, 3, MADE, size)
    found[..., : weight.shape[1]] = weight.permute(2, 3, 0, 1)
    return found.view(3, 3 * MADE, size)


class Case:
    """A layer that reads `read` maps of a buffer, with random values."""

    def __init__(self, images: int, read: int) -> None:
        size = -(-read // CHUNK) * CHUNK
        like: Any = {"device": "cuda", "dtype": torch.bfloat16}
        buffer = torch.randn(images, SIDE, SIDE, read + MADE, **like)
        self.maps, self.slot = buffer[..., :read], buffer[..., read:]
        self.affine = torch.randn(2, size, device="cuda")
        weight = torch.randn(MADE, read, 3, 3, **like) / (3 * read**0.5)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.weights, self.moments = packed(self.weight, size), torch.empty(images * 4, 2, MADE, device="cuda")
        factors, summands = self.affine[:, :read]
        self.rectified = (self.maps * factors + summands).relu().bfloat16().permute(0, 3, 1, 2)
        self.flops = 2 * 9 * read * MADE * images * SIDE**2

    def run(self, driver: Driver) -> None:
        driver.fprop(self.maps, self.weights, self.affine, self.slot, self.moments)

    def convolve(self, weight: Tensor) -> Tensor:
        return F.conv2d(self.rectified.to(weight.dtype), weight, padding=1)

    def errors(self) -> dict[str, float]:
        """Largest errors, relative to the largest value."""
        expected = self.convolve(self.weight.float()).permute(0, 2, 3, 1)
        tiles = self.slot.float().reshape(-1, ROWS * SIDE, MADE)
        sums, squares = self.moments.unbind(1)
        pairs = ((self.slot, expected), (sums, tiles.sum(1)), (squares, tiles.square().sum(1)))
        found = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
        return dict(zip(("maps", "sums", "squares"), found, strict=True))


def milliseconds(work: Callable[[], object], calls: int = 20) -> float:
    for _ in range(3):
        work()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # about 10 ms, in which the launches are queued
    start.record()
    for _ in range(calls):
        work()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / calls


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    cubin = compile_source(SOURCE)
    found: dict[str, Any] = {"resources": check_resources(cubin), "errors": [], "speed": []}
    print(f"compiled for sm_90a: {found['resources']}, {SHARED_BYTES} bytes of dynamic shared memory", flush=True)

    def keep(name: str, row: dict[str, Any]) -> None:
        found[name].append(row)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(name, {key: float(f"{value:.4g}") for key, value in row.items()}, flush=True)

    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True
        driver = Driver(cubin)
        for images, read in ((1, 64), (5, 40), (40, 480)):
            case = Case(images, read)
            case.run(driver)
            keep("errors", {"images": images, "read": read, **case.errors()})
        if not all(row[name] < 2**-7 for row in found["errors"] for name in ("maps", "sums", "squares")):
            raise SystemExit("the result differs from that of F.conv2d; its speed is not measured")
        for read in range(40, 481, 40):
            case = Case(256, read)
            ours, cudnn = (
                milliseconds(work) for work in (partial(case.run, driver), partial(case.convolve, case.weight))
            )
            rates = {"TFLOP/s": case.flops / ours / 1e9, "cuDNN TFLOP/s": case.flops / cudnn / 1e9}
            keep("speed", {"read": read, "ms": ours, "cuDNN ms": cudnn, **rates})
    else:
        print("not run: there is no GPU of compute capability 9.0")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

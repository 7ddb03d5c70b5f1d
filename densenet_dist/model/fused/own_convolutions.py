"""Which convolutions run on this project's CPU kernels and which on oneDNN: measured once per machine."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from densenet_dist.cache_folder import cache_folder
from densenet_dist.model.fused.convolutions import Convolutions, CpuConvolutions
from densenet_dist.model.fused.structure import Arriving, Statistics, Unit, new_maps
from densenet_dist.model.kernels.interface import Kernels, Reader
from densenet_dist.model.kernels.native import SIDES, NativeKernels

TYPICAL: Final = {1: (120, 48), 3: (48, 12)}
"""By the side of a convolution: maps that a layer in the middle of DenseNet-BC (k = 12) reads and makes."""

IMAGES, SIZE, ROUNDS = 8, 32, 5
_ONEDNN: Final = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


def choose_convolutions(kernels: Kernels, like: Tensor, units: Sequence[Unit]) -> Convolutions:
    """Return the convolutions for the device of `like`; arguments as of `Convolutions`."""
    if like.device.type != "cpu":
        return Convolutions(kernels, like, units)
    own: frozenset[int] = frozenset()
    if isinstance(kernels, NativeKernels) and like.dtype == torch.float32:
        own = own_sides(kernels, torch.get_num_threads())
    elif isinstance(kernels, NativeKernels) and like.dtype == torch.float64:
        own = frozenset(SIDES)  # for tests and checks; its speed matters to nobody
    return CpuConvolutions(kernels, like, units, own)


@cache
def own_sides(kernels: NativeKernels, threads: int) -> frozenset[int]:
    """Return the sides of the convolutions that `kernels` compute faster than oneDNN with so many threads.

    Measured in float32 (about 0.1 s) and kept in `cache_folder`, so that runs on one machine compute the same bits.
    """
    settings = [kernels.name, torch.__version__, str(threads), *(os.environ.get(name, "") for name in _ONEDNN)]
    name = hashlib.blake2b("\0".join(settings).encode(), digest_size=10).hexdigest()
    file: Path | None = None
    with suppress(Exception):  # no cache, or a damaged file: measure
        file = cache_folder() / f"convolutions-{name}.json"
        return frozenset(side for side in SIDES if json.loads(file.read_text())[str(side)] == "own")
    times = {side: _seconds(kernels, side) for side in SIDES}
    own = frozenset(side for side, (ours, onednn) in times.items() if ours <= onednn)
    figures = {f"{side}_ms": [round(1e3 * seconds, 3) for seconds in pair] for side, pair in times.items()}
    with suppress(OSError):
        if file is not None:
            made = file.with_name(f"{file.name}.{os.getpid()}")
            made.write_text(json.dumps({side: "own" if side in own else "onednn" for side in SIDES} | figures) + "\n")
            made.rename(file)
    return own


def _seconds(kernels: NativeKernels, side: int) -> tuple[float, float]:
    """Time a forward and backward pass of a typical layer by `kernels` and by oneDNN, in turns; the fastest of each."""
    reads, makes = TYPICAL[side]
    generator = torch.Generator().manual_seed(0)
    like = torch.empty(IMAGES, 1, SIZE, SIZE)
    maps, d_made = (new_maps(like, channels).normal_(generator=generator) for channels in (reads, makes))
    weight = torch.empty(makes, reads, side, side).normal_(generator=generator)
    ones, zeros = torch.ones(reads), torch.zeros(reads)
    unit = Unit(ones, zeros, weight, 1e-5, frozen=(zeros, ones))
    best: dict[frozenset[int], float] = {}
    passes = {
        own: partial(_passes, CpuConvolutions(kernels, maps, [unit], own), unit, maps, d_made)
        for own in (frozenset(SIDES), frozenset[int]())
    }
    for _ in range(ROUNDS):
        for own, run in passes.items():
            started = time.perf_counter()
            run()
            best[own] = min(best.get(own, float("inf")), time.perf_counter() - started)
    ours, onednn = best.values()
    return ours, onednn


def _passes(convolutions: CpuConvolutions, unit: Unit, maps: Tensor, d_made: Tensor) -> None:
    norm = unit.norm(Statistics.empty(0, maps), maps.dtype)
    convolutions.write(unit, maps, norm, None, 1.0, new_maps(maps, unit.makes), Statistics.empty(unit.makes, maps))
    reader = Reader(norm, maps.new_empty(2, unit.reads), None)
    convolutions.accumulate(unit, maps, reader, Arriving(d_made, d_made), True, maps, new_maps(maps, unit.reads))

"""Kernels of the fused dense block: C++ on CPUs, Triton on GPUs, PyTorch operators elsewhere."""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib.util import find_spec

import torch

from densenet_dist.model.kernels.build import BuildError
from densenet_dist.model.kernels.interface import Kernels
from densenet_dist.model.kernels.native import TYPES, NativeKernels


def choose_kernels(device: torch.device, dtype: torch.dtype, values: int = 1) -> Kernels:
    """Return the fastest kernels for maps of this device and dtype, those in PyTorch operators if there are no others.

    If `values` is 0 (a rank may have no images), there is nothing to launch.
    """
    if values == 0:
        return Kernels()
    if device.type == "cuda" and unavailable("cuda") is None:
        from densenet_dist.model.kernels.triton_kernels import TritonKernels  # Triton is not installed everywhere

        return TritonKernels()
    if device.type == "cpu" and dtype in TYPES and unavailable("cpu") is None:
        return _native()
    return Kernels()


@cache
def unavailable(device_type: str) -> str | None:
    """Return why a type of device has no fast kernels, in a few words; None if it has them or needs none."""
    if device_type == "cuda":
        if not find_spec("triton"):
            return "Triton is not installed"
        if "CC" not in os.environ and not (shutil.which("gcc") or shutil.which("clang")):
            return "Triton needs a C compiler, and there is neither gcc nor clang"
        return None
    if device_type == "cpu":
        try:
            _native()
        except BuildError as error:
            return str(error)
        return None
    return None if device_type == "meta" else f"there are none for {device_type}"


@cache
def _native() -> NativeKernels:
    return NativeKernels()

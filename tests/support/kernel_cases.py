"""What the tests of the kernels share: seeded maps in wider buffers, tolerances, and how to run Triton without a GPU.

Triton decides when it is imported whether its interpreter runs the kernels, and the interpreter changes
`triton.language` for the whole process. So a test file with Triton kernels runs twice: `run_interpreted` starts pytest
on it once more with TRITON_INTERPRET=1, where they run on the CPU; elsewhere they need a GPU.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from densenet_dist.model.kernels.interface import Dropout, Kernels, Norm, accumulation_type

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON: Any = pytest.param(
    "triton",
    marks=[] if INTERPRETED else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
)
NAMES = [TRITON] if INTERPRETED else ["native", TRITON]
"""Kernels that can be tested in this process, `TRITON` only in the interpreter or on a GPU."""

# Relative to the largest value: one rounding (the interpreter's of bfloat16 cuts off) or the summing before it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-14}


def make_kernels(name: str) -> Kernels:
    if name == "native":
        from densenet_dist.model.kernels.native import NativeKernels

        return NativeKernels()
    pytest.importorskip("triton")
    if INTERPRETED:
        _mend_interpreter()
    from densenet_dist.model.kernels import triton_kernels
    from densenet_dist.model.kernels.triton_kernels import TritonKernels

    triton_kernels._MAX_GROUPS = 3  # so that few pixels are several tiles in each of several groups
    return TritonKernels()


def device_of(name: str) -> str:
    return "cuda" if name == "triton" and not INTERPRETED else "cpu"


def run_interpreted(path: str) -> None:
    """Run a test file's cases in Triton's interpreter, in a process of its own."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", path, "-q", "-p", "no:cacheprovider", "-W", "error"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{ran.stdout[-6000:]}\n{ran.stderr[-2000:]}"
    assert " passed" in ran.stdout


def _mend_interpreter() -> None:
    """Let loops run to a bound that is known at run time only; Triton 3.6 does not know how to with NumPy 2.4."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor
    if original.__name__ == "patched":
        return

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


class Draw:
    """Draws seeded tensors on a device."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype, self.wide = device, dtype, accumulation_type(dtype)
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.device, dtype or self.wide)

    def maps(
        self, n: int, c: int, h: int, w: int, *, before: int = 0, after: int = 0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Maps (n, c, h, w) in channels_last memory, with so many channels of a wider tensor, NaN, before and after."""
        buffer = self.normal(n, h, w, before + c + after, dtype=dtype or self.dtype)
        buffer[..., :before] = torch.nan
        buffer[..., before + c :] = torch.nan
        return buffer.permute(0, 3, 1, 2)[:, before : before + c]

    def dropout(self, n: int, c: int, h: int, w: int, keep: float = 0.7) -> Dropout:
        kept = torch.rand(n, h, w, c, generator=self.generator) < keep
        return Dropout(kept.to(self.device).permute(0, 3, 1, 2), keep)

    def norm(self, c: int) -> Norm:
        """A normalization, each vector a range of a longer one."""
        gamma, beta, mean = (self.normal(c + 3)[3:] for _ in range(3))
        return Norm(gamma, beta, mean, self.normal(c + 3)[3:].square() + 0.2, 1e-3)


def double(norm: Norm) -> Norm:
    """The same in float64."""
    return Norm(*(vector.double() for vector in norm[:4]), norm.eps)


def keep_away_from_zero(maps: Tensor, norms: list[Norm]) -> None:
    """Change maps that a norm takes so close to 0 that float32 and float64 might disagree on the sign."""
    for norm in norms:
        y = (maps.double() - norm.mean[:, None, None]) * norm.scale()[:, None, None] + norm.beta[:, None, None]
        maps[y.abs() < 0.01] = 8


def close(found: Tensor, expected: Tensor, tolerance: float | None = None, label: object = "") -> None:
    """Compare with a float64 result, relative to its largest element."""
    bound = TOLERANCE[found.dtype] if tolerance is None else tolerance
    largest = expected.nan_to_num().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=bound * max(largest, 1e-30), equal_nan=True,
        msg=lambda message: f"{label}: {message}",
    )  # fmt: skip


def check_statistics(slot: Tensor, mean: Tensor, var: Tensor) -> None:
    """Those of what the slot holds, rounding included, are as near as the accumulation type allows."""
    stored, wide = slot.double(), mean.dtype == torch.float64
    atol = (1e-14 if wide else 1e-6) * stored.abs().max().item()
    torch.testing.assert_close(mean.double(), stored.mean((0, 2, 3)), rtol=0, atol=atol)
    close(var, stored.var((0, 2, 3), unbiased=False), 1e-13 if wide else 5e-6)


class Untouched:
    """Sees that in a buffer only the channels of `maps` changed; the others are NaN."""

    def __init__(self, maps: Tensor) -> None:
        n, channels, h, w = maps.shape
        storage = torch.empty(0, dtype=maps.dtype, device=maps.device).set_(maps.untyped_storage())
        self.buffer = storage.view(n, h, w, -1)
        self.start = maps.storage_offset()
        self.stop = self.start + channels

    def check(self) -> None:
        assert self.buffer[..., : self.start].isnan().all()
        assert self.buffer[..., self.stop :].isnan().all()

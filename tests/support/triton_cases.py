"""What the tests of the Triton kernels share: seeded maps in wider buffers, tolerances, and how to run without a GPU.

Triton decides when it is imported whether its interpreter runs the kernels, and the interpreter changes
`triton.language` for the whole process. So a test file with kernels runs twice: `run_interpreted` starts pytest on it
once more with TRITON_INTERPRET=1, where `DEVICES` is the CPU; elsewhere `DEVICES` is a GPU, or a skip.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from densenet_dist.model.kernels.interface import Norm, accumulation_type

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES: list[Any] = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=[pytest.mark.gpu, _needs_gpu])]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# One rounding of the result; the interpreter's of bfloat16 cuts off. For wide types, the summing before it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-14}


def run_interpreted(path: str) -> None:
    """Run a test file's cases in Triton's interpreter, in a process of its own."""
    command = [sys.executable, "-m", "pytest", path, "-q", "-p", "no:cacheprovider", "-W", "error"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{ran.stdout[-6000:]}\n{ran.stderr[-2000:]}"
    assert " passed" in ran.stdout


def mend_interpreter() -> None:
    """Let loops run to a bound that is known at run time only; Triton 3.6 does not know how to with NumPy 2.4."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    mend_interpreter()


class Draw:
    """Draws seeded tensors on a device."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32) -> None:
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

    def mask(self, n: int, c: int, h: int, w: int, keep: float) -> Tensor:
        kept = torch.rand(n, h, w, c, generator=self.generator) < keep
        return kept.to(self.device).permute(0, 3, 1, 2)

    def norm(self, c: int) -> Norm:
        """A normalisation, each vector a range of a longer one."""
        gamma, beta, mean = (self.normal(c + 3)[3:] for _ in range(3))
        return Norm(gamma, beta, mean, self.normal(c + 3)[3:].square() + 0.2, 1e-3)


def double(norm: Norm) -> Norm:
    """The same in float64."""
    return Norm(*(vector.double() for vector in norm[:4]), norm.eps)


def close(found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Compare with a float64 result, relative to its largest element."""
    bound = TOLERANCE[found.dtype] if tolerance is None else tolerance
    atol = bound * max(expected.nan_to_num().abs().max().item(), 1e-30)
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol, equal_nan=True)


def check_statistics(slot: Tensor, mean: Tensor, var: Tensor) -> None:
    """Those of what the slot holds, rounding included, are as near as the accumulation type allows."""
    stored, wide = slot.double(), mean.dtype == torch.float64
    atol = (1e-14 if wide else 1e-6) * stored.abs().max().item()
    torch.testing.assert_close(mean.double(), stored.mean((0, 2, 3)), rtol=0, atol=atol)
    close(var, stored.var((0, 2, 3), unbiased=False), 1e-13 if wide else 5e-6)


def surroundings(maps: Tensor) -> Tensor:
    """The buffer whose channels maps are a range of: (N, all channels, H, W)."""
    n, _, h, w = maps.shape
    storage = torch.empty(0, dtype=maps.dtype, device=maps.device).set_(maps.untyped_storage())
    return storage.view(n, h, w, -1).permute(0, 3, 1, 2)


class Untouched:
    """Sees that in a buffer only the channels of `maps` changed; the others are NaN."""

    def __init__(self, maps: Tensor) -> None:
        self.buffer = surroundings(maps)
        self.start = maps.storage_offset()
        self.stop = self.start + maps.shape[1]

    def check(self) -> None:
        assert self.buffer[:, : self.start].isnan().all()
        assert self.buffer[:, self.stop :].isnan().all()

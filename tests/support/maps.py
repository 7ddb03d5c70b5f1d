"""What the tests of the CPU kernels share: seeded maps in wider buffers, tolerances, and a number of threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from densenet_dist.model.kernels.interface import Norm, accumulation_type

ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8}  # relative, of a stored value
SUMMING = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2e-6}  # of a sum, to that of absolute values
OUTSIDE = -77.0  # what lies in a buffer beside the channels that a pass may touch


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Draw:
    """Seeded maps and vectors; whatever it draws is a range of a wider buffer's channels where `wide`."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, *, wide: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.shape, self.dtype, self.wide = shape, dtype, wide
        self.buffers: list[tuple[Tensor, int, int]] = []

    def room(self, channels: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        n, own, height, width = self.shape
        channels = own if channels is None else channels
        before, after = (3, 4) if self.wide else (0, 0)
        buffer = torch.full((n, height, width, before + channels + after), OUTSIDE, dtype=dtype or self.dtype)
        self.buffers.append((buffer, before, before + channels))
        return buffer[..., before : before + channels].permute(0, 3, 1, 2)

    def maps(self, channels: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        into = self.room(channels, dtype)
        return into.copy_(torch.randn(into.shape, generator=self.generator))

    def vector(self, low: float, high: float, channels: int | None = None) -> Tensor:
        elements = self.shape[1] if channels is None else channels
        drawn = torch.rand(elements, generator=self.generator) * (high - low) + low
        return drawn.to(accumulation_type(self.dtype))

    def norm(self, eps: float = 1e-3) -> Norm:
        return Norm(self.vector(0.5, 1.5), self.vector(-1, 1), self.vector(-0.5, 0.5), self.vector(0.5, 2), eps)

    def mask(self, channels: int | None = None) -> Tensor:
        n, own, height, width = self.shape
        shape = (n, own if channels is None else channels, height, width)
        mask = torch.rand(shape, generator=self.generator) < 0.7
        return mask.contiguous(memory_format=torch.channels_last)

    def untouched(self) -> bool:
        """Whether nothing was written beside the ranges handed out."""
        beside = [part for buffer, start, stop in self.buffers for part in (buffer[..., :start], buffer[..., stop:])]
        return all(bool((part == OUTSIDE).all()) for part in beside)


def exact(norm: Norm) -> Norm:
    return Norm(*(vector.double() for vector in norm[:4]), norm.eps)


def double(maps: Tensor | None) -> Tensor | None:
    return None if maps is None else maps.to(torch.float64, copy=True)


def assert_stored(found: Tensor, expected: Tensor, intermediate: float = 1.0) -> None:
    """Compare with what float64 gives, but for one rounding to the stored type and those of numbers this large."""
    wide = accumulation_type(found.dtype)
    torch.testing.assert_close(
        found.double(), expected, rtol=ROUNDING[found.dtype], atol=ROUNDING[wide] * intermediate, equal_nan=True
    )


def away_from_zero(draw: Draw, norms: list[Norm]) -> Tensor:
    """Maps that no norm takes so close to 0 that float32 and float64 might disagree on the sign."""
    maps = draw.maps()
    for norm in norms:
        y = (maps.double() - norm.mean[:, None, None]) * norm.scale()[:, None, None] + norm.beta[:, None, None]
        maps[y.abs() < 0.01] = 8
    return maps

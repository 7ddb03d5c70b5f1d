"""What the Triton kernels share: maps seen as rows of channels, batch normalisation, sums over rows.

Maps (N, C, H, W) with channels side by side are N H W rows, one after another at a fixed distance. A kernel's program
takes a tile, some rows by some channels. Numbers that differ from layer to layer are ordinary arguments, and kernels
are not specialised on them: what a kernel is compiled for is the types, the optional inputs, the tile (a power of two)
and how many channels can be moved at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from densenet_dist.model.kernels.interface import MOST_CONSUMERS, Norm, accumulation_type

_LARGEST_INT = 2**31 - 1

# A tile of the kernels that reduce: few channels, so that there are enough programs, and many partial results at once.
_MANY, _FEW = 512, 8


def kernel(function: Callable[..., None]) -> Any:
    """`triton.jit`, but compiled for types and compile-time constants alone, whatever the numbers and addresses are."""
    names = [p.name for p in inspect.signature(function).parameters.values() if "constexpr" not in str(p.annotation)]
    return triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(function)


class Rows(NamedTuple):
    """Where the maps of a tensor lie."""

    pixels: int
    """N H W, the number of rows."""

    channels: int
    """C."""

    ld: int
    """From a row to the next, in elements."""


def rows_of(maps: Tensor) -> Rows:
    """See maps (N, C, H, W) as rows.

    Raises:
        ValueError: they are empty, too many, or don't lie as rows at one distance, channels side by side.
    """
    shape, strides = maps.shape, maps.stride()
    if len(shape) != 4 or maps.numel() == 0:
        raise ValueError(f"expected maps (N, C, H, W), some of them, not {tuple(shape)}")
    n, channels, height, width = shape
    # The stride of a dimension of size 1 says nothing.
    ld = strides[3] if width > 1 else strides[2] if height > 1 else strides[0] if n > 1 else channels
    expected = (height * width * ld, 1, width * ld, ld)
    if ld < channels or any(size > 1 and strides[i] != expected[i] for i, size in enumerate(shape)):
        raise ValueError(f"expected maps in channels_last memory, not strides {strides} of {tuple(shape)}")
    count = n * height * width
    if count > _LARGEST_INT:
        raise ValueError(f"{count} pixels are more than an int32 counts")
    return Rows(count, channels, ld)


def rows_like(tensor: Tensor, maps: Tensor, channels: int) -> Rows:
    """See a tensor as rows for the same pixels as those of maps, with so many channels or more.

    Raises:
        ValueError: as for `rows_of`, or its pixels or channels are others.
    """
    if tensor.shape[0] != maps.shape[0] or tensor.shape[2:] != maps.shape[2:] or tensor.shape[1] < channels:
        raise ValueError(f"{tuple(tensor.shape)} are not {channels} maps for the pixels of {tuple(maps.shape)}")
    return rows_of(tensor)


def check_norm(norm: Norm, maps: Tensor) -> None:
    """See that a normalisation fits maps.

    Raises:
        ValueError: it doesn't.
    """
    for settled in norm[:4]:
        check_vector(settled, maps)


def check_vector(vector: Tensor, maps: Tensor) -> None:
    """See that a vector has one contiguous element of the accumulation type a channel.

    Raises:
        ValueError: it hasn't.
    """
    if vector.shape != maps.shape[1:2] or not vector.is_contiguous() or vector.dtype != accumulation_type(maps.dtype):
        raise ValueError(
            f"a vector for {maps.shape[1]} channels of {maps.dtype} has shape {tuple(vector.shape)}, "
            f"strides {vector.stride()} and {vector.dtype}"
        )


def mask_bytes(mask: Tensor, maps: Tensor) -> Tensor:
    """See a bool mask of the maps' shape, dense in channels_last memory, as bytes.

    Raises:
        ValueError: it is not like that.
    """
    if mask.shape != maps.shape or mask.dtype != torch.bool or rows_of(mask).ld != mask.shape[1]:
        raise ValueError(f"expected a dense bool mask {tuple(maps.shape)}, not {mask.dtype} {tuple(mask.shape)}")
    return mask.view(torch.uint8)


def scale_of(keep: float) -> float:
    """What dropout multiplies by, as PyTorch's does."""
    return 1 / keep if keep > 0 else 0.0


def read_width(channels: int, *tensors: Tensor | None) -> int:
    """How many channels a thread can read at once: 8, 4 or 1.

    Eights that begin before the last channel are read to their end if memory goes on that far; kernels drop the rest.
    """
    wide = all(t is None or (_is_aligned(t, 8) and _goes_on(t, round_up(channels, 8))) for t in tensors)
    return 8 if wide else write_width(channels, *tensors)


def write_width(channels: int, *tensors: Tensor | None) -> int:
    """How many channels a thread can write at once: 8, 4 or 1. Or read, where that is as many to the end."""
    for width in (8, 4):
        if channels % width == 0 and all(t is None or _is_aligned(t, width) for t in tensors):
            return width
    return 1


def vector_width(*vectors: Tensor) -> int:
    """How many elements a thread can read at once of contiguous vectors of the same length: 4 or 1."""
    aligned = all(v.numel() % 4 == 0 and v.data_ptr() % (4 * v.element_size()) == 0 for v in vectors)
    return 4 if aligned else 1


def _is_aligned(tensor: Tensor, width: int) -> bool:
    return tensor.data_ptr() % (width * tensor.element_size()) == 0 and rows_of(tensor).ld % width == 0


def _goes_on(tensor: Tensor, channels: int) -> bool:
    """Whether memory holds so many elements from the beginning of the tensor's last row."""
    rows = rows_of(tensor)
    stop = tensor.storage_offset() + (rows.pixels - 1) * rows.ld + channels
    return stop * tensor.element_size() <= tensor.untyped_storage().nbytes()


def block_of(channels: int) -> int:
    """How many channels a tile has: the smallest of 16, 32 and 64 that holds them all, else 64."""
    return min(64, max(16, 1 << (channels - 1).bit_length()))


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below the value."""
    return -(-value // multiple) * multiple


@triton.jit
def wide(x):
    """In the accumulation type."""
    return x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)


@triton.jit
def tile_at(start, ld, row, channel, WIDTH: tl.constexpr):
    """Pointers (rows, channels) into maps, each WIDTH of a row aligned."""
    # A row times its length does not fit in 32 bits for large batches of wide maps.
    pointers = start + row.to(tl.int64)[:, None] * ld + channel[None, :]
    # Said of the pointers: alignment known from arguments would have the kernel compiled anew for each combination.
    return tl.multiple_of(pointers, [1, WIDTH * (start.dtype.element_ty.primitive_bitwidth // 8)])


@triton.jit
def tile_mask(row, rows, channel, channels, WIDTH: tl.constexpr):
    """What of a tile exists, (rows, channels); `channels` is rounded up to a multiple of WIDTH."""
    channels = (channels + WIDTH - 1) // WIDTH
    return (row < rows)[:, None] & (channel < channels * WIDTH)[None, :]


@triton.jit
def vector(start, channel, channels, WIDTH: tl.constexpr):
    """One element a channel, 0 beyond the last; `channels` is a multiple of WIDTH, which the division tells Triton."""
    pointers = tl.multiple_of(start + channel, [WIDTH * (start.dtype.element_ty.primitive_bitwidth // 8)])
    return tl.load(pointers, mask=channel < channels // WIDTH * WIDTH, other=0)


@triton.jit
def scale_and_shift(gamma, beta, mean, var, eps, channel, channels, WIDTH: tl.constexpr):
    """s and t of norm(x) = s x + t, by one expression for every kernel, so that all agree on the sign of norm(x)."""
    variance = vector(var, channel, channels, WIDTH)
    s = vector(gamma, channel, channels, WIDTH) * tl.rsqrt(variance + tl.full([], eps, variance.dtype))
    return s, tl.fma(-vector(mean, channel, channels, WIDTH), s, vector(beta, channel, channels, WIDTH))


@triton.jit
def affine(x, s, t):
    """Norm(x) of a tile, with one rounding."""
    return tl.fma(x, tl.broadcast_to(s[None, :], x.shape), tl.broadcast_to(t[None, :], x.shape))


@triton.jit
def relu(y):
    """Rectify; NaN stays NaN."""
    return tl.maximum(y, 0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def dropped(x, kept, scale):
    """What dropout leaves of a tile; as in PyTorch a product, in which NaN stays NaN where it is not kept."""
    return x * (kept.to(x.dtype) * tl.full([], scale, x.dtype))


@triton.jit
def store_moments(moments, tile, x, row, rows, channel, channels):
    """Put a tile's mean and sum of squares about it, for each channel, into moments (tiles, 2, channels)."""
    exists = (row < rows)[:, None]
    mean = tl.sum(tl.where(exists, x, 0), 0) / tl.sum((row < rows).to(x.dtype), 0)
    off = tl.where(exists, x - mean[None, :], 0)
    place = moments + tile.to(tl.int64) * 2 * channels + channel
    tl.store(place, mean, mask=channel < channels)
    tl.store(place + channels, tl.sum(off * off, 0), mask=channel < channels)


@triton.jit
def store_sums(sums, tile, first, second, channel, channels):
    """Put the sums over a tile's rows of two tiles, for each channel, into sums (tiles, 2, channels)."""
    place = sums + tile.to(tl.int64) * 2 * channels + channel
    tl.store(place, tl.sum(first, 0), mask=channel < channels)
    tl.store(place + channels, tl.sum(second, 0), mask=channel < channels)


@kernel
def _combine_moments(
    moments, mean, var, tiles, tile_rows, rows, channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean and variance of all rows from those of tiles, all of `tile_rows` but the last (Chan et al. 1983)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = channel < channels
    pivot = tl.load(moments + channel, mask=here, other=0)  # keeps a large common mean out of the sum
    total = tl.zeros([BLOCK_T, BLOCK_C], pivot.dtype)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        exists = (tile < tiles)[:, None] & here[None, :]
        count = tl.minimum(rows - tile * tile_rows, tile_rows).to(pivot.dtype)
        place = moments + tile.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        total += tl.where(exists, (tl.load(place, mask=exists, other=0) - pivot[None, :]) * count[:, None], 0)
    middle = pivot + tl.sum(total, 0) / rows
    squares = tl.zeros([BLOCK_T, BLOCK_C], pivot.dtype)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        exists = (tile < tiles)[:, None] & here[None, :]
        count = tl.minimum(rows - tile * tile_rows, tile_rows).to(pivot.dtype)
        place = moments + tile.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        off = tl.load(place, mask=exists, other=0) - middle[None, :]
        inner = tl.load(place + channels, mask=exists, other=0)
        squares += tl.where(exists, inner + off * off * count[:, None], 0)
    tl.store(mean + channel, middle, mask=here)
    tl.store(var + channel, tl.sum(squares, 0) / rows, mask=here)


def combine_moments(moments: Tensor, tile_rows: int, rows: int, mean: Tensor, var: Tensor) -> None:
    """Reduce what `store_moments` wrote.

    Args:
        moments: (tiles, 2, C), accumulation type.
        tile_rows: rows of every tile but the last.
        rows: of all tiles together.
        mean: (C,), contiguous, accumulation type, becomes the mean of all rows.
        var: (C,) likewise, becomes the variance (divided by the number of rows).
    """
    tiles, _, channels = moments.shape
    _combine_moments[(triton.cdiv(channels, _FEW),)](
        moments, mean, var, tiles, tile_rows, rows, channels, BLOCK_T=_MANY, BLOCK_C=_FEW
    )


@kernel
def _reduce_sums(
    partial, out0, ld0, out1, ld1, out2, ld2, out3, ld3, tiles, channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Add up one of the two rows of one of partial (outs, tiles, 2, channels) over tiles."""
    which, row = tl.program_id(1) // 2, tl.program_id(1) % 2
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_T, BLOCK_C], partial.dtype.element_ty)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        exists = (tile < tiles)[:, None] & (channel < channels)[None, :]
        place = partial + ((which * tiles + tile.to(tl.int64)) * 2 + row)[:, None] * channels + channel[None, :]
        total += tl.load(place, mask=exists, other=0)
    sums = tl.sum(total, 0)
    outs, lds = (out0, out1, out2, out3), (ld0, ld1, ld2, ld3)
    for i in tl.static_range(4):
        tl.store(outs[i] + row * lds[i] + channel, sums, mask=(channel < channels) & (which == i))


def reduce_sums(partial: Tensor, outs: Sequence[Tensor]) -> None:
    """Reduce what `store_sums` wrote.

    Args:
        partial: (outs, tiles, 2, C), accumulation type.
        outs: one to four of (2, C), the same type, each row contiguous; become the sums over tiles.

    Raises:
        ValueError: one of `outs` is something else.
    """
    count, tiles, _, channels = partial.shape
    for out in outs:
        if out.shape != partial.shape[2:] or (channels > 1 and out.stride(1) != 1) or out.dtype != partial.dtype:
            raise ValueError(f"sums are (2, {channels}) of {partial.dtype}, not {tuple(out.shape)} of {out.dtype}")
    # Those that are missing are never written to.
    places = [part for i in range(MOST_CONSUMERS) for part in (outs[i % count], outs[i % count].stride(0))]
    _reduce_sums[(triton.cdiv(channels, _FEW), 2 * count)](
        partial, *places, tiles, channels, BLOCK_T=_MANY, BLOCK_C=_FEW
    )

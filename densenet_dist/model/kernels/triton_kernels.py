"""The passes as Triton kernels, for CUDA: each reads and writes every map once.

Maps (N, C, H, W) with channels side by side are N H W rows, one after another at a fixed distance. A kernel's program
takes a tile, some rows by up to 64 channels, small enough for many of them to be under way on each multiprocessor.
Those that sum leave one partial result a tile, which a second small kernel adds up in a fixed order: no atomics.

Numbers that differ from layer to layer are ordinary arguments, and kernels are not specialised on them: what a kernel
is compiled for is the types, the optional inputs, the tile (a power of two) and how many channels can be moved at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from densenet_dist.model.kernels.interface import MOST_CONSUMERS, Consumer, Kernels, Norm, accumulation_type

_TILE = 4096
"""Elements of a tile of a pass that sums nothing: 32 a thread, at 4 warps."""

_WRITE_TILE = 8192
"""Elements of a tile of `write`: 32 a thread, at 8 warps, for partial results to be few beside the maps."""

_GATHER_TILE = 4096
"""Elements of a tile of `gather`: 16 a thread, at 8 warps: with 32, four consumers take all the registers."""

_MANY, _FEW = 512, 8
"""A tile of the kernels that reduce: few channels, so that there are enough programs; many partial results at once."""

_LARGEST_INT = 2**31 - 1


class TritonKernels(Kernels):
    """The passes on a GPU. Launches are on the current device and stream.

    Raises:
        ValueError: any method's, where a tensor doesn't lie in memory as the interface says.
    """

    def bn_relu(self, maps: Tensor, norm: Norm, out: Tensor) -> None:
        """Normalise and rectify."""
        _check_vectors(maps, *norm[:4])
        rows, written = _rows_of(maps), _rows_like(out, maps)
        block = _block_of(written.channels)
        _bn_relu[_grid(written, block, _TILE)](
            maps, rows.ld, *norm, out, written.ld, rows.pixels, rows.channels, written.channels,
            READ=_read_width(rows.channels, maps), WRITE=_write_width(written.channels, out),
            NORM=_vector_width(*norm[:4]), BLOCK_R=_TILE // block, BLOCK_C=block, num_warps=4,
        )  # fmt: skip

    def write(
        self, made: Tensor, mask: Tensor | None, keep: float, slot: Tensor, mean: Tensor | None, var: Tensor | None
    ) -> None:
        """Drop, store, and take the statistics of what was stored."""
        rows, written = _rows_like(made, slot), _rows_of(slot)
        in_place = made.data_ptr() == slot.data_ptr() and rows.ld == written.ld and made.dtype == slot.dtype
        keeps = _mask_bytes(mask, slot)
        if (mean is None or var is None) and in_place and keeps is None:
            return
        block = _block_of(written.channels)
        grid = _grid(written, block, _WRITE_TILE)
        moments = None
        if mean is not None and var is not None:
            _check_vectors(slot, mean, var)
            moments = mean.new_empty(triton.cdiv(rows.pixels, _WRITE_TILE // block), 2, written.channels)
        _write[grid](
            made, rows.ld, keeps, _scale_of(keep), slot, written.ld, moments, rows.pixels, written.channels,
            STORE=keeps is not None or not in_place,
            READ=_read_width(written.channels, made), WRITE=_write_width(written.channels, slot, keeps),
            BLOCK_R=_WRITE_TILE // block, BLOCK_C=block, num_warps=8,
        )  # fmt: skip
        if moments is not None:
            _combine_moments[(triton.cdiv(written.channels, _FEW),)](
                moments, mean, var, len(moments), _WRITE_TILE // block, rows.pixels, written.channels,
                BLOCK_T=_MANY, BLOCK_C=_FEW,
            )  # fmt: skip

    def gather(self, maps: Tensor, consumers: Sequence[Consumer], carry: Tensor | None, out: Tensor) -> None:
        """Sum what came back to the consumers."""
        rows, written = _rows_of(maps), _rows_like(out, maps)
        if not 1 <= len(consumers) <= MOST_CONSUMERS:
            raise ValueError(f"{len(consumers)} consumers, not 1 to {MOST_CONSUMERS}")
        for _, norm, into in consumers:
            _check_vectors(maps, *norm[:4])
            if into.shape != (2, rows.channels) or into.dtype != norm.mean.dtype or not into.is_contiguous():
                raise ValueError(f"sums are (2, {rows.channels}) of {norm.mean.dtype}, not {tuple(into.shape)}")
        block = _block_of(rows.channels)
        tiles = triton.cdiv(rows.pixels, _GATHER_TILE // block)
        count, wide_type = len(consumers), accumulation_type(maps.dtype)
        sums = torch.empty(count, tiles, 2, rows.channels, dtype=wide_type, device=maps.device)
        flat = [part for g, norm, _ in consumers for part in (g, _rows_like(g, maps).ld, *norm)]
        _gather[_grid(rows, block, _GATHER_TILE)](
            maps, rows.ld, *flat, *[None] * (7 * (MOST_CONSUMERS - count)),
            carry, 0 if carry is None else _rows_like(carry, maps).ld, out, written.ld, sums,
            rows.pixels, rows.channels, tiles, COUNT=count,
            READ=_read_width(rows.channels, maps, carry, *(consumer.gradient for consumer in consumers)),
            WRITE=_write_width(rows.channels, out),
            NORM=_vector_width(*(settled for consumer in consumers for settled in consumer.norm[:4])),
            BLOCK_R=_GATHER_TILE // block, BLOCK_C=block, num_warps=8,
        )  # fmt: skip
        # Those that are missing are never written to.
        outs = [consumers[i % count].sums for i in range(MOST_CONSUMERS)]
        _reduce_sums[(triton.cdiv(rows.channels, _FEW), 2 * count)](
            sums, *outs, tiles, rows.channels, BLOCK_T=_MANY, BLOCK_C=_FEW
        )

    def finish(
        self, gradient: Tensor, maps: Tensor, correction: tuple[Tensor, Tensor, Tensor] | None, mask: Tensor | None,
        keep: float, out: Tensor,
    ) -> None:  # fmt: skip
        """Apply the statistics' share of the gradient, then dropout's."""
        rows, written = _rows_of(maps), _rows_like(out, maps)
        keeps = _mask_bytes(mask, maps)
        _check_vectors(maps, *(correction or ()))
        block = _block_of(written.channels)
        _finish[_grid(written, block, _TILE)](
            gradient, _rows_like(gradient, maps).ld, maps, rows.ld, *(correction or (None, None, None)),
            keeps, _scale_of(keep), out, written.ld, rows.pixels, rows.channels, written.channels,
            READ=_read_width(rows.channels, gradient, maps), MASK=_write_width(rows.channels, keeps),
            WRITE=_write_width(written.channels, out), NORM=_vector_width(*(correction or ())),
            BLOCK_R=_TILE // block, BLOCK_C=block, num_warps=4,
        )  # fmt: skip


def _grid(rows: _Rows, block: int, tile: int) -> tuple[int]:
    """One program a tile; the channels of the same rows come one after another."""
    return (triton.cdiv(rows.pixels, tile // block) * triton.cdiv(rows.channels, block),)


class _Rows(NamedTuple):
    """Where the maps of a tensor lie."""

    pixels: int
    """N H W, the number of rows."""

    channels: int
    """C."""

    ld: int
    """From a row to the next, in elements."""


def _rows_of(maps: Tensor) -> _Rows:
    """See maps (N, C, H, W), some of them, as rows: channels side by side, rows at one distance."""
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
    return _Rows(count, channels, ld)


def _rows_like(tensor: Tensor, maps: Tensor) -> _Rows:
    """See a tensor as rows for the pixels of maps, with as many channels or more."""
    if tensor.shape[0] != maps.shape[0] or tensor.shape[2:] != maps.shape[2:] or tensor.shape[1] < maps.shape[1]:
        raise ValueError(f"{tuple(tensor.shape)} are not {maps.shape[1]} maps for the pixels of {tuple(maps.shape)}")
    return _rows_of(tensor)


def _check_vectors(maps: Tensor, *vectors: Tensor) -> None:
    """See that vectors have one contiguous element of the accumulation type a channel."""
    for vector in vectors:
        fits = vector.shape == maps.shape[1:2] and vector.dtype == accumulation_type(maps.dtype)
        if not fits or not vector.is_contiguous():
            raise ValueError(
                f"a vector for {maps.shape[1]} channels of {maps.dtype} has shape {tuple(vector.shape)}, "
                f"strides {vector.stride()} and {vector.dtype}"
            )


def _mask_bytes(mask: Tensor | None, maps: Tensor) -> Tensor | None:
    """See a bool mask of the maps' shape, dense in channels_last memory, as bytes."""
    if mask is None:
        return None
    if mask.shape != maps.shape or mask.dtype != torch.bool or _rows_of(mask).ld != mask.shape[1]:
        raise ValueError(f"expected a dense bool mask {tuple(maps.shape)}, not {mask.dtype} {tuple(mask.shape)}")
    return mask.view(torch.uint8)


def _scale_of(keep: float) -> float:
    """What dropout multiplies by, as PyTorch's does."""
    return 1 / keep if keep > 0 else 0.0


def _read_width(channels: int, *tensors: Tensor | None) -> int:
    """How many channels a thread can read at once: 8, 4 or 1.

    Eights that begin before the last channel are read to their end if memory goes on that far; kernels drop the rest.
    """
    to_end = -(-channels // 8) * 8
    wide = all(t is None or (_is_aligned(t, 8) and _goes_on(t, to_end)) for t in tensors)
    return 8 if wide else _write_width(channels, *tensors)


def _write_width(channels: int, *tensors: Tensor | None) -> int:
    """How many channels a thread can write at once: 8, 4 or 1. Or read, where that is as many to the end."""
    for width in (8, 4):
        if channels % width == 0 and all(t is None or _is_aligned(t, width) for t in tensors):
            return width
    return 1


def _vector_width(*vectors: Tensor) -> int:
    """How many elements a thread can read at once of contiguous vectors of the same length: 4 or 1."""
    aligned = all(v.numel() % 4 == 0 and v.data_ptr() % (4 * v.element_size()) == 0 for v in vectors)
    return 4 if aligned else 1


def _is_aligned(tensor: Tensor, width: int) -> bool:
    return tensor.data_ptr() % (width * tensor.element_size()) == 0 and _rows_of(tensor).ld % width == 0


def _goes_on(tensor: Tensor, channels: int) -> bool:
    """Whether memory holds so many elements from the beginning of the tensor's last row."""
    rows = _rows_of(tensor)
    stop = tensor.storage_offset() + (rows.pixels - 1) * rows.ld + channels
    return stop * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _block_of(channels: int) -> int:
    """How many channels a tile has: the smallest of 16, 32 and 64 that holds them all, else 64."""
    return min(64, max(16, 1 << (channels - 1).bit_length()))


def _kernel(function: Callable[..., None]) -> Any:
    """`triton.jit`, but compiled for types and compile-time constants alone, whatever the numbers and addresses are."""
    names = [p.name for p in inspect.signature(function).parameters.values() if "constexpr" not in str(p.annotation)]
    return triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(function)


@triton.jit
def _tile(channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of this program: the number of its tile of rows, its rows and its channels."""
    blocks = tl.cdiv(channels, BLOCK_C)
    number = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return number, number * BLOCK_R + tl.arange(0, BLOCK_R), channel


@_kernel
def _bn_relu(
    maps, maps_ld, gamma, beta, mean, var, eps: tl.float64, out, out_ld, rows, channels, out_channels,
    READ: tl.constexpr, WRITE: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, row, channel = _tile(out_channels, BLOCK_R, BLOCK_C)
    here = _tile_mask(row, rows, channel, channels, READ)
    x = _wide(tl.load(_tile_at(maps, maps_ld, row, channel, READ), mask=here, other=0))
    s, t = _scale_and_shift(gamma, beta, mean, var, eps, channel, channels, NORM)
    y = tl.where((channel < channels)[None, :], _relu(_affine(x, s, t)), 0)
    here = _tile_mask(row, rows, channel, out_channels, WRITE)
    tl.store(_tile_at(out, out_ld, row, channel, WRITE), y, mask=here)


@_kernel
def _write(
    made, made_ld, mask, scale: tl.float64, slot, slot_ld, moments, rows, channels,
    STORE: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, row, channel = _tile(channels, BLOCK_R, BLOCK_C)
    x = tl.load(
        _tile_at(made, made_ld, row, channel, READ), mask=_tile_mask(row, rows, channel, channels, READ), other=0
    )
    here = _tile_mask(row, rows, channel, channels, WRITE)
    if mask is not None:
        kept = tl.load(_tile_at(mask, channels, row, channel, WRITE), mask=here, other=0)
        x = _dropped(_wide(x), kept, scale)
    x = x.to(slot.dtype.element_ty)
    if STORE:
        tl.store(_tile_at(slot, slot_ld, row, channel, WRITE), x, mask=here)
    if moments is not None:
        _store_moments(moments, tile, _wide(x), row, rows, channel, channels)


@_kernel
def _gather(
    maps, maps_ld,
    gradient0, ld0, gamma0, beta0, mean0, var0, eps0: tl.float64,
    gradient1, ld1, gamma1, beta1, mean1, var1, eps1: tl.float64,
    gradient2, ld2, gamma2, beta2, mean2, var2, eps2: tl.float64,
    gradient3, ld3, gamma3, beta3, mean3, var3, eps3: tl.float64,
    carry, carry_ld, out, out_ld, sums, rows, channels, tiles, COUNT: tl.constexpr,
    READ: tl.constexpr, WRITE: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, row, channel = _tile(channels, BLOCK_R, BLOCK_C)
    gradient, ld = (gradient0, gradient1, gradient2, gradient3), (ld0, ld1, ld2, ld3)
    gamma, beta = (gamma0, gamma1, gamma2, gamma3), (beta0, beta1, beta2, beta3)
    mean, var, eps = (mean0, mean1, mean2, mean3), (var0, var1, var2, var3), (eps0, eps1, eps2, eps3)
    here = _tile_mask(row, rows, channel, channels, READ)
    x = _wide(tl.load(_tile_at(maps, maps_ld, row, channel, READ), mask=here, other=0))
    if carry is not None:
        total = _wide(tl.load(_tile_at(carry, carry_ld, row, channel, READ), mask=here, other=0))
    else:
        total = tl.zeros([BLOCK_R, BLOCK_C], x.dtype)
    for i in tl.static_range(COUNT):
        g = _wide(tl.load(_tile_at(gradient[i], ld[i], row, channel, READ), mask=here, other=0))
        s, t = _scale_and_shift(gamma[i], beta[i], mean[i], var[i], eps[i], channel, channels, NORM)
        g = tl.where(_affine(x, s, t) <= 0, 0, g)
        total += s[None, :] * g
        centre = _vector(mean[i], channel, channels, NORM)
        _store_sums(sums, i * tiles + tile, g, g * (x - centre[None, :]), channel, channels)
    here = _tile_mask(row, rows, channel, channels, WRITE)
    tl.store(_tile_at(out, out_ld, row, channel, WRITE), total, mask=here)


@_kernel
def _finish(
    gradient, gradient_ld, maps, maps_ld, mean, offset, slope, mask, scale: tl.float64, out, out_ld, rows, channels,
    out_channels,
    READ: tl.constexpr, MASK: tl.constexpr, WRITE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, row, channel = _tile(out_channels, BLOCK_R, BLOCK_C)
    here = _tile_mask(row, rows, channel, channels, READ)
    g = _wide(tl.load(_tile_at(gradient, gradient_ld, row, channel, READ), mask=here, other=0))
    if mean is not None:
        x = _wide(tl.load(_tile_at(maps, maps_ld, row, channel, READ), mask=here, other=0))
        x -= _vector(mean, channel, channels, NORM)[None, :]
        g -= _vector(offset, channel, channels, NORM)[None, :] + _vector(slope, channel, channels, NORM)[None, :] * x
    if mask is not None:
        here = _tile_mask(row, rows, channel, channels, MASK)
        g = _dropped(g, tl.load(_tile_at(mask, channels, row, channel, MASK), mask=here, other=0), scale)
    g = tl.where((channel < channels)[None, :], g, 0)
    tl.store(_tile_at(out, out_ld, row, channel, WRITE), g, mask=_tile_mask(row, rows, channel, out_channels, WRITE))


@_kernel
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


@_kernel
def _reduce_sums(partial, out0, out1, out2, out3, tiles, channels, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
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
    outs = (out0, out1, out2, out3)
    for i in tl.static_range(4):
        tl.store(outs[i] + row * channels + channel, sums, mask=(channel < channels) & (which == i))


@triton.jit
def _wide(x):
    """In the accumulation type."""
    return x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)


@triton.jit
def _tile_at(start, ld, row, channel, WIDTH: tl.constexpr):
    """Pointers (rows, channels) into maps, each WIDTH of a row aligned."""
    # A row times its length does not fit in 32 bits for large batches of wide maps.
    pointers = start + row.to(tl.int64)[:, None] * ld + channel[None, :]
    # Said of the pointers: alignment known from arguments would have the kernel compiled anew for each combination.
    return tl.multiple_of(pointers, [1, WIDTH * (start.dtype.element_ty.primitive_bitwidth // 8)])


@triton.jit
def _tile_mask(row, rows, channel, channels, WIDTH: tl.constexpr):
    """What of a tile exists, (rows, channels); `channels` is rounded up to a multiple of WIDTH."""
    channels = (channels + WIDTH - 1) // WIDTH
    return (row < rows)[:, None] & (channel < channels * WIDTH)[None, :]


@triton.jit
def _vector(start, channel, channels, WIDTH: tl.constexpr):
    """One element a channel, 0 beyond the last; `channels` is a multiple of WIDTH, which the division tells Triton."""
    pointers = tl.multiple_of(start + channel, [WIDTH * (start.dtype.element_ty.primitive_bitwidth // 8)])
    return tl.load(pointers, mask=channel < channels // WIDTH * WIDTH, other=0)


@triton.jit
def _scale_and_shift(gamma, beta, mean, var, eps, channel, channels, WIDTH: tl.constexpr):
    """s and t of norm(x) = s x + t, by one expression for every kernel, so that all agree on the sign of norm(x)."""
    variance = _vector(var, channel, channels, WIDTH)
    s = _vector(gamma, channel, channels, WIDTH) * tl.rsqrt(variance + tl.full([], eps, variance.dtype))
    return s, tl.fma(-_vector(mean, channel, channels, WIDTH), s, _vector(beta, channel, channels, WIDTH))


@triton.jit
def _affine(x, s, t):
    """Norm(x) of a tile, with one rounding."""
    return tl.fma(x, tl.broadcast_to(s[None, :], x.shape), tl.broadcast_to(t[None, :], x.shape))


@triton.jit
def _relu(y):
    """Rectify; NaN stays NaN."""
    return tl.maximum(y, 0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _dropped(x, kept, scale):
    """What dropout leaves of a tile; as in PyTorch a product, in which NaN stays NaN where it is not kept."""
    return x * (kept.to(x.dtype) * tl.full([], scale, x.dtype))


@triton.jit
def _store_moments(moments, tile, x, row, rows, channel, channels):
    """Put a tile's mean and sum of squares about it, for each channel, into moments (tiles, 2, channels)."""
    exists = (row < rows)[:, None]
    mean = tl.sum(tl.where(exists, x, 0), 0) / tl.sum((row < rows).to(x.dtype), 0)
    off = tl.where(exists, x - mean[None, :], 0)
    place = moments + tile.to(tl.int64) * 2 * channels + channel
    tl.store(place, mean, mask=channel < channels)
    tl.store(place + channels, tl.sum(off * off, 0), mask=channel < channels)


@triton.jit
def _store_sums(sums, tile, first, second, channel, channels):
    """Put the sums over a tile's rows of two tiles, for each channel, into sums (tiles, 2, channels)."""
    place = sums + tile.to(tl.int64) * 2 * channels + channel
    tl.store(place, tl.sum(first, 0), mask=channel < channels)
    tl.store(place + channels, tl.sum(second, 0), mask=channel < channels)

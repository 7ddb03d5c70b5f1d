"""The passes as Triton kernels, for CUDA: each reads and writes every map once.

Maps (N, C, H, W) with channels side by side are N H W rows, one after another at a fixed distance. A kernel's program
takes a tile, some rows by up to 64 channels, small enough for many of them to be under way on each multiprocessor.
A program of those that sum takes a group of tiles and leaves a partial result. The last one to finish for the same
channels adds them up, in the order of their rows: which program is the last does not change the sum.

Numbers that differ from layer to layer are ordinary arguments, and kernels are not specialised on them: what a kernel
is compiled for is the types, the optional inputs, the tile (a power of two) and how many channels can be moved at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from densenet_dist.model.kernels.interface import (
    MOST_CONSUMERS,
    Consumer,
    Correction,
    Kernels,
    Norm,
    Rectify,
    accumulation_type,
)

_TILE = 4096
"""Elements of a tile of a pass that sums nothing: 32 a thread, at 4 warps."""

_SUMMING_TILE = 2048
"""Elements of a tile of a pass that sums: 16 a thread, at 8 warps: with 32, four consumers take all the registers."""

_MOST_GROUPS, _PROGRAMS = 512, 2048
"""Groups of tiles, at most: each leaves a partial result, which one program reads; and programs, where there are more
channels than a tile has."""

_PARTIALS = 64
"""How many partial results are added up at once."""

_MOST_WEIGHTS, _WEIGHT_TILE = 16, 1024
"""Weights that are copied in a launch, and elements of theirs in a program."""

_LARGEST_INT = 2**31 - 1
_TICKETS = 1024


class TritonKernels(Kernels):
    """The passes on a GPU. Launches are on the current device and stream.

    Raises:
        ValueError: any method's, where a tensor doesn't lie in memory as the interface says.
    """

    def __init__(self) -> None:
        self._tickets: Tensor | None = None

    def bn_relu(self, maps: Tensor, norm: Norm, out: Tensor) -> None:
        """Normalise and rectify."""
        programs, arguments, constants = _rectifying(maps, norm, out)
        _bn_relu[(programs,)](*arguments, **constants, num_warps=4)

    def write(
        self, made: Tensor, mask: Tensor | None, keep: float, slot: Tensor, mean: Tensor | None, var: Tensor | None
    ) -> None:
        """Drop, store, and take the statistics of what was stored."""
        rows, written = _rows_like(made, slot), _rows_of(slot)
        in_place = made.data_ptr() == slot.data_ptr() and rows.ld == written.ld and made.dtype == slot.dtype
        keeps, kept = _mask_bytes(mask, slot)
        if (mean is None or var is None) and in_place and keeps is None:
            return
        groups = _groups_of(written)
        moments = None
        if mean is not None and var is not None:
            _check_vectors(slot, mean, var)
            moments = mean.new_empty(groups.number, 2, written.channels)
        _write[groups.grid](
            made, rows.ld, keeps, _scale_of(keep), slot, written.ld, moments, mean, var, self._tickets_for(slot),
            rows.pixels, written.channels, groups.tiles, groups.number,
            STORE=keeps is not None or not in_place,
            READ=_read_width(written.channels, rows), WRITE=_write_width(written.channels, written, kept),
            BLOCK_R=groups.rows, BLOCK_C=groups.channels, BLOCK_T=_PARTIALS, num_warps=8,
        )  # fmt: skip

    def gather(self, maps: Tensor, consumers: Sequence[Consumer], carry: Tensor | None, out: Tensor) -> None:
        """Sum what came back to the consumers."""
        rows, written = _rows_of(maps), _rows_like(out, maps)
        before = None if carry is None else _rows_like(carry, maps)
        came = [_rows_like(gradient, maps) for gradient, _ in consumers]
        count, groups = len(consumers), _groups_of(rows)
        if not 1 <= count <= MOST_CONSUMERS:
            raise ValueError(f"{count} consumers, not 1 to {MOST_CONSUMERS}")
        flat: list[object] = []
        for (gradient, (norm, gradients, correction)), where in zip(consumers, came, strict=True):
            flat += [gradient, where.ld, *norm, gradients, _pair(gradients, maps), correction]
            flat.append(0 if correction is None else _pair(correction, maps))
        shape = (count, groups.number, 2, rows.channels)
        sums = torch.empty(shape, dtype=accumulation_type(maps.dtype), device=maps.device)
        _gather[groups.grid](
            maps, rows.ld, *flat, *[None] * (11 * (MOST_CONSUMERS - count)),
            carry, 0 if before is None else before.ld, out, written.ld, sums, self._tickets_for(maps),
            rows.pixels, rows.channels, groups.tiles, groups.number, COUNT=count,
            READ=_read_width(rows.channels, rows, before, *came), WRITE=_write_width(rows.channels, written),
            NORM=_vector_width(maps, *(vector for _, reader in consumers for vector in reader.norm[:4])),
            BLOCK_R=groups.rows, BLOCK_C=groups.channels, BLOCK_T=_PARTIALS, num_warps=8,
        )  # fmt: skip

    def finish(
        self, gradient: Tensor, maps: Tensor, correction: Correction | None, mask: Tensor | None, keep: float,
        out: Tensor, also: Rectify | None = None,
    ) -> None:  # fmt: skip
        """Apply the statistics' share of the gradient, then dropout's."""
        rows, written, came = _rows_of(maps), _rows_like(out, maps), _rows_like(gradient, maps)
        keeps, kept = _mask_bytes(mask, maps)
        mean, sums, values = correction or (None, None, 1.0)
        block = _block_of(written.channels)
        programs = _programs(written, block)
        others, rectify, constants = (0, (None,) * 12, _NOTHING) if also is None else _rectifying(*also)
        _finish[(programs + others,)](
            gradient, came.ld, maps, rows.ld, mean, sums, 0 if sums is None else _pair(sums, maps),
            1 / values, keeps, _scale_of(keep), out, written.ld, rows.pixels, rows.channels, written.channels, programs,
            *rectify, READ=_read_width(rows.channels, came, rows), MASK=_write_width(rows.channels, kept),
            WRITE=_write_width(written.channels, written), NORM=1 if mean is None else _vector_width(maps, mean),
            BLOCK_R=_TILE // block, BLOCK_C=block, **{f"BN_{name}": value for name, value in constants.items()},
            num_warps=4,
        )  # fmt: skip

    def copy_weights(self, sources: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """Copy, convert and pad, or cut."""
        for first in range(0, len(sources), _MOST_WEIGHTS):
            some, into = sources[first : first + _MOST_WEIGHTS], outs[first : first + _MOST_WEIGHTS]
            rows = (_weight_of(source) + _weight_of(out) for source, out in zip(some, into, strict=True))
            layouts = _table(some[0].device, *rows)
            _copy_weights[(triton.cdiv(max(map(torch.numel, into)), _WEIGHT_TILE), len(some))](
                tuple(some), tuple(into), layouts, COUNT=len(some), BLOCK=_WEIGHT_TILE, num_warps=4
            )

    def _tickets_for(self, maps: Tensor) -> Tensor:
        """Counters of programs that are done, by their channels; 0 before and after every launch."""
        if self._tickets is None:
            self._tickets = torch.zeros(_TICKETS, dtype=torch.int32, device=maps.device)
        return self._tickets


def _programs(rows: _Rows, block: int) -> int:
    """One program a tile; the channels of the same rows come one after another."""
    return triton.cdiv(rows.pixels, _TILE // block) * triton.cdiv(rows.channels, block)


def _rectifying(maps: Tensor, norm: Norm, out: Tensor) -> tuple[int, tuple[object, ...], dict[str, int]]:
    """Programs, arguments and compile-time constants of `_rectify`."""
    rows, written = _rows_of(maps), _rows_like(out, maps)
    block = _block_of(written.channels)
    constants = {
        "READ": _read_width(rows.channels, rows),
        "WRITE": _write_width(written.channels, written),
        "NORM": _vector_width(maps, *norm[:4]),
        "BLOCK_R": _TILE // block,
        "BLOCK_C": block,
    }
    arguments = (maps, rows.ld, *norm, out, written.ld, rows.pixels, rows.channels, written.channels)
    return _programs(written, block), arguments, constants


_NOTHING = {"READ": 1, "WRITE": 1, "NORM": 1, "BLOCK_R": 1, "BLOCK_C": 1}


class _Groups(NamedTuple):
    """How the tiles of a pass that sums are divided among programs."""

    rows: int
    """Of a tile."""

    channels: int
    """Of a tile."""

    tiles: int
    """Of a group, one below another."""

    number: int
    """Of groups."""

    grid: tuple[int]


def _groups_of(rows: _Rows) -> _Groups:
    channels = _block_of(rows.channels)
    height, blocks = _SUMMING_TILE // channels, triton.cdiv(rows.channels, channels)
    tiles = triton.cdiv(rows.pixels, height)
    each = triton.cdiv(tiles, max(1, min(_MOST_GROUPS, _PROGRAMS // blocks)))
    number = triton.cdiv(tiles, each)
    return _Groups(height, channels, each, number, (number * blocks,))


@cache
def _table(device: torch.device, *rows: tuple[int, ...]) -> Tensor:
    """Numbers that a kernel reads, on the device; made once, because making it waits for the device."""
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _weight_of(weight: Tensor) -> tuple[int, int, int, int, int, int]:
    """K, C and the taps of a weight (K, C, h, w), and the strides of the three."""
    makes, reads, height, width = weight.shape
    taps, stride = height * width, weight.stride(3) if width > 1 else weight.stride(2)
    if height > 1 and width > 1 and weight.stride(2) != width * stride:
        raise ValueError(f"expected a weight in one of PyTorch's memory formats, not strides {weight.stride()}")
    return makes, reads, taps, weight.stride(0), weight.stride(1), stride


class _Rows(NamedTuple):
    """Where the maps of a tensor lie."""

    pixels: int
    """N H W, the number of rows."""

    channels: int
    """C."""

    ld: int
    """From a row to the next, in elements."""

    aligned: int
    """How many channels are moved at once where that asks for alignment only: 8, 4 or 1."""

    room: int
    """From the beginning of the last row to the end of the memory, in elements."""


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
    size = maps.element_size()
    place = maps.data_ptr() // size | ld
    room = int(maps.untyped_storage().nbytes()) // size - int(maps.storage_offset()) - (count - 1) * ld
    return _Rows(count, channels, ld, 8 if place % 8 == 0 else 4 if place % 4 == 0 else 1, room)


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


def _pair(vectors: Tensor, maps: Tensor) -> int:
    """Check two vectors, (2, C), as `_check_vectors` does; from one to the other, in elements."""
    if vectors.shape != (2, maps.shape[1]) or vectors.stride(1) != 1 or vectors.dtype != accumulation_type(maps.dtype):
        raise ValueError(f"expected two vectors for {maps.shape[1]} channels of {maps.dtype}, not {vectors.shape}")
    return vectors.stride(0)


def _mask_bytes(mask: Tensor | None, maps: Tensor) -> tuple[Tensor | None, _Rows | None]:
    """See a bool mask of the maps' shape, dense in channels_last memory, as bytes and as rows."""
    if mask is None:
        return None, None
    rows = _rows_of(mask)
    if mask.shape != maps.shape or mask.dtype != torch.bool or rows.ld != rows.channels:
        raise ValueError(f"expected a dense bool mask {tuple(maps.shape)}, not {mask.dtype} {tuple(mask.shape)}")
    return mask.view(torch.uint8), rows


def _scale_of(keep: float) -> float:
    """What dropout multiplies by, as PyTorch's does."""
    return 1 / keep if keep > 0 else 0.0


def _read_width(channels: int, *tensors: _Rows | None) -> int:
    """How many channels a thread can read at once: 8, 4 or 1.

    Eights that begin before the last channel are read to their end if memory goes on that far; kernels drop the rest.
    """
    to_end = -(-channels // 8) * 8
    wide = all(rows is None or (rows.aligned == 8 and rows.room >= to_end) for rows in tensors)
    return 8 if wide else _write_width(channels, *tensors)


def _write_width(channels: int, *tensors: _Rows | None) -> int:
    """How many channels a thread can write at once: 8, 4 or 1. Or read, where that is as many to the end."""
    width = min((rows.aligned for rows in tensors if rows is not None), default=8)
    return width if channels % width == 0 else 4 if channels % 4 == 0 and width == 8 else 1


def _vector_width(maps: Tensor, *vectors: Tensor) -> int:
    """Check vectors; how many elements a thread can read of each at once: 4 or 1."""
    _check_vectors(maps, *vectors)
    size = 4 * vectors[0].element_size()
    return 4 if maps.shape[1] % 4 == 0 and all(vector.data_ptr() % size == 0 for vector in vectors) else 1


def _block_of(channels: int) -> int:
    """How many channels a tile has: the smallest of 16, 32 and 64 that holds them all, else 64."""
    return min(64, max(16, 1 << (channels - 1).bit_length()))


def _kernel(function: Callable[..., None]) -> Any:
    """`triton.jit`, but compiled for types and compile-time constants alone, whatever the numbers and addresses are."""
    names = [p.name for p in inspect.signature(function).parameters.values() if "constexpr" not in str(p.annotation)]
    return triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(function)


@triton.jit
def _tile(program, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and channels of a program's tile."""
    blocks = tl.cdiv(channels, BLOCK_C)
    return program // blocks * BLOCK_R + tl.arange(0, BLOCK_R), program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _rectify(
    program, maps, maps_ld, gamma, beta, mean, var, eps, out, out_ld, rows, channels, out_channels,
    READ: tl.constexpr, WRITE: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, channel = _tile(program, out_channels, BLOCK_R, BLOCK_C)
    here = _tile_mask(row, rows, channel, channels, READ)
    x = _wide(tl.load(_tile_at(maps, maps_ld, row, channel, READ), mask=here, other=0))
    s, t = _scale_and_shift(gamma, beta, mean, var, eps, channel, channels, NORM)
    y = tl.where((channel < channels)[None, :], _relu(_affine(x, s, t)), 0)
    here = _tile_mask(row, rows, channel, out_channels, WRITE)
    tl.store(_tile_at(out, out_ld, row, channel, WRITE), y, mask=here)


@_kernel
def _bn_relu(
    maps, maps_ld, gamma, beta, mean, var, eps: tl.float64, out, out_ld, rows, channels, out_channels,
    READ: tl.constexpr, WRITE: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _rectify(
        tl.program_id(0), maps, maps_ld, gamma, beta, mean, var, eps, out, out_ld, rows, channels, out_channels,
        READ, WRITE, NORM, BLOCK_R, BLOCK_C,
    )  # fmt: skip


@_kernel
def _write(
    made, made_ld, mask, scale: tl.float64, slot, slot_ld, moments, mean, var, tickets, rows, channels, tiles, groups,
    STORE: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BLOCK_C)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    start = group * tiles * BLOCK_R
    # Differences from one value of each channel, so that a large common mean does not swallow the variance.
    pivot = _wide(tl.load(made + start.to(tl.int64) * made_ld + channel, mask=channel < channels, other=0))
    first = tl.zeros([BLOCK_C], pivot.dtype)
    second = tl.zeros([BLOCK_C], pivot.dtype)
    for tile in range(tiles):
        row = start + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        here = _tile_mask(row, rows, channel, channels, READ)
        x = tl.load(_tile_at(made, made_ld, row, channel, READ), mask=here, other=0)
        here = _tile_mask(row, rows, channel, channels, WRITE)
        if mask is not None:
            kept = tl.load(_tile_at(mask, channels, row, channel, WRITE), mask=here, other=0)
            x = _dropped(_wide(x), kept, scale)
        x = x.to(slot.dtype.element_ty)
        if STORE:
            tl.store(_tile_at(slot, slot_ld, row, channel, WRITE), x, mask=here)
        if moments is not None:
            off = tl.where((row < rows)[:, None], _wide(x) - pivot[None, :], 0)
            first += tl.sum(off, 0)
            second += tl.sum(off * off, 0)
    if moments is not None:
        count = tl.minimum(rows - start, tiles * BLOCK_R).to(pivot.dtype)
        place = moments + group.to(tl.int64) * 2 * channels + channel
        tl.store(place, pivot + first / count, mask=channel < channels)
        tl.store(place + channels, tl.maximum(second - first * first / count, 0), mask=channel < channels)
        if _is_last(tickets + block, groups):
            _combine_moments(moments, mean, var, groups, tiles * BLOCK_R, rows, channel, channels, BLOCK_T)


@_kernel
def _gather(
    maps, maps_ld,
    gradient0, ld0, gamma0, beta0, mean0, var0, eps0: tl.float64, gradients0, gradients_ld0, share0, share_ld0,
    gradient1, ld1, gamma1, beta1, mean1, var1, eps1: tl.float64, gradients1, gradients_ld1, share1, share_ld1,
    gradient2, ld2, gamma2, beta2, mean2, var2, eps2: tl.float64, gradients2, gradients_ld2, share2, share_ld2,
    gradient3, ld3, gamma3, beta3, mean3, var3, eps3: tl.float64, gradients3, gradients_ld3, share3, share_ld3,
    carry, carry_ld, out, out_ld, sums, tickets, rows, channels, tiles, groups, COUNT: tl.constexpr,
    READ: tl.constexpr, WRITE: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BLOCK_C)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    zero = _wide(tl.zeros([BLOCK_C], maps.dtype.element_ty))
    a0, b0, a1, b1, a2, b2, a3, b3 = zero, zero, zero, zero, zero, zero, zero, zero
    for tile in range(tiles):
        row = (group * tiles + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        here = _tile_mask(row, rows, channel, channels, READ)
        x = _wide(tl.load(_tile_at(maps, maps_ld, row, channel, READ), mask=here, other=0))
        if carry is not None:
            total = _wide(tl.load(_tile_at(carry, carry_ld, row, channel, READ), mask=here, other=0))
        else:
            total = tl.zeros([BLOCK_R, BLOCK_C], x.dtype)
        total, a0, b0 = _consume(
            gradient0, ld0, gamma0, beta0, mean0, var0, eps0, x, total, a0, b0, row, here, channel, channels,
            READ, NORM,
        )  # fmt: skip
        if COUNT > 1:
            total, a1, b1 = _consume(
                gradient1, ld1, gamma1, beta1, mean1, var1, eps1, x, total, a1, b1, row, here, channel, channels,
                READ, NORM,
            )  # fmt: skip
        if COUNT > 2:
            total, a2, b2 = _consume(
                gradient2, ld2, gamma2, beta2, mean2, var2, eps2, x, total, a2, b2, row, here, channel, channels,
                READ, NORM,
            )  # fmt: skip
        if COUNT > 3:
            total, a3, b3 = _consume(
                gradient3, ld3, gamma3, beta3, mean3, var3, eps3, x, total, a3, b3, row, here, channel, channels,
                READ, NORM,
            )  # fmt: skip
        here = _tile_mask(row, rows, channel, channels, WRITE)
        tl.store(_tile_at(out, out_ld, row, channel, WRITE), total, mask=here)
    found = ((a0, b0), (a1, b1), (a2, b2), (a3, b3))
    for i in tl.static_range(COUNT):
        place = sums + (i * groups + group).to(tl.int64) * 2 * channels + channel
        tl.store(place, found[i][0], mask=channel < channels)
        tl.store(place + channels, found[i][1], mask=channel < channels)
    if _is_last(tickets + block, groups):
        gamma, var, eps = (gamma0, gamma1, gamma2, gamma3), (var0, var1, var2, var3), (eps0, eps1, eps2, eps3)
        gradients = (gradients0, gradients1, gradients2, gradients3)
        gradients_ld = (gradients_ld0, gradients_ld1, gradients_ld2, gradients_ld3)
        share, share_ld = (share0, share1, share2, share3), (share_ld0, share_ld1, share_ld2, share_ld3)
        for i in tl.static_range(COUNT):
            _settle(
                gamma[i], var[i], eps[i], gradients[i], gradients_ld[i], share[i], share_ld[i],
                sums + i * groups * 2 * channels, groups, channel, channels, NORM, BLOCK_T,
            )  # fmt: skip


@triton.jit
def _consume(
    gradient, ld, gamma, beta, mean, var, eps, x, total, first, second, row, here, channel, channels,
    READ: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Add a consumer's part to a tile's total and to its two sums."""
    g = _wide(tl.load(_tile_at(gradient, ld, row, channel, READ), mask=here, other=0))
    s, t = _scale_and_shift(gamma, beta, mean, var, eps, channel, channels, NORM)
    g = tl.where(_affine(x, s, t) <= 0, 0, g)
    centre = _vector(mean, channel, channels, NORM)
    return total + s[None, :] * g, first + tl.sum(g, 0), second + tl.sum(g * (x - centre[None, :]), 0)


@triton.jit
def _settle(
    gamma, var, eps, gradients, gradients_ld, share, share_ld, sums, groups, channel, channels,
    NORM: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Turn the sums of all groups into the gradients of beta and gamma, and add to the correction (`Reader.settle`)."""
    here = channel < channels
    first = _sum_of_groups(sums, groups, channel, channels, BLOCK_T)
    second = _sum_of_groups(sums + channels, groups, channel, channels, BLOCK_T)
    variance = _vector(var, channel, channels, NORM)
    rstd = tl.rsqrt(variance + tl.full([], eps, variance.dtype))
    second *= rstd
    tl.store(gradients + channel, first, mask=here)
    tl.store(gradients + gradients_ld + channel, second, mask=here)
    if share is not None:
        scale = _vector(gamma, channel, channels, NORM) * rstd
        place = share + channel
        tl.store(place, tl.load(place, mask=here, other=0) + scale * first, mask=here)
        place += share_ld
        tl.store(place, tl.load(place, mask=here, other=0) + scale * rstd * second, mask=here)
        tl.debug_barrier()  # the next consumer adds to the same


@triton.jit
def _sum_of_groups(partial, groups, channel, channels, BLOCK_T: tl.constexpr):
    """Add up one of the two rows of partial (groups, 2, channels)."""
    total = tl.zeros([BLOCK_T, channel.shape[0]], partial.dtype.element_ty)
    for start in range(0, groups, BLOCK_T):
        group = start + tl.arange(0, BLOCK_T)
        exists = (group < groups)[:, None] & (channel < channels)[None, :]
        place = partial + group.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        total += tl.load(place, mask=exists, other=0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def _is_last(ticket, programs):
    """Whether all other programs with this ticket have stored their partial results, which this one may now read."""
    tl.debug_barrier()  # stores of all threads come before the one that counts
    arrived = tl.atomic_add(ticket, 1, sem="acq_rel")
    last = arrived == programs - 1
    if last:
        tl.store(ticket, 0)
    tl.debug_barrier()
    return last


@_kernel
def _finish(
    gradient, gradient_ld, maps, maps_ld, mean, sums, sums_ld, inverse: tl.float64, mask, scale: tl.float64,
    out, out_ld, rows, channels, out_channels, programs,
    bn_maps, bn_maps_ld, gamma, beta, bn_mean, var, eps: tl.float64, bn_out, bn_out_ld, bn_rows, bn_channels,
    bn_out_channels,
    READ: tl.constexpr, MASK: tl.constexpr, WRITE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BN_READ: tl.constexpr, BN_WRITE: tl.constexpr, BN_NORM: tl.constexpr,
    BN_BLOCK_R: tl.constexpr, BN_BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The first `programs` finish a gradient, the others rectify: neither waits for the other."""
    program = tl.program_id(0)
    if program < programs:
        row, channel = _tile(program, out_channels, BLOCK_R, BLOCK_C)
        here = _tile_mask(row, rows, channel, channels, READ)
        g = _wide(tl.load(_tile_at(gradient, gradient_ld, row, channel, READ), mask=here, other=0))
        if mean is not None:
            x = _wide(tl.load(_tile_at(maps, maps_ld, row, channel, READ), mask=here, other=0))
            x -= _vector(mean, channel, channels, NORM)[None, :]
            offset = _vector(sums, channel, channels, 1)[None, :]
            slope = _vector(sums + sums_ld, channel, channels, 1)[None, :]
            g -= (offset + slope * x) * tl.full([], inverse, x.dtype)
        if mask is not None:
            here = _tile_mask(row, rows, channel, channels, MASK)
            g = _dropped(g, tl.load(_tile_at(mask, channels, row, channel, MASK), mask=here, other=0), scale)
        g = tl.where((channel < channels)[None, :], g, 0)
        here = _tile_mask(row, rows, channel, out_channels, WRITE)
        tl.store(_tile_at(out, out_ld, row, channel, WRITE), g, mask=here)
    elif bn_maps is not None:
        _rectify(
            program - programs, bn_maps, bn_maps_ld, gamma, beta, bn_mean, var, eps, bn_out, bn_out_ld, bn_rows,
            bn_channels, bn_out_channels, BN_READ, BN_WRITE, BN_NORM, BN_BLOCK_R, BN_BLOCK_C,
        )  # fmt: skip


@_kernel
def _copy_weights(sources, outs, layouts, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """`layouts` has twelve numbers for each weight: `_weight_of` the source and the out."""
    n = tl.program_id(1)
    layout = layouts + n * 12
    makes, reads = tl.load(layout), tl.load(layout + 1)
    all_makes, all_reads, taps = tl.load(layout + 6), tl.load(layout + 7), tl.load(layout + 8)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c, t, k = place % all_reads, place // all_reads % taps, place // all_reads // taps
    source = k * tl.load(layout + 3) + c * tl.load(layout + 4) + t * tl.load(layout + 5)
    out = k * tl.load(layout + 9) + c * tl.load(layout + 10) + t * tl.load(layout + 11)
    for i in tl.static_range(COUNT):
        if n == i:
            w = tl.load(sources[i] + source, mask=(k < makes) & (c < reads), other=0)
            tl.store(outs[i] + out, w, mask=k < all_makes)


@triton.jit
def _combine_moments(moments, mean, var, groups, group_rows, rows, channel, channels, BLOCK_T: tl.constexpr):
    """Mean and variance of all rows from those of groups, all of `group_rows` but the last (Chan et al. 1983)."""
    here = channel < channels
    pivot = tl.load(moments + channel, mask=here, other=0, cache_modifier=".cg")
    total = tl.zeros([BLOCK_T, channel.shape[0]], pivot.dtype)
    squares = tl.zeros([BLOCK_T, channel.shape[0]], pivot.dtype)
    for start in range(0, groups, BLOCK_T):
        group = start + tl.arange(0, BLOCK_T)
        exists = (group < groups)[:, None] & here[None, :]
        count = tl.minimum(rows - group * group_rows, group_rows).to(pivot.dtype)[:, None]
        place = moments + group.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        off = tl.load(place, mask=exists, other=0, cache_modifier=".cg") - pivot[None, :]
        within = tl.load(place + channels, mask=exists, other=0, cache_modifier=".cg")
        total += tl.where(exists, off * count, 0)
        squares += tl.where(exists, within + off * off * count, 0)
    off = tl.sum(total, 0) / rows
    tl.store(mean + channel, pivot + off, mask=here)
    tl.store(var + channel, tl.maximum(tl.sum(squares, 0) / rows - off * off, 0), mask=here)


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

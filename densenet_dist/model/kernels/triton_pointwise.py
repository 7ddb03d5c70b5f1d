"""The passes as Triton kernels, for CUDA: each reads and writes every map once.

All take tiles of rows by up to 64 channels, small enough for many of them to be under way on each multiprocessor.
Those that sum leave one partial result a tile, which a second small kernel adds up in a fixed order: no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from densenet_dist.model.kernels.interface import MOST_CONSUMERS, Consumer, Norm, accumulation_type
from densenet_dist.model.kernels.triton_common import (
    Rows,
    affine,
    block_of,
    check_norm,
    check_vector,
    combine_moments,
    dropped,
    kernel,
    mask_bytes,
    read_width,
    reduce_sums,
    relu,
    rows_like,
    rows_of,
    scale_and_shift,
    scale_of,
    store_moments,
    store_sums,
    tile_at,
    tile_mask,
    vector,
    vector_width,
    wide,
    write_width,
)

_TILE = 4096
"""Elements of a tile of a pass that sums nothing: 32 a thread, at 4 warps."""

_WRITE_TILE = 8192
"""Elements of a tile of `write`: 32 a thread, at 8 warps, for partial results to be few beside the maps."""

_GATHER_TILE = 4096
"""Elements of a tile of `gather`: 16 a thread, at 8 warps: with 32, four consumers take all the registers."""


class TritonPointwise:
    """See `densenet_dist.model.kernels.interface.Kernels`. Launches are on the current device and stream.

    Raises:
        ValueError: any method's, where a tensor doesn't lie in memory as the interface says.
    """

    def bn_relu(self, maps: Tensor, norm: Norm, out: Tensor) -> None:
        """Normalise and rectify."""
        check_norm(norm, maps)
        rows, written = rows_of(maps), rows_like(out, maps, maps.shape[1])
        block = block_of(written.channels)
        _bn_relu[_grid(written, block, _TILE)](
            maps, rows.ld, *norm, out, written.ld, rows.pixels, rows.channels, written.channels,
            READ=read_width(rows.channels, maps), WRITE=write_width(written.channels, out),
            NORM=vector_width(*norm[:4]), BLOCK_R=_TILE // block, BLOCK_C=block, num_warps=4,
        )  # fmt: skip

    def write(
        self, made: Tensor, mask: Tensor | None, keep: float, slot: Tensor, mean: Tensor | None, var: Tensor | None
    ) -> None:
        """Drop, store, and take the statistics of what was stored."""
        rows, written = rows_like(made, slot, slot.shape[1]), rows_of(slot)
        in_place = made.data_ptr() == slot.data_ptr() and rows.ld == written.ld and made.dtype == slot.dtype
        keeps = None if mask is None else mask_bytes(mask, slot)
        if (mean is None or var is None) and in_place and keeps is None:
            return
        block = block_of(written.channels)
        grid = _grid(written, block, _WRITE_TILE)
        moments = None
        if mean is not None and var is not None:
            check_vector(mean, slot)
            check_vector(var, slot)
            moments = mean.new_empty(triton.cdiv(rows.pixels, _WRITE_TILE // block), 2, written.channels)
        _write[grid](
            made, rows.ld, keeps, scale_of(keep), slot, written.ld, moments, rows.pixels, written.channels,
            STORE=keeps is not None or not in_place,
            READ=read_width(written.channels, made), WRITE=write_width(written.channels, slot, keeps),
            BLOCK_R=_WRITE_TILE // block, BLOCK_C=block, num_warps=8,
        )  # fmt: skip
        if moments is not None and mean is not None and var is not None:
            combine_moments(moments, _WRITE_TILE // block, rows.pixels, mean, var)

    def gather(self, maps: Tensor, consumers: Sequence[Consumer], carry: Tensor | None, out: Tensor) -> None:
        """Sum what came back to the consumers."""
        rows, written = rows_of(maps), rows_like(out, maps, maps.shape[1])
        if not 1 <= len(consumers) <= MOST_CONSUMERS:
            raise ValueError(f"{len(consumers)} consumers, not 1 to {MOST_CONSUMERS}")
        for consumer in consumers:
            check_norm(consumer.norm, maps)
        block = block_of(rows.channels)
        tiles = triton.cdiv(rows.pixels, _GATHER_TILE // block)
        count, wide_type = len(consumers), accumulation_type(maps.dtype)
        sums = torch.empty(count, tiles, 2, rows.channels, dtype=wide_type, device=maps.device)
        flat = [part for g, norm, _ in consumers for part in (g, rows_like(g, maps, maps.shape[1]).ld, *norm)]
        _gather[_grid(rows, block, _GATHER_TILE)](
            maps, rows.ld, *flat, *[None] * (7 * (MOST_CONSUMERS - count)),
            carry, 0 if carry is None else rows_like(carry, maps, maps.shape[1]).ld, out, written.ld, sums,
            rows.pixels, rows.channels, tiles, COUNT=count,
            READ=read_width(rows.channels, maps, carry, *(consumer.gradient for consumer in consumers)),
            WRITE=write_width(rows.channels, out),
            NORM=vector_width(*(settled for consumer in consumers for settled in consumer.norm[:4])),
            BLOCK_R=_GATHER_TILE // block, BLOCK_C=block, num_warps=8,
        )  # fmt: skip
        reduce_sums(sums, [consumer.sums for consumer in consumers])

    def finish(
        self, gradient: Tensor, maps: Tensor, correction: tuple[Tensor, Tensor, Tensor] | None, mask: Tensor | None,
        keep: float, out: Tensor,
    ) -> None:  # fmt: skip
        """Apply the statistics' share of the gradient, then dropout's."""
        rows, written = rows_of(maps), rows_like(out, maps, maps.shape[1])
        keeps = None if mask is None else mask_bytes(mask, maps)
        for settled in correction or ():
            check_vector(settled, maps)
        block = block_of(written.channels)
        _finish[_grid(written, block, _TILE)](
            gradient, rows_like(gradient, maps, maps.shape[1]).ld, maps, rows.ld, *(correction or (None, None, None)),
            keeps, scale_of(keep), out, written.ld, rows.pixels, rows.channels, written.channels,
            READ=read_width(rows.channels, gradient, maps), MASK=write_width(rows.channels, keeps),
            WRITE=write_width(written.channels, out), NORM=vector_width(*(correction or ())),
            BLOCK_R=_TILE // block, BLOCK_C=block, num_warps=4,
        )  # fmt: skip


def _grid(rows: Rows, block: int, tile: int) -> tuple[int]:
    """One program a tile; the channels of the same rows come one after another."""
    return (triton.cdiv(rows.pixels, tile // block) * triton.cdiv(rows.channels, block),)


@triton.jit
def _tile(channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of this program: the number of its tile of rows, its rows and its channels."""
    blocks = tl.cdiv(channels, BLOCK_C)
    number = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return number, number * BLOCK_R + tl.arange(0, BLOCK_R), channel


@kernel
def _bn_relu(
    maps, maps_ld, gamma, beta, mean, var, eps: tl.float64, out, out_ld, rows, channels, out_channels,
    READ: tl.constexpr, WRITE: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, row, channel = _tile(out_channels, BLOCK_R, BLOCK_C)
    here = tile_mask(row, rows, channel, channels, READ)
    x = wide(tl.load(tile_at(maps, maps_ld, row, channel, READ), mask=here, other=0))
    s, t = scale_and_shift(gamma, beta, mean, var, eps, channel, channels, NORM)
    y = tl.where((channel < channels)[None, :], relu(affine(x, s, t)), 0)
    here = tile_mask(row, rows, channel, out_channels, WRITE)
    tl.store(tile_at(out, out_ld, row, channel, WRITE), y, mask=here)


@kernel
def _write(
    made, made_ld, mask, scale: tl.float64, slot, slot_ld, moments, rows, channels,
    STORE: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tile, row, channel = _tile(channels, BLOCK_R, BLOCK_C)
    x = tl.load(tile_at(made, made_ld, row, channel, READ), mask=tile_mask(row, rows, channel, channels, READ), other=0)
    here = tile_mask(row, rows, channel, channels, WRITE)
    if mask is not None:
        kept = tl.load(tile_at(mask, channels, row, channel, WRITE), mask=here, other=0)
        x = dropped(wide(x), kept, scale)
    x = x.to(slot.dtype.element_ty)
    if STORE:
        tl.store(tile_at(slot, slot_ld, row, channel, WRITE), x, mask=here)
    if moments is not None:
        store_moments(moments, tile, wide(x), row, rows, channel, channels)


@kernel
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
    here = tile_mask(row, rows, channel, channels, READ)
    x = wide(tl.load(tile_at(maps, maps_ld, row, channel, READ), mask=here, other=0))
    if carry is not None:
        total = wide(tl.load(tile_at(carry, carry_ld, row, channel, READ), mask=here, other=0))
    else:
        total = tl.zeros([BLOCK_R, BLOCK_C], x.dtype)
    for i in tl.static_range(COUNT):
        g = wide(tl.load(tile_at(gradient[i], ld[i], row, channel, READ), mask=here, other=0))
        s, t = scale_and_shift(gamma[i], beta[i], mean[i], var[i], eps[i], channel, channels, NORM)
        g = tl.where(affine(x, s, t) <= 0, 0, g)
        total += s[None, :] * g
        centre = vector(mean[i], channel, channels, NORM)
        store_sums(sums, i * tiles + tile, g, g * (x - centre[None, :]), channel, channels)
    here = tile_mask(row, rows, channel, channels, WRITE)
    tl.store(tile_at(out, out_ld, row, channel, WRITE), total, mask=here)


@kernel
def _finish(
    gradient, gradient_ld, maps, maps_ld, mean, offset, slope, mask, scale: tl.float64, out, out_ld, rows, channels,
    out_channels,
    READ: tl.constexpr, MASK: tl.constexpr, WRITE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _, row, channel = _tile(out_channels, BLOCK_R, BLOCK_C)
    here = tile_mask(row, rows, channel, channels, READ)
    g = wide(tl.load(tile_at(gradient, gradient_ld, row, channel, READ), mask=here, other=0))
    if mean is not None:
        x = wide(tl.load(tile_at(maps, maps_ld, row, channel, READ), mask=here, other=0))
        x -= vector(mean, channel, channels, NORM)[None, :]
        g -= vector(offset, channel, channels, NORM)[None, :] + vector(slope, channel, channels, NORM)[None, :] * x
    if mask is not None:
        here = tile_mask(row, rows, channel, channels, MASK)
        g = dropped(g, tl.load(tile_at(mask, channels, row, channel, MASK), mask=here, other=0), scale)
    g = tl.where((channel < channels)[None, :], g, 0)
    tl.store(tile_at(out, out_ld, row, channel, WRITE), g, mask=tile_mask(row, rows, channel, out_channels, WRITE))

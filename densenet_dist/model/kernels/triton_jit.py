"""The code of the kernels for CUDA, in Triton. Each reads and writes every feature map once.

Sums over all rows need no second launch. A program sums a group of tiles into its own slot of `partial`, and takes a
ticket: an atomic counter, one per block of channels. The program that draws the last ticket knows that all others have
stored their sums. It adds them up in order of the groups, so that the result does not depend on which one is last, and
sets the counter back to 0 for the next launch. With 3 groups and 2 blocks of channels (6 programs):

    ticket of block 0    group 1 draws 0, group 0 draws 1, group 2 draws 2 = last: adds partial[0], [1], [2] of block 0
    ticket of block 1    group 0 draws 0, group 2 draws 1, group 1 draws 2 = last: likewise for block 1
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def _jit(function: Callable[..., None]) -> Any:
    """Apply `triton.jit` without specializing on the values and the alignment of arguments."""
    names = [p.name for p in inspect.signature(function).parameters.values() if "constexpr" not in str(p.annotation)]
    return triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(function)


@triton.jit
def _tile(program, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the indices of the rows and of the channels of a program's tile."""
    blocks = tl.cdiv(channels, BLOCK_C)
    return program // blocks * BLOCK_R + tl.arange(0, BLOCK_R), program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _bn_relu_tile(
    program, maps, maps_ld, gamma, beta, mean, var, eps, out, out_ld, rows, channels, out_channels,
    READ: tl.constexpr, WRITE: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, channel = _tile(program, out_channels, BLOCK_R, BLOCK_C)
    valid = _tile_mask(row, rows, channel, channels, READ)
    x = _wide(tl.load(_pointers(maps, maps_ld, row, channel, READ), mask=valid, other=0))
    s, t = _scale_and_shift(gamma, beta, mean, var, eps, channel, channels, NORM)
    y = tl.maximum(_affine(x, s, t), 0, propagate_nan=tl.PropagateNan.ALL)  # NaN stays NaN
    y = tl.where((channel < channels)[None, :], y, 0)
    valid = _tile_mask(row, rows, channel, out_channels, WRITE)
    tl.store(_pointers(out, out_ld, row, channel, WRITE), y, mask=valid)


@_jit
def bn_relu(
    maps, maps_ld, gamma, beta, mean, var, eps: tl.float64, out, out_ld, rows, channels, out_channels,
    READ: tl.constexpr, WRITE: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute a BN-ReLU."""
    _bn_relu_tile(
        tl.program_id(0), maps, maps_ld, gamma, beta, mean, var, eps, out, out_ld, rows, channels, out_channels,
        READ, WRITE, NORM, BLOCK_R, BLOCK_C,
    )  # fmt: skip


@_jit
def store_output(
    output, output_ld, mask, scale: tl.float64, slot, slot_ld, moments, mean, var, tickets, rows, channels, tiles,
    groups, STORE: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Store a convolution's output after dropout, and its statistics if `moments` is given."""
    blocks = tl.cdiv(channels, BLOCK_C)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    start = group * tiles * BLOCK_R
    # Sum differences from one value of each channel, so that a large mean does not cancel the variance.
    pivot = _wide(tl.load(output + start.to(tl.int64) * output_ld + channel, mask=channel < channels, other=0))
    if STORE:
        tl.debug_barrier()  # in place: no warp may store before all have loaded the pivot
    first = tl.zeros([BLOCK_C], pivot.dtype)
    second = tl.zeros([BLOCK_C], pivot.dtype)
    for tile in range(tiles):
        row = start + tile * BLOCK_R + tl.arange(0, BLOCK_R)
        valid = _tile_mask(row, rows, channel, channels, READ)
        x = tl.load(_pointers(output, output_ld, row, channel, READ), mask=valid, other=0)
        valid = _tile_mask(row, rows, channel, channels, WRITE)
        if mask is not None:
            keep_mask = tl.load(_pointers(mask, channels, row, channel, WRITE), mask=valid, other=0)
            x = _dropout(_wide(x), keep_mask, scale)
        x = x.to(slot.dtype.element_ty)
        if STORE:
            tl.store(_pointers(slot, slot_ld, row, channel, WRITE), x, mask=valid)
        if moments is not None:
            off = tl.where((row < rows)[:, None], _wide(x) - pivot[None, :], 0)
            first += tl.sum(off, 0)
            second += tl.sum(off * off, 0)
    if moments is not None:
        count = tl.minimum(rows - start, tiles * BLOCK_R).to(pivot.dtype)
        pointer = moments + group.to(tl.int64) * 2 * channels + channel
        tl.store(pointer, pivot + first / count, mask=channel < channels)
        spread = tl.maximum(second - first * first / count, 0, propagate_nan=tl.PropagateNan.ALL)  # NaN stays NaN
        tl.store(pointer + channels, spread, mask=channel < channels)
        if _is_last_program(tickets + block, groups):
            _combine_moments(moments, mean, var, groups, tiles * BLOCK_R, rows, channel, channels, BLOCK_T)


@_jit
def sum_gradients(
    maps, maps_ld,
    gradient0, ld0, gamma0, beta0, mean0, var0, eps0: tl.float64, gradients0, gradients_ld0, corr0, corr_ld0,
    gradient1, ld1, gamma1, beta1, mean1, var1, eps1: tl.float64, gradients1, gradients_ld1, corr1, corr_ld1,
    gradient2, ld2, gamma2, beta2, mean2, var2, eps2: tl.float64, gradients2, gradients_ld2, corr2, corr_ld2,
    gradient3, ld3, gamma3, beta3, mean3, var3, eps3: tl.float64, gradients3, gradients_ld3, corr3, corr_ld3,
    accumulator, accumulator_ld, out, out_ld, sums, tickets, rows, channels, tiles, groups, COUNT: tl.constexpr,
    READ: tl.constexpr, WRITE: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of `COUNT` consumers; compute `NormGrad.apply_sums` of each."""
    blocks = tl.cdiv(channels, BLOCK_C)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    zero = _wide(tl.zeros([BLOCK_C], maps.dtype.element_ty))
    a0, b0, a1, b1, a2, b2, a3, b3 = zero, zero, zero, zero, zero, zero, zero, zero
    for tile in range(tiles):
        row = (group * tiles + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        valid = _tile_mask(row, rows, channel, channels, READ)
        x = _wide(tl.load(_pointers(maps, maps_ld, row, channel, READ), mask=valid, other=0))
        if accumulator is not None:
            total = _wide(tl.load(_pointers(accumulator, accumulator_ld, row, channel, READ), mask=valid, other=0))
        else:
            total = tl.zeros([BLOCK_R, BLOCK_C], x.dtype)
        total, a0, b0 = _consume(
            gradient0, ld0, gamma0, beta0, mean0, var0, eps0, x, total, a0, b0, row, valid, channel, channels,
            READ, NORM,
        )  # fmt: skip
        if COUNT > 1:
            total, a1, b1 = _consume(
                gradient1, ld1, gamma1, beta1, mean1, var1, eps1, x, total, a1, b1, row, valid, channel, channels,
                READ, NORM,
            )  # fmt: skip
        if COUNT > 2:
            total, a2, b2 = _consume(
                gradient2, ld2, gamma2, beta2, mean2, var2, eps2, x, total, a2, b2, row, valid, channel, channels,
                READ, NORM,
            )  # fmt: skip
        if COUNT > 3:
            total, a3, b3 = _consume(
                gradient3, ld3, gamma3, beta3, mean3, var3, eps3, x, total, a3, b3, row, valid, channel, channels,
                READ, NORM,
            )  # fmt: skip
        valid = _tile_mask(row, rows, channel, channels, WRITE)
        tl.store(_pointers(out, out_ld, row, channel, WRITE), total, mask=valid)
    found = ((a0, b0), (a1, b1), (a2, b2), (a3, b3))
    for i in tl.static_range(COUNT):
        pointer = sums + (i * groups + group).to(tl.int64) * 2 * channels + channel
        tl.store(pointer, found[i][0], mask=channel < channels)
        tl.store(pointer + channels, found[i][1], mask=channel < channels)
    if _is_last_program(tickets + block, groups):
        gamma, var, eps = (gamma0, gamma1, gamma2, gamma3), (var0, var1, var2, var3), (eps0, eps1, eps2, eps3)
        gradients = (gradients0, gradients1, gradients2, gradients3)
        gradients_ld = (gradients_ld0, gradients_ld1, gradients_ld2, gradients_ld3)
        corr, corr_ld = (corr0, corr1, corr2, corr3), (corr_ld0, corr_ld1, corr_ld2, corr_ld3)
        for i in tl.static_range(COUNT):
            _apply_sums(
                gamma[i], var[i], eps[i], gradients[i], gradients_ld[i], corr[i], corr_ld[i],
                sums + i * groups * 2 * channels, groups, channel, channels, NORM, BLOCK_T,
            )  # fmt: skip


@triton.jit
def _consume(
    gradient, ld, gamma, beta, mean, var, eps, x, total, first, second, row, valid, channel, channels,
    READ: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Add a consumer's gradient to a tile's total, and to its sums of g and g (x - mean)."""
    g = _wide(tl.load(_pointers(gradient, ld, row, channel, READ), mask=valid, other=0))
    s, t = _scale_and_shift(gamma, beta, mean, var, eps, channel, channels, NORM)
    g = tl.where(_affine(x, s, t) <= 0, 0, g)
    center = _vector(mean, channel, channels, NORM)
    return total + s[None, :] * g, first + tl.sum(g, 0), second + tl.sum(g * (x - center[None, :]), 0)


@triton.jit
def _apply_sums(
    gamma, var, eps, gradients, gradients_ld, corr, corr_ld, sums, groups, channel, channels,
    NORM: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Compute `NormGrad.apply_sums` of the sums of all groups; `corr` is its `correction`."""
    valid = channel < channels
    first = _sum_of_groups(sums, groups, channel, channels, BLOCK_T)
    second = _sum_of_groups(sums + channels, groups, channel, channels, BLOCK_T)
    variance = _vector(var, channel, channels, NORM)
    rstd = tl.rsqrt(variance + tl.full([], eps, variance.dtype))
    second *= rstd
    tl.store(gradients + channel, first, mask=valid)
    tl.store(gradients + gradients_ld + channel, second, mask=valid)
    if corr is not None:
        scale = _vector(gamma, channel, channels, NORM) * rstd
        pointer = corr + channel
        tl.store(pointer, tl.load(pointer, mask=valid, other=0) + scale * first, mask=valid)
        pointer += corr_ld
        tl.store(pointer, tl.load(pointer, mask=valid, other=0) + scale * rstd * second, mask=valid)
        tl.debug_barrier()  # the next consumer adds to the same elements


@triton.jit
def _sum_of_groups(partial, groups, channel, channels, BLOCK_T: tl.constexpr):
    """Add up one of the two rows of `partial`, (groups, 2, channels), over the groups."""
    total = tl.zeros([BLOCK_T, channel.shape[0]], partial.dtype.element_ty)
    for start in range(0, groups, BLOCK_T):
        group = start + tl.arange(0, BLOCK_T)
        exists = (group < groups)[:, None] & (channel < channels)[None, :]
        pointer = partial + group.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        total += tl.load(pointer, mask=exists, other=0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def _is_last_program(ticket, programs):
    """Draw a ticket; return whether it is the last, so that all partial results of its block can be read."""
    tl.debug_barrier()  # all threads of this program have stored their results
    arrived = tl.atomic_add(ticket, 1, sem="acq_rel")
    last = arrived == programs - 1
    if last:
        tl.store(ticket, 0)
    tl.debug_barrier()
    return last


@_jit
def correct_gradient(
    gradient, gradient_ld, maps, maps_ld, mean, sums, sums_ld, inverse: tl.float64, mask, scale: tl.float64,
    out, out_ld, rows, channels, out_channels, programs,
    bn_maps, bn_maps_ld, gamma, beta, bn_mean, var, eps: tl.float64, bn_out, bn_out_ld, bn_rows, bn_channels,
    bn_out_channels,
    READ: tl.constexpr, MASK: tl.constexpr, WRITE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BN_READ: tl.constexpr, BN_WRITE: tl.constexpr, BN_NORM: tl.constexpr,
    BN_BLOCK_R: tl.constexpr, BN_BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Correct a gradient with the first `programs`, and compute an independent BN-ReLU with the others."""
    program = tl.program_id(0)
    if program < programs:
        row, channel = _tile(program, out_channels, BLOCK_R, BLOCK_C)
        valid = _tile_mask(row, rows, channel, channels, READ)
        g = _wide(tl.load(_pointers(gradient, gradient_ld, row, channel, READ), mask=valid, other=0))
        if mean is not None:
            x = _wide(tl.load(_pointers(maps, maps_ld, row, channel, READ), mask=valid, other=0))
            x -= _vector(mean, channel, channels, NORM)[None, :]
            offset = _vector(sums, channel, channels, 1)[None, :]
            slope = _vector(sums + sums_ld, channel, channels, 1)[None, :]
            g -= (offset + slope * x) * tl.full([], inverse, x.dtype)
        if mask is not None:
            valid = _tile_mask(row, rows, channel, channels, MASK)
            g = _dropout(g, tl.load(_pointers(mask, channels, row, channel, MASK), mask=valid, other=0), scale)
        g = tl.where((channel < channels)[None, :], g, 0)
        valid = _tile_mask(row, rows, channel, out_channels, WRITE)
        tl.store(_pointers(out, out_ld, row, channel, WRITE), g, mask=valid)
    elif bn_maps is not None:
        _bn_relu_tile(
            program - programs, bn_maps, bn_maps_ld, gamma, beta, bn_mean, var, eps, bn_out, bn_out_ld, bn_rows,
            bn_channels, bn_out_channels, BN_READ, BN_WRITE, BN_NORM, BN_BLOCK_R, BN_BLOCK_C,
        )  # fmt: skip


@_jit
def copy_weights(sources, outs, layouts, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Copy `COUNT` weights. `layouts` (COUNT, 12) is `_weight_layout` of each source and its output."""
    n = tl.program_id(1)
    layout = layouts + n * 12
    source_k, source_c = tl.load(layout), tl.load(layout + 1)
    out_k, out_c, taps = tl.load(layout + 6), tl.load(layout + 7), tl.load(layout + 8)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c, t, k = element % out_c, element // out_c % taps, element // out_c // taps
    source = k * tl.load(layout + 3) + c * tl.load(layout + 4) + t * tl.load(layout + 5)
    out = k * tl.load(layout + 9) + c * tl.load(layout + 10) + t * tl.load(layout + 11)
    for i in tl.static_range(COUNT):
        if n == i:
            w = tl.load(sources[i] + source, mask=(k < source_k) & (c < source_c), other=0)
            tl.store(outs[i] + out, w, mask=k < out_k)


@triton.jit
def _combine_moments(moments, mean, var, groups, group_rows, rows, channel, channels, BLOCK_T: tl.constexpr):
    """Compute mean and variance from those of groups, each of `group_rows` but the last (Chan et al. 1983)."""
    valid = channel < channels
    pivot = tl.load(moments + channel, mask=valid, other=0, cache_modifier=".cg")
    total = tl.zeros([BLOCK_T, channel.shape[0]], pivot.dtype)
    squares = tl.zeros([BLOCK_T, channel.shape[0]], pivot.dtype)
    for start in range(0, groups, BLOCK_T):
        group = start + tl.arange(0, BLOCK_T)
        exists = (group < groups)[:, None] & valid[None, :]
        count = tl.minimum(rows - group * group_rows, group_rows).to(pivot.dtype)[:, None]
        pointer = moments + group.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        off = tl.load(pointer, mask=exists, other=0, cache_modifier=".cg") - pivot[None, :]
        within = tl.load(pointer + channels, mask=exists, other=0, cache_modifier=".cg")
        total += tl.where(exists, off * count, 0)
        squares += tl.where(exists, within + off * off * count, 0)
    off = tl.sum(total, 0) / rows
    tl.store(mean + channel, pivot + off, mask=valid)
    variance = tl.maximum(tl.sum(squares, 0) / rows - off * off, 0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(var + channel, variance, mask=valid)


@triton.jit
def _wide(x):
    """Convert to the accumulation dtype."""
    return x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)


@triton.jit
def _pointers(start, ld, row, channel, WIDTH: tl.constexpr):
    """Return pointers (rows, channels) into maps, aligned for vectors of WIDTH channels."""
    # Offsets in large batches of wide maps do not fit in 32 bits.
    pointers = start + row.to(tl.int64)[:, None] * ld + channel[None, :]
    # A hint for the pointers. Alignment inferred from arguments would compile a kernel for each combination of them.
    return tl.multiple_of(pointers, [1, WIDTH * (start.dtype.element_ty.primitive_bitwidth // 8)])


@triton.jit
def _tile_mask(row, rows, channel, channels, WIDTH: tl.constexpr):
    """Return which elements of a tile exist, (rows, channels), with `channels` rounded up to a multiple of WIDTH."""
    channels = (channels + WIDTH - 1) // WIDTH
    return (row < rows)[:, None] & (channel < channels * WIDTH)[None, :]


@triton.jit
def _vector(start, channel, channels, WIDTH: tl.constexpr):
    """Load one element per channel, 0 beyond the last. The division tells Triton that WIDTH divides `channels`."""
    pointers = tl.multiple_of(start + channel, [WIDTH * (start.dtype.element_ty.primitive_bitwidth // 8)])
    return tl.load(pointers, mask=channel < channels // WIDTH * WIDTH, other=0)


@triton.jit
def _scale_and_shift(gamma, beta, mean, var, eps, channel, channels, WIDTH: tl.constexpr):
    """Return s and t of norm(x) = s x + t. All kernels use this expression, so they agree on the sign of norm(x)."""
    variance = _vector(var, channel, channels, WIDTH)
    s = _vector(gamma, channel, channels, WIDTH) * tl.rsqrt(variance + tl.full([], eps, variance.dtype))
    return s, tl.fma(-_vector(mean, channel, channels, WIDTH), s, _vector(beta, channel, channels, WIDTH))


@triton.jit
def _affine(x, s, t):
    """Return s x + t for a tile, with one rounding."""
    return tl.fma(x, tl.broadcast_to(s[None, :], x.shape), tl.broadcast_to(t[None, :], x.shape))


@triton.jit
def _dropout(x, keep_mask, scale):
    """Apply dropout to a tile. As in PyTorch it is a product, so NaN stays NaN where it is dropped."""
    return x * (keep_mask.to(x.dtype) * tl.full([], scale, x.dtype))

"""The kernels behind `densenet_dist.model.kernels.triton_conv`, which says what their arguments are.

Pointers to maps come with the distance of their rows (`ld`); `read` and `made` count the maps read and made. Tiles have
BLOCK_M rows and BLOCK_N columns of the result, and BLOCK_K factors are added at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from densenet_dist.model.kernels.triton_common import (
    INTERPRETED,
    affine,
    dropped,
    kernel,
    relu,
    scale_and_shift,
    store_moments,
    store_sums,
    tile_at,
    tile_mask,
    wide,
)


@kernel
def pack_kernel(
    weight, stride_k, stride_c, stride_y, stride_x, values, made, read, side, size_c, size_k, size, BLOCK: tl.constexpr
):
    """Put weight (made, read, side, side) into values (taps, size_c, size_k), zero where there is none."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k, c, tap = place % size_k, place // size_k % size_c, place // size_k // size_c
    pointers = weight + k * stride_k + c * stride_c + tap // side * stride_y + tap % side * stride_x
    w = tl.load(pointers, mask=(place < size) & (k < made) & (c < read), other=0)
    tl.store(values + place, w, mask=place < size)


@kernel
def settle_kernel(gamma, beta, mean, var, eps: tl.float64, vectors, channels, size_c, BLOCK: tl.constexpr):
    """Put s, t and the mean into vectors (3, size_c), zero beyond the last channel."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s, t = scale_and_shift(gamma, beta, mean, var, eps, channel, channels, 1)
    centre = tl.load(mean + channel, mask=channel < channels, other=0)
    there = channel < size_c
    tl.store(vectors + channel, s, mask=there)
    tl.store(vectors + size_c + channel, t, mask=there)
    tl.store(vectors + 2 * size_c + channel, centre, mask=there)


@triton.jit
def _settled(vectors, c):
    """Elements of one of the vectors; it is long enough for every tile, and aligned."""
    return tl.load(tl.multiple_of(vectors + c, [16]))


@triton.jit
def _product(a, b, total):
    """Total + a b."""
    if INTERPRETED:
        a, b = wide(a), wide(b)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def _pixel(row, rows, height, width):
    """Where in its image each row's pixel is; rows that don't exist are far outside."""
    return tl.where(row < rows, row // width % height, -4), row % width


@triton.jit
def _inside(y, x, height, width):
    return (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _rectified(x, s, t, exists):
    """Relu(norm(x)) of a tile where it exists; zero elsewhere, which is how a convolution pads."""
    return tl.where(exists, relu(affine(wide(x), s, t)), 0).to(x.dtype)


@kernel
def forward_kernel(
    maps, maps_ld, vectors, weight, size_c, size_k, mask, scale: tl.float64,
    slot, slot_ld, moments, rows, height, width, read, made,
    SIDE: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pixels x maps made, over taps and maps read."""
    TAPS: tl.constexpr = SIDE * SIDE
    blocks = tl.cdiv(made, BLOCK_N)
    tile = tl.program_id(0) // blocks
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    y, x = _pixel(row, rows, height, width)
    total = tl.zeros([BLOCK_M, BLOCK_N], vectors.dtype.element_ty)
    # Taps run fastest: the nine read nearly the same pixels, which the cache then still holds.
    for step in range(0, tl.cdiv(read, BLOCK_K) * TAPS):
        tap, c = step % TAPS, step // TAPS * BLOCK_K + tl.arange(0, BLOCK_K)
        dy, dx = tap // SIDE - SIDE // 2, tap % SIDE - SIDE // 2
        inside = _inside(y + dy, x + dx, height, width)
        there = inside[:, None] & (c < (read + READ - 1) // READ * READ)[None, :]
        a = tl.load(tile_at(maps + (dy * width + dx) * maps_ld, maps_ld, row, c, READ), mask=there, other=0)
        a = _rectified(a, _settled(vectors, c), _settled(vectors + size_c, c), inside[:, None] & (c < read)[None, :])
        total = _product(a, tl.load(tile_at(weight, size_k, tap * size_c + c, k, 8)), total)
    here = tile_mask(row, rows, k, made, WRITE)
    if mask is not None:
        total = dropped(total, tl.load(tile_at(mask, made, row, k, WRITE), mask=here, other=0), scale)
    stored = total.to(slot.dtype.element_ty)
    tl.store(tile_at(slot, slot_ld, row, k, WRITE), stored, mask=here)
    if moments is not None:
        store_moments(moments, tile, wide(stored), row, rows, k, made)


@kernel
def dgrad_kernel(
    d_out, d_ld, weight, size_c, size_k, maps, maps_ld, vectors, carry, carry_ld,
    out, out_ld, partial, rows, height, width, read, made,
    SIDE: tl.constexpr, READ_OUT: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pixels x maps read, over taps and maps made."""
    TAPS: tl.constexpr = SIDE * SIDE
    blocks = tl.cdiv(read, BLOCK_N)
    tile = tl.program_id(0) // blocks
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    y, x = _pixel(row, rows, height, width)
    g = tl.zeros([BLOCK_M, BLOCK_N], vectors.dtype.element_ty)
    for step in range(0, tl.cdiv(made, BLOCK_K) * TAPS):
        tap, k = step % TAPS, step // TAPS * BLOCK_K + tl.arange(0, BLOCK_K)
        # The pixel made with this one at the tap.
        dy, dx = SIDE // 2 - tap // SIDE, SIDE // 2 - tap % SIDE
        there = _inside(y + dy, x + dx, height, width)[:, None] & (k < made // READ_OUT * READ_OUT)[None, :]
        d = tl.load(tile_at(d_out + (dy * width + dx) * d_ld, d_ld, row, k, READ_OUT), mask=there, other=0)
        g = _product(d, tl.load(tl.trans(tile_at(weight, size_k, tap * size_c + c, k, 8))), g)
    here = tile_mask(row, rows, c, read, READ)
    a = wide(tl.load(tile_at(maps, maps_ld, row, c, READ), mask=here, other=0))
    s, t = _settled(vectors, c), _settled(vectors + size_c, c)
    g = tl.where(affine(a, s, t) <= 0, 0, g)
    store_sums(partial, tile, g, g * (a - _settled(vectors + 2 * size_c, c)[None, :]), c, read)
    g *= s[None, :]
    if carry is not None:
        g += wide(tl.load(tile_at(carry, carry_ld, row, c, READ), mask=here, other=0))
    tl.store(tile_at(out, out_ld, row, c, WRITE), g, mask=tile_mask(row, rows, c, read, WRITE))


@kernel
def wgrad_kernel(
    maps, maps_ld, vectors, d_out, d_ld, partial, size_c,
    rows, part_rows, height, width, read, made, channels,
    SIDE: tl.constexpr, READ: tl.constexpr, READ_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Maps made x maps read for one tap, over a part of the pixels, into partial (parts, taps, made, size_c)."""
    TAPS: tl.constexpr = SIDE * SIDE
    # Programs that read the same pixels run at the same time.
    tap, rest = tl.program_id(0) % TAPS, tl.program_id(0) // TAPS
    k = rest % tl.cdiv(made, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    rest //= tl.cdiv(made, BLOCK_M)
    c = rest % tl.cdiv(read, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = rest // tl.cdiv(read, BLOCK_N)
    dy, dx = tap // SIDE - SIDE // 2, tap % SIDE - SIDE // 2
    s, t = _settled(vectors, c), _settled(vectors + size_c, c)
    end = tl.minimum((part + 1) * part_rows, rows)
    total = tl.zeros([BLOCK_M, BLOCK_N], vectors.dtype.element_ty)
    for start in range(part * part_rows, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        d = tl.load(tile_at(d_out, d_ld, row, k, READ_OUT), mask=tile_mask(row, end, k, channels, READ_OUT), other=0)
        y, x = _pixel(row, end, height, width)
        inside = _inside(y + dy, x + dx, height, width)
        there = inside[:, None] & (c < (read + READ - 1) // READ * READ)[None, :]
        a = tl.load(tile_at(maps + (dy * width + dx) * maps_ld, maps_ld, row, c, READ), mask=there, other=0)
        a = _rectified(a, s, t, inside[:, None] & (c < read)[None, :])
        total = _product(tl.trans(d), a, total)
    place = tile_at(partial, size_c, (part * TAPS + tap) * made + k, c, 4)
    tl.store(place, total, mask=(k < made)[:, None])


@kernel
def sum_parts_kernel(
    partial, size_c, parts, out, stride_k, stride_c, stride_y, stride_x, made, read, side, size, BLOCK: tl.constexpr
):
    """Add up partial (parts, taps, made, size_c) into out (made, read, side, side)."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c, k, tap = place % read, place // read % made, place // read // made
    total = tl.zeros([BLOCK], partial.dtype.element_ty)
    for part in range(0, parts):
        row = ((part * side * side + tap) * made + k).to(tl.int64)
        total += tl.load(partial + row * size_c + c, mask=place < size, other=0)
    out += k * stride_k + c * stride_c + tap // side * stride_y + tap % side * stride_x
    tl.store(out, total, mask=place < size)

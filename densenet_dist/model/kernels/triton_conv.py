"""Convolutions with batch normalisation and ReLU at their inputs, as Triton kernels for CUDA.

Each is stride 1, padded to keep the size, with a 1x1 or a 3x3 window, on maps as in
`densenet_dist.model.kernels.interface`. What the layer reads is never written in normalised form, and what it makes,
or the gradient of what it reads, is written once:

=====================  ================================================  ======================================
function               matrix product: rows x columns, over              fused
=====================  ================================================  ======================================
:func:`conv_forward`   pixels x maps made, over taps and maps read       norm, ReLU; dropout, statistics
:func:`conv_dgrad`     pixels x maps read, over taps and maps made       ReLU's mask, scale, carry, sums
:func:`conv_wgrad`     maps made x maps read for each tap, over pixels   norm, ReLU
=====================  ================================================  ======================================

Products are summed in the accumulation type; float32 factors are not rounded to TF32. Weights and normalisations are
packed first: another order of products needs another packing and another kernel, and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from densenet_dist.model.kernels.interface import Norm, accumulation_type
from densenet_dist.model.kernels.triton_common import (
    block_of,
    check_norm,
    check_vector,
    combine_moments,
    mask_bytes,
    read_width,
    reduce_sums,
    round_up,
    rows_like,
    rows_of,
    scale_of,
    write_width,
)
from densenet_dist.model.kernels.triton_conv_kernels import (
    dgrad_kernel,
    forward_kernel,
    pack_kernel,
    settle_kernel,
    sum_parts_kernel,
    wgrad_kernel,
)

_READ_BLOCK = 64
"""A packed weight's channels of maps read are padded to a multiple of it: no tile of them is wider."""


class PackedWeight(NamedTuple):
    """A weight as the kernels read it."""

    values: Tensor
    """(taps, C rounded up, K rounded up), contiguous, zero beyond C and K."""

    made: int
    """K, the maps that the convolution makes."""

    read: int
    """C, the maps that it reads."""

    side: int
    """The window's side: 1 or 3."""


class PackedNorm(NamedTuple):
    """A batch normalisation as the kernels read it: s x + t."""

    vectors: Tensor
    """(3, C rounded up), accumulation type, contiguous, zero beyond C: s, t and the mean."""

    channels: int
    """C."""


def pack_weight(weight: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Bring a weight into the kernels' layout and type. What is packed for the forward pass serves the backward too.

    Args:
        weight: (K, C, 1, 1) or (K, C, 3, 3), any strides and floating type.
        dtype: of the maps.

    Raises:
        ValueError: the window has another shape.
    """
    made, read, side, _ = weight.shape
    if weight.shape[2:] not in ((1, 1), (3, 3)):
        raise ValueError(f"a window is 1x1 or 3x3, not {tuple(weight.shape[2:])}")
    size = (side * side, round_up(read, _READ_BLOCK), round_up(made, block_of(made)))
    values = torch.empty(size, dtype=dtype, device=weight.device)
    pack_kernel[(triton.cdiv(values.numel(), 1024),)](
        weight, *weight.stride(), values, made, read, side, size[1], size[2], values.numel(), BLOCK=1024
    )
    return PackedWeight(values, made, read, side)


def pack_norm(norm: Norm) -> PackedNorm:
    """Bring a batch normalisation into the kernels' layout; as for `pack_weight`, once a step is enough."""
    channels = norm.mean.shape[0]
    vectors = norm.mean.new_empty(3, round_up(channels, _READ_BLOCK))
    settle_kernel[(triton.cdiv(vectors.shape[1], 256),)](*norm, vectors, channels, vectors.shape[1], BLOCK=256)
    return PackedNorm(vectors, channels)


def conv_forward(
    maps: Tensor, norm: Norm | PackedNorm, weight: Tensor | PackedWeight, mask: Tensor | None, keep: float,
    slot: Tensor, mean: Tensor | None, var: Tensor | None,
) -> None:  # fmt: skip
    """``slot = conv(relu(norm(maps))) * mask / keep``, and the slot's statistics.

    Args:
        maps: (N, C, H, W).
        norm: of the C channels, or packed.
        weight: (K, C, r, s), or packed.
        mask: bool, (N, K, H, W), dense in channels_last; None: nothing is dropped.
        keep: the probability that dropout keeps a value.
        slot: (N, K, H, W), the maps' type; may lie in the buffer that holds `maps`.
        mean: (K,), accumulation type: becomes the mean of what `slot` holds, rounding included; None: not wanted.
        var: (K,) likewise, the variance (divided by N H W).

    Raises:
        ValueError: a tensor is not as said here.
    """
    packed = _packed_weight(weight, maps, slot)
    vectors = _packed_norm(norm, maps).vectors
    rows, written, tile = rows_of(maps), rows_like(slot, maps, packed.made), _tile_of(_FORWARD, maps.dtype)
    if slot.shape[1] != packed.made:
        raise ValueError(f"a convolution that makes {packed.made} maps does not fill {tuple(slot.shape)}")
    keeps = None if mask is None else mask_bytes(mask, slot)
    block_n = min(tile.columns, block_of(packed.made))
    tiles, moments = triton.cdiv(rows.pixels, tile.rows), None
    if mean is not None and var is not None:
        check_vector(mean, slot)
        check_vector(var, slot)
        moments = mean.new_empty(tiles, 2, packed.made)
    forward_kernel[(tiles * triton.cdiv(packed.made, block_n),)](
        maps, rows.ld, vectors, packed.values, *packed.values.shape[1:], keeps, scale_of(keep), slot, written.ld,
        moments, rows.pixels, *maps.shape[2:], packed.read, packed.made,
        SIDE=packed.side, READ=read_width(packed.read, maps), WRITE=write_width(packed.made, slot, keeps),
        BLOCK_M=tile.rows, BLOCK_N=block_n, BLOCK_K=tile.inner, **tile.launch(),
    )  # fmt: skip
    if moments is not None and mean is not None and var is not None:
        combine_moments(moments, tile.rows, rows.pixels, mean, var)


def conv_dgrad(
    d_out: Tensor, weight: Tensor | PackedWeight, maps: Tensor, norm: Norm | PackedNorm, carry: Tensor | None,
    out: Tensor, sums: Tensor,
) -> None:  # fmt: skip
    """What `Kernels.gather` does with one consumer, whose gradient is the convolution's with respect to its input.

    That is ``out = carry + s g`` with g = the gradient where norm(maps) > 0, else 0; the gradient itself is not rounded
    to the maps' type.

    Args:
        d_out: (N, at least K, H, W), of the loss with respect to what the convolution made; beyond K zeros, as
            `Kernels.finish` leaves them.
        weight: (K, C, r, s), or packed.
        maps: (N, C, H, W).
        norm: of the C channels, or packed.
        carry: (N, C, H, W), of the maps' or the accumulation type; may be `out` itself; None: zero.
        out: (N, C, H, W), likewise.
        sums: (2, C), accumulation type: becomes the sums over (N, H, W) of g and of g (maps - norm.mean).

    Raises:
        ValueError: a tensor is not as said here.
    """
    packed = _packed_weight(weight, maps, d_out)
    vectors = _packed_norm(norm, maps).vectors
    rows, written, tile = rows_of(maps), rows_like(out, maps, packed.read), _tile_of(_DGRAD, maps.dtype)
    tiles, channels = triton.cdiv(rows.pixels, tile.rows), min(d_out.shape[1], packed.values.shape[2])
    partial = vectors.new_empty(1, tiles, 2, packed.read)
    dgrad_kernel[(tiles * triton.cdiv(packed.read, tile.columns),)](
        d_out, rows_like(d_out, maps, packed.made).ld, packed.values, *packed.values.shape[1:], maps, rows.ld, vectors,
        carry, 0 if carry is None else rows_like(carry, maps, packed.read).ld, out, written.ld, partial,
        rows.pixels, *maps.shape[2:], packed.read, channels,
        SIDE=packed.side, READ_OUT=write_width(channels, d_out), READ=read_width(packed.read, maps, carry),
        WRITE=write_width(packed.read, out),
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=min(tile.inner, block_of(packed.made)), **tile.launch(),
    )  # fmt: skip
    reduce_sums(partial, [sums])


def conv_wgrad(maps: Tensor, norm: Norm | PackedNorm, d_out: Tensor, out_weight_grad: Tensor) -> None:
    """``out_weight_grad`` = gradient of the loss with respect to the weight of conv(relu(norm(maps))).

    Args:
        maps: (N, C, H, W).
        norm: of the C channels, or packed.
        d_out: as for `conv_dgrad`.
        out_weight_grad: (K, C, r, s), accumulation type, any strides; overwritten.

    Raises:
        ValueError: a tensor is not as said here.
    """
    made, read, side, _ = out_weight_grad.shape
    vectors = _packed_norm(norm, maps).vectors
    if out_weight_grad.dtype != accumulation_type(maps.dtype) or read != maps.shape[1] or d_out.dtype != maps.dtype:
        raise ValueError(
            f"{out_weight_grad.dtype} {tuple(out_weight_grad.shape)} is no gradient of {tuple(maps.shape)}"
        )
    rows, tile = rows_of(maps), _tile_of(_WGRAD, maps.dtype)
    block_k, taps, size_c = min(tile.rows, block_of(made)), side * side, vectors.shape[1]
    channels = min(d_out.shape[1], round_up(made, block_k))
    programs = taps * triton.cdiv(made, block_k) * (size_c // tile.columns)
    part_rows = round_up(triton.cdiv(rows.pixels, max(1, _WGRAD_PROGRAMS // programs)), tile.inner)
    parts = triton.cdiv(rows.pixels, part_rows)
    partial = out_weight_grad.new_empty(parts, taps, made, size_c)
    wgrad_kernel[(parts * programs,)](
        maps, rows.ld, vectors, d_out, rows_like(d_out, maps, made).ld, partial, size_c,
        rows.pixels, part_rows, *maps.shape[2:], read, made, channels,
        SIDE=side, READ=read_width(read, maps), READ_OUT=write_width(channels, d_out),
        BLOCK_M=block_k, BLOCK_N=tile.columns, BLOCK_K=tile.inner, **tile.launch(),
    )  # fmt: skip
    size = taps * made * read
    sum_parts_kernel[(triton.cdiv(size, 256),)](
        partial, size_c, parts, out_weight_grad, *out_weight_grad.stride(), made, read, side, size, BLOCK=256
    )


class _Tile(NamedTuple):
    """The tile of a matrix product, as far as the tensors are large enough for it."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    def launch(self) -> dict[str, int]:
        """As options of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# By bytes an element. Nothing spills on sm_80 and sm_90, and with 16-bit maps in aligned rows two programs fit a
# multiprocessor (benchmarks/triton_registers.py); they have not been timed.
_FORWARD = {2: _Tile(128, 64, 32, 8, 3), 4: _Tile(64, 32, 16, 4, 2), 8: _Tile(64, 32, 16, 4, 2)}
_DGRAD = {2: _Tile(128, 64, 64, 8, 3), 4: _Tile(64, 32, 16, 4, 2), 8: _Tile(64, 32, 16, 4, 2)}
_WGRAD = {2: _Tile(64, 64, 64, 8, 3), 4: _Tile(32, 64, 16, 4, 2), 8: _Tile(32, 64, 16, 4, 2)}
_WGRAD_PROGRAMS = 512
"""About how many programs share a weight gradient's pixels: a few for each multiprocessor, with partial results small
beside the maps. A constant, so that sums don't depend on the device."""


def _tile_of(tiles: dict[int, _Tile], dtype: torch.dtype) -> _Tile:
    return tiles[dtype.itemsize]


def _packed_norm(norm: Norm | PackedNorm, maps: Tensor) -> PackedNorm:
    """Pack a normalisation unless it is, and see that it fits maps."""
    if isinstance(norm, Norm):
        check_norm(norm, maps)
        return pack_norm(norm)
    if norm.channels != maps.shape[1] or norm.vectors.dtype != accumulation_type(maps.dtype):
        raise ValueError(
            f"a {norm.vectors.dtype} norm of {norm.channels} channels does not go with {tuple(maps.shape)}"
        )
    return norm


def _packed_weight(weight: Tensor | PackedWeight, maps: Tensor, made: Tensor) -> PackedWeight:
    """Pack a weight unless it is, and see that it fits maps and what is made of them."""
    packed = weight if isinstance(weight, PackedWeight) else pack_weight(weight, maps.dtype)
    if packed.read != maps.shape[1] or not packed.values.dtype == maps.dtype == made.dtype:
        raise ValueError(
            f"a {packed.values.dtype} weight ({packed.made}, {packed.read}, ...) does not go with {made.dtype} made of "
            f"{maps.dtype} maps {tuple(maps.shape)}"
        )
    return packed

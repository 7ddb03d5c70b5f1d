"""The kernels for CUDA, in Triton. Each reads and writes every feature map once.

Maps (N, C, H, W) in channels_last memory are N H W rows of C channels, at a fixed distance `ld` (in elements). A
program works on a tile, some rows by up to 64 channels, small enough for many of them to run at once on each
multiprocessor.

Sums over all rows need no second launch. A program sums a group of tiles into its own slot of `partial`, and takes a
ticket: an atomic counter, one per block of channels. The program that draws the last ticket knows that all others have
stored their sums. It adds them up in order of the groups, so that the result does not depend on which one is last, and
sets the counter back to 0 for the next launch. With 3 groups and 2 blocks of channels (6 programs):

    ticket of block 0    group 1 draws 0, group 0 draws 1, group 2 draws 2 = last: adds partial[0], [1], [2] of block 0
    ticket of block 1    group 0 draws 0, group 2 draws 1, group 1 draws 2 = last: likewise for block 1

Sizes that differ from layer to layer are ordinary arguments and kernels are not specialised on them. A kernel is
compiled for dtypes, which optional inputs are given, the shape of a tile (powers of two) and the number of channels
that a thread moves at once.
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

from densenet_dist.model.kernels import interface
from densenet_dist.model.kernels.interface import MAX_CONSUMERS, BNReLU, Consumer, Correction, Kernels, Norm

_TILE = 4096
"""Elements of a tile without sums: 32 per thread with 4 warps."""
_SUMMING_TILE = 2048
"""Elements of a tile with sums: 16 per thread with 8 warps. With 32, four consumers use up all registers."""
_MAX_GROUPS, _MAX_PROGRAMS = 512, 2048
"""Limits of a launch with sums: groups, whose partial results one program reads, and programs."""
_PARTIALS = 64
"""How many partial results are loaded at once."""
_MAX_WEIGHTS, _WEIGHT_TILE = 16, 1024
"""Weights that are copied in a launch, and elements that a program copies."""
_INT32_MAX = 2**31 - 1
_TICKETS = 1024


class TritonKernels(Kernels):
    """The kernels on a GPU. They are launched on the current device and stream.

    Raises:
        ValueError: by any method, for a tensor whose shape, dtype or strides are not those of `Kernels`.
    """

    def __init__(self) -> None:
        self._tickets: Tensor | None = None

    def bn_relu(self, maps: Tensor, norm: Norm, out: Tensor) -> None:
        """See `Kernels.bn_relu`."""
        programs, arguments, constants = _bn_relu_arguments(maps, norm, out)
        _bn_relu[(programs,)](*arguments, **constants, num_warps=4)

    def store_output(
        self, output: Tensor, mask: Tensor | None, keep: float, slot: Tensor, mean: Tensor | None, var: Tensor | None
    ) -> None:
        """See `Kernels.store_output`."""
        read, written = _layout_like(output, slot), _layout_of(slot)
        in_place = output.data_ptr() == slot.data_ptr() and read.ld == written.ld and output.dtype == slot.dtype
        mask_bytes, mask_layout = _mask_bytes(mask, slot)
        if (mean is None or var is None) and in_place and mask_bytes is None:
            return
        groups = _groups_for(written)
        moments = None
        if mean is not None and var is not None:
            _check_vectors(slot, mean, var)
            moments = mean.new_empty(groups.number, 2, written.channels)
        _store_output[groups.grid](
            output, read.ld, mask_bytes, _dropout_scale(keep), slot, written.ld, moments, mean, var,
            self._tickets_for(slot), read.rows, written.channels, groups.tiles, groups.number,
            STORE=mask_bytes is not None or not in_place,
            READ=_read_width(written.channels, read), WRITE=_write_width(written.channels, written, mask_layout),
            BLOCK_R=groups.rows, BLOCK_C=groups.channels, BLOCK_T=_PARTIALS, num_warps=8,
        )  # fmt: skip

    def sum_gradients(self, maps: Tensor, consumers: Sequence[Consumer], carry: Tensor | None, out: Tensor) -> None:
        """See `Kernels.sum_gradients`."""
        read, written = _layout_of(maps), _layout_like(out, maps)
        carry_layout = None if carry is None else _layout_like(carry, maps)
        layouts = [_layout_like(gradient, maps) for gradient, _ in consumers]
        count, groups = len(consumers), _groups_for(read)
        if not 1 <= count <= MAX_CONSUMERS:
            raise ValueError(f"{count} consumers, not 1 to {MAX_CONSUMERS}")
        flat: list[object] = []
        for (gradient, (norm, gradients, correction)), layout in zip(consumers, layouts, strict=True):
            flat += [gradient, layout.ld, *norm, gradients, _check_pair(gradients, maps), correction]
            flat.append(0 if correction is None else _check_pair(correction, maps))
        shape = (count, groups.number, 2, read.channels)
        sums = torch.empty(shape, dtype=interface.accumulation_type(maps.dtype), device=maps.device)
        _sum_gradients[groups.grid](
            maps, read.ld, *flat, *_NO_CONSUMER * (MAX_CONSUMERS - count),
            carry, 0 if carry_layout is None else carry_layout.ld, out, written.ld, sums, self._tickets_for(maps),
            read.rows, read.channels, groups.tiles, groups.number, COUNT=count,
            READ=_read_width(read.channels, read, carry_layout, *layouts), WRITE=_write_width(read.channels, written),
            NORM=_vector_width(maps, *(vector for consumer in consumers for vector in consumer.norm_grad.norm[:4])),
            BLOCK_R=groups.rows, BLOCK_C=groups.channels, BLOCK_T=_PARTIALS, num_warps=8,
        )  # fmt: skip

    def correct_gradient(
        self, gradient: Tensor, maps: Tensor, correction: Correction | None, mask: Tensor | None, keep: float,
        out: Tensor, also: BNReLU | None = None,
    ) -> None:  # fmt: skip
        """See `Kernels.correct_gradient`."""
        read, written, layout = _layout_of(maps), _layout_like(out, maps), _layout_like(gradient, maps)
        mask_bytes, mask_layout = _mask_bytes(mask, maps)
        mean, sums, values = correction or (None, None, 1.0)
        block = _block_channels(written.channels)
        programs = _programs(written, block)
        others, arguments, constants = _NO_BN_RELU if also is None else _bn_relu_arguments(*also)
        _correct_gradient[(programs + others,)](
            gradient, layout.ld, maps, read.ld, mean, sums, 0 if sums is None else _check_pair(sums, maps), 1 / values,
            mask_bytes, _dropout_scale(keep), out, written.ld, read.rows, read.channels, written.channels, programs,
            *arguments, READ=_read_width(read.channels, layout, read), MASK=_write_width(read.channels, mask_layout),
            WRITE=_write_width(written.channels, written), NORM=1 if mean is None else _vector_width(maps, mean),
            BLOCK_R=_TILE // block, BLOCK_C=block, **{f"BN_{name}": value for name, value in constants.items()},
            num_warps=4,
        )  # fmt: skip

    def copy_weights(self, sources: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """See `Kernels.copy_weights`."""
        for first in range(0, len(sources), _MAX_WEIGHTS):
            some, into = sources[first : first + _MAX_WEIGHTS], outs[first : first + _MAX_WEIGHTS]
            # Triton specialises on numbers in tuples, so only pointers are passed in them.
            rows = (_weight_layout(source) + _weight_layout(out) for source, out in zip(some, into, strict=True))
            layouts = _table(some[0].device, *rows)
            _copy_weights[(triton.cdiv(max(map(torch.numel, into)), _WEIGHT_TILE), len(some))](
                tuple(some), tuple(into), layouts, COUNT=len(some), BLOCK=_WEIGHT_TILE, num_warps=4
            )

    def _tickets_for(self, maps: Tensor) -> Tensor:
        """Return the ticket counters, one per block of channels; 0 before and after every launch."""
        if self._tickets is None:
            self._tickets = torch.zeros(_TICKETS, dtype=torch.int32, device=maps.device)
        return self._tickets


def _programs(layout: _Layout, block: int) -> int:
    """Return the number of programs, one per tile. Those of the same rows are next to each other."""
    return triton.cdiv(layout.rows, _TILE // block) * triton.cdiv(layout.channels, block)


def _bn_relu_arguments(maps: Tensor, norm: Norm, out: Tensor) -> tuple[int, tuple[object, ...], dict[str, int]]:
    """Return the programs, arguments and compile-time constants of `_bn_relu_tile`."""
    read, written = _layout_of(maps), _layout_like(out, maps)
    block = _block_channels(written.channels)
    constants = {
        "READ": _read_width(read.channels, read),
        "WRITE": _write_width(written.channels, written),
        "NORM": _vector_width(maps, *norm[:4]),
        "BLOCK_R": _TILE // block,
        "BLOCK_C": block,
    }
    arguments = (maps, read.ld, *norm, out, written.ld, read.rows, read.channels, written.channels)
    return _programs(written, block), arguments, constants


# In place of arguments that are not used. Triton's launcher refuses None for `eps`, which is annotated as a float.
_NO_BN_RELU = (0, (*[None] * 6, 0.0, *[None] * 5), {"READ": 1, "WRITE": 1, "NORM": 1, "BLOCK_R": 1, "BLOCK_C": 1})
_NO_CONSUMER = (*[None] * 6, 0.0, *[None] * 4)


class _Groups(NamedTuple):
    """How the tiles of a launch with sums are divided among programs.

    Attributes:
        rows: of a tile.
        channels: of a tile.
        tiles: in a group, one below another.
        number: of groups.
        grid: of the launch, groups times blocks of channels.
    """

    rows: int
    channels: int
    tiles: int
    number: int
    grid: tuple[int]


def _groups_for(layout: _Layout) -> _Groups:
    channels = _block_channels(layout.channels)
    rows, blocks = _SUMMING_TILE // channels, triton.cdiv(layout.channels, channels)
    tiles = triton.cdiv(layout.rows, rows)
    tiles_per_group = triton.cdiv(tiles, max(1, min(_MAX_GROUPS, _MAX_PROGRAMS // blocks)))
    number = triton.cdiv(tiles, tiles_per_group)
    return _Groups(rows, channels, tiles_per_group, number, (number * blocks,))


@cache
def _table(device: torch.device, *rows: tuple[int, ...]) -> Tensor:
    """Return numbers that a kernel reads, on the device. They are cached, because the copy waits for the device."""
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _weight_layout(weight: Tensor) -> tuple[int, int, int, int, int, int]:
    """Return K, C and h w of a weight (K, C, h, w), and the strides of the three."""
    k, c, height, width = weight.shape
    taps, stride = height * width, weight.stride(3) if width > 1 else weight.stride(2)
    if height > 1 and width > 1 and weight.stride(2) != width * stride:
        raise ValueError(f"expected a weight in one of PyTorch's memory formats, not strides {weight.stride()}")
    return k, c, taps, weight.stride(0), weight.stride(1), stride


class _Layout(NamedTuple):
    """The layout of maps in memory, as rows.

    Attributes:
        rows: N H W.
        channels: C.
        ld: elements from a row to the next.
        alignment: how many channels a thread could move at once if only alignment mattered: 8, 4 or 1.
        room: elements from the beginning of the last row to the end of the memory.
    """

    rows: int
    channels: int
    ld: int
    alignment: int
    room: int


def _layout_of(maps: Tensor) -> _Layout:
    """Return the layout of maps (N, C, H, W); check that they are in channels_last memory and not empty."""
    shape, strides = maps.shape, maps.stride()
    if len(shape) != 4 or maps.numel() == 0:
        raise ValueError(f"expected non-empty maps (N, C, H, W), not {tuple(shape)}")
    n, channels, height, width = shape
    # The stride of a dimension of size 1 is arbitrary.
    ld = strides[3] if width > 1 else strides[2] if height > 1 else strides[0] if n > 1 else channels
    expected = (height * width * ld, 1, width * ld, ld)
    if ld < channels or any(size > 1 and strides[i] != expected[i] for i, size in enumerate(shape)):
        raise ValueError(f"expected maps in channels_last memory, not strides {strides} of {tuple(shape)}")
    rows = n * height * width
    if rows > _INT32_MAX:
        raise ValueError(f"{rows} pixels are more than an int32 counts")
    size = maps.element_size()
    bits = maps.data_ptr() // size | ld
    room = int(maps.untyped_storage().nbytes()) // size - int(maps.storage_offset()) - (rows - 1) * ld
    return _Layout(rows, channels, ld, 8 if bits % 8 == 0 else 4 if bits % 4 == 0 else 1, room)


def _layout_like(tensor: Tensor, maps: Tensor) -> _Layout:
    """Return the layout of a tensor; check that it has the N, H and W of maps, and as many channels or more."""
    if tensor.shape[0] != maps.shape[0] or tensor.shape[2:] != maps.shape[2:] or tensor.shape[1] < maps.shape[1]:
        raise ValueError(f"{tuple(tensor.shape)} does not match maps {tuple(maps.shape)}")
    return _layout_of(tensor)


def _check_vectors(maps: Tensor, *vectors: Tensor) -> None:
    """Check that vectors are (C,), contiguous and of the accumulation dtype."""
    for vector in vectors:
        fits = vector.shape == maps.shape[1:2] and vector.dtype == interface.accumulation_type(maps.dtype)
        if not fits or not vector.is_contiguous():
            raise ValueError(
                f"a vector for {maps.shape[1]} channels of {maps.dtype} has shape {tuple(vector.shape)}, "
                f"strides {vector.stride()} and {vector.dtype}"
            )


def _check_pair(pair: Tensor, maps: Tensor) -> int:
    """Check two vectors (2, C) likewise; return the elements from one to the other."""
    dtype = interface.accumulation_type(maps.dtype)
    if pair.shape != (2, maps.shape[1]) or pair.stride(1) != 1 or pair.dtype != dtype:
        raise ValueError(f"expected two vectors for {maps.shape[1]} channels of {maps.dtype}, not {pair.shape}")
    return pair.stride(0)


def _mask_bytes(mask: Tensor | None, maps: Tensor) -> tuple[Tensor | None, _Layout | None]:
    """Return a bool mask of the maps' shape, contiguous in channels_last memory, as uint8, and its layout."""
    if mask is None:
        return None, None
    layout = _layout_of(mask)
    if mask.shape != maps.shape or mask.dtype != torch.bool or layout.ld != layout.channels:
        raise ValueError(f"expected a dense bool mask {tuple(maps.shape)}, not {mask.dtype} {tuple(mask.shape)}")
    return mask.view(torch.uint8), layout


def _dropout_scale(keep: float) -> float:
    """Return the factor of the values that dropout keeps, as PyTorch's."""
    return 1 / keep if keep > 0 else 0.0


def _read_width(channels: int, *layouts: _Layout | None) -> int:
    """Return how many channels a thread can read at once: 8, 4 or 1.

    The last 8 of 35 channels (32:40) may be read although only three exist, if the memory does not end before; kernels
    drop the rest.
    """
    to_end = -(-channels // 8) * 8
    wide = all(layout is None or (layout.alignment == 8 and layout.room >= to_end) for layout in layouts)
    return 8 if wide else _write_width(channels, *layouts)


def _write_width(channels: int, *layouts: _Layout | None) -> int:
    """Return how many channels a thread can write at once, without touching others: 8, 4 or 1."""
    width = min((layout.alignment for layout in layouts if layout is not None), default=8)
    return width if channels % width == 0 else 4 if channels % 4 == 0 and width == 8 else 1


def _vector_width(maps: Tensor, *vectors: Tensor) -> int:
    """Check vectors; return how many elements of each a thread can read at once: 4 or 1."""
    _check_vectors(maps, *vectors)
    size = 4 * vectors[0].element_size()
    return 4 if maps.shape[1] % 4 == 0 and all(vector.data_ptr() % size == 0 for vector in vectors) else 1


def _block_channels(channels: int) -> int:
    """Return the number of channels of a tile: the smallest of 16, 32 and 64 that holds them all, else 64."""
    return min(64, max(16, 1 << (channels - 1).bit_length()))


def _jit(function: Callable[..., None]) -> Any:
    """Apply `triton.jit` without specialising on the values and the alignment of arguments."""
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
    y = tl.where((channel < channels)[None, :], _relu(_affine(x, s, t)), 0)
    valid = _tile_mask(row, rows, channel, out_channels, WRITE)
    tl.store(_pointers(out, out_ld, row, channel, WRITE), y, mask=valid)


@_jit
def _bn_relu(
    maps, maps_ld, gamma, beta, mean, var, eps: tl.float64, out, out_ld, rows, channels, out_channels,
    READ: tl.constexpr, WRITE: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    _bn_relu_tile(
        tl.program_id(0), maps, maps_ld, gamma, beta, mean, var, eps, out, out_ld, rows, channels, out_channels,
        READ, WRITE, NORM, BLOCK_R, BLOCK_C,
    )  # fmt: skip


@_jit
def _store_output(
    output, output_ld, mask, scale: tl.float64, slot, slot_ld, moments, mean, var, tickets, rows, channels, tiles,
    groups, STORE: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
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
        tl.store(pointer + channels, tl.maximum(second - first * first / count, 0), mask=channel < channels)
        if _is_last_program(tickets + block, groups):
            _combine_moments(moments, mean, var, groups, tiles * BLOCK_R, rows, channel, channels, BLOCK_T)


@_jit
def _sum_gradients(
    maps, maps_ld,
    gradient0, ld0, gamma0, beta0, mean0, var0, eps0: tl.float64, gradients0, gradients_ld0, corr0, corr_ld0,
    gradient1, ld1, gamma1, beta1, mean1, var1, eps1: tl.float64, gradients1, gradients_ld1, corr1, corr_ld1,
    gradient2, ld2, gamma2, beta2, mean2, var2, eps2: tl.float64, gradients2, gradients_ld2, corr2, corr_ld2,
    gradient3, ld3, gamma3, beta3, mean3, var3, eps3: tl.float64, gradients3, gradients_ld3, corr3, corr_ld3,
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
        valid = _tile_mask(row, rows, channel, channels, READ)
        x = _wide(tl.load(_pointers(maps, maps_ld, row, channel, READ), mask=valid, other=0))
        if carry is not None:
            total = _wide(tl.load(_pointers(carry, carry_ld, row, channel, READ), mask=valid, other=0))
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
    centre = _vector(mean, channel, channels, NORM)
    return total + s[None, :] * g, first + tl.sum(g, 0), second + tl.sum(g * (x - centre[None, :]), 0)


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
def _correct_gradient(
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
def _copy_weights(sources, outs, layouts, COUNT: tl.constexpr, BLOCK: tl.constexpr):
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
    tl.store(var + channel, tl.maximum(tl.sum(squares, 0) / rows - off * off, 0), mask=valid)


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
def _relu(y):
    """Return the ReLU of y; NaN stays NaN."""
    return tl.maximum(y, 0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _dropout(x, keep_mask, scale):
    """Apply dropout to a tile. As in PyTorch it is a product, so NaN stays NaN where it is dropped."""
    return x * (keep_mask.to(x.dtype) * tl.full([], scale, x.dtype))

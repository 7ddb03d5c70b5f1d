"""The kernels for CUDA: what is launched, and with which arguments. `triton_jit` is their code.

Maps (N, C, H, W) in channels_last memory are N H W rows of C channels, at a fixed distance `ld` (in elements). A
program works on a tile, some rows by up to 64 channels, small enough for many of them to run at once on each
multiprocessor.

Sizes that differ from layer to layer are ordinary arguments and kernels are not specialized on them. A kernel is
compiled for dtypes, which optional inputs are given, the shape of a tile (powers of two) and the number of channels
that a thread moves at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from densenet_dist.model.kernels import triton_jit
from densenet_dist.model.kernels.interface import (
    MAX_CONSUMERS,
    BNReLU,
    Consumer,
    Dropout,
    Kernels,
    Norm,
    OutputGradient,
    Statistics,
    accumulation_type,
)

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
        ValueError: by any method, for maps that are empty or not in channels_last memory. Other shapes and dtypes must
            be those that `Kernels` describes; they are not checked.
    """

    def __init__(self) -> None:
        self._tickets: Tensor | None = None

    def bn_relu(self, maps: Tensor, norm: Norm, out: Tensor) -> None:
        """See `Kernels.bn_relu`."""
        programs, arguments, constants = _bn_relu_arguments(maps, norm, out)
        triton_jit.bn_relu[(programs,)](*arguments, **constants, num_warps=4)

    def store_output(self, output: Tensor, dropout: Dropout | None, slot: Tensor, into: Statistics | None) -> None:
        """See `Kernels.store_output`."""
        read, written = _layout_of(output), _layout_of(slot)
        in_place = output.data_ptr() == slot.data_ptr() and read.ld == written.ld and output.dtype == slot.dtype
        if into is None and in_place and dropout is None:
            return
        mask, mask_layout, scale = _dropout_arguments(dropout)
        groups = _groups_for(written)
        moments = None
        if into is not None:
            moments = into.mean.new_empty(groups.number, 2, written.channels)
        triton_jit.store_output[groups.grid](
            output, read.ld, mask, scale, slot, written.ld, moments, *(into or (None, None)),
            self._tickets_for(slot), read.rows, written.channels, groups.tiles, groups.number,
            STORE=dropout is not None or not in_place,
            READ=_read_width(written.channels, read), WRITE=_write_width(written.channels, written, mask_layout),
            BLOCK_R=groups.rows, BLOCK_C=groups.channels, BLOCK_T=_PARTIALS, num_warps=8,
        )  # fmt: skip

    def sum_gradients(
        self, maps: Tensor, consumers: Sequence[Consumer], accumulator: Tensor | None, out: Tensor
    ) -> None:
        """See `Kernels.sum_gradients`."""
        read, written = _layout_of(maps), _layout_of(out)
        accumulator_layout = None if accumulator is None else _layout_of(accumulator)
        layouts = [_layout_of(gradient) for gradient, _ in consumers]
        count, groups = len(consumers), _groups_for(read)
        flat: list[object] = []
        for (gradient, (norm, gradients, correction)), layout in zip(consumers, layouts, strict=True):
            flat += [gradient, layout.ld, *norm, gradients, gradients.stride(0), correction]
            flat.append(0 if correction is None else correction.stride(0))
        shape = (count, groups.number, 2, read.channels)
        sums = torch.empty(shape, dtype=accumulation_type(maps.dtype), device=maps.device)
        triton_jit.sum_gradients[groups.grid](
            maps, read.ld, *flat, *_NO_CONSUMER * (MAX_CONSUMERS - count),
            accumulator, 0 if accumulator_layout is None else accumulator_layout.ld, out, written.ld, sums,
            self._tickets_for(maps), read.rows, read.channels, groups.tiles, groups.number, COUNT=count,
            READ=_read_width(read.channels, read, accumulator_layout, *layouts),
            WRITE=_write_width(read.channels, written),
            NORM=_vector_width(maps, *(vector for consumer in consumers for vector in consumer.norm_grad.norm[:4])),
            BLOCK_R=groups.rows, BLOCK_C=groups.channels, BLOCK_T=_PARTIALS, num_warps=8,
        )  # fmt: skip

    def correct_gradient(self, d_output: OutputGradient, out: Tensor, also: BNReLU | None = None) -> None:
        """See `Kernels.correct_gradient`."""
        gradient, maps, correction, dropout, _ = d_output
        read, written, layout = _layout_of(maps), _layout_of(out), _layout_of(gradient)
        mask, mask_layout, scale = _dropout_arguments(dropout)
        mean, sums, values = correction or (None, None, 1.0)
        block = _block_channels(written.channels)
        programs = _programs(written, block)
        others, arguments, constants = _NO_BN_RELU if also is None else _bn_relu_arguments(*also)
        triton_jit.correct_gradient[(programs + others,)](
            gradient, layout.ld, maps, read.ld, mean, sums, 0 if sums is None else sums.stride(0), 1 / values,
            mask, scale, out, written.ld, read.rows, read.channels, written.channels, programs,
            *arguments, READ=_read_width(read.channels, layout, read), MASK=_write_width(read.channels, mask_layout),
            WRITE=_write_width(written.channels, written), NORM=1 if mean is None else _vector_width(maps, mean),
            BLOCK_R=_TILE // block, BLOCK_C=block, **{f"BN_{name}": value for name, value in constants.items()},
            num_warps=4,
        )  # fmt: skip

    def copy_weights(self, sources: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """See `Kernels.copy_weights`."""
        for first in range(0, len(sources), _MAX_WEIGHTS):
            some, into = sources[first : first + _MAX_WEIGHTS], outs[first : first + _MAX_WEIGHTS]
            # Triton specializes on numbers in tuples, so only pointers are passed in them.
            rows = (_weight_layout(source) + _weight_layout(out) for source, out in zip(some, into, strict=True))
            layouts = _table(some[0].device, *rows)
            triton_jit.copy_weights[(triton.cdiv(max(map(torch.numel, into)), _WEIGHT_TILE), len(some))](
                tuple(some), tuple(into), layouts, COUNT=len(some), BLOCK=_WEIGHT_TILE, num_warps=4
            )

    def _tickets_for(self, maps: Tensor) -> Tensor:
        """Return the ticket counters, one per block of channels; 0 before and after every launch."""
        blocks = triton.cdiv(maps.shape[1], _block_channels(maps.shape[1]))
        if self._tickets is None or len(self._tickets) < blocks:
            self._tickets = torch.zeros(max(_TICKETS, blocks), dtype=torch.int32, device=maps.device)
        return self._tickets


def _programs(layout: _Layout, block: int) -> int:
    """Return the number of programs, one per tile. Those of the same rows are next to each other."""
    return triton.cdiv(layout.rows, _TILE // block) * triton.cdiv(layout.channels, block)


def _bn_relu_arguments(maps: Tensor, norm: Norm, out: Tensor) -> tuple[int, tuple[object, ...], dict[str, int]]:
    """Return the programs, arguments and compile-time constants of `triton_jit.bn_relu`."""
    read, written = _layout_of(maps), _layout_of(out)
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


def _dropout_arguments(dropout: Dropout | None) -> tuple[Tensor | None, _Layout | None, float]:
    """Return the mask as uint8, its layout, and the factor of the values that are kept, as PyTorch's."""
    if dropout is None:
        return None, None, 1.0
    mask, keep = dropout
    layout = _layout_of(mask)
    return mask.view(torch.uint8), layout, 1 / keep if keep > 0 else 0.0


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
    """Return how many elements of each vector a thread can read at once: 4 or 1."""
    size = 4 * vectors[0].element_size()
    return 4 if maps.shape[1] % 4 == 0 and all(vector.data_ptr() % size == 0 for vector in vectors) else 1


def _block_channels(channels: int) -> int:
    """Return the number of channels of a tile: the smallest of 16, 32 and 64 that holds them all, else 64."""
    return min(64, max(16, 1 << (channels - 1).bit_length()))

"""BN-ReLU and the convolution after it, forward and backward: by PyTorch (cuDNN, oneDNN) or by this project's C++.

On a CPU both can convolve. Which is faster for a kernel size depends on the processor, so it is measured once per
machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cache
from itertools import compress
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from densenet_dist.environment import cache_folder, unique_suffix
from densenet_dist.model.fused.types import TENSOR_CORE_CHANNELS, Unit, empty_maps, empty_statistics, merge_statistics
from densenet_dist.model.kernels.interface import (
    BNReLU,
    Consumer,
    Dropout,
    Kernels,
    Norm,
    NormGrad,
    OutputGradient,
    Statistics,
)
from densenet_dist.model.kernels.native import KERNEL_SIZES, NativeKernels

PIECE_BYTES = 24 * 2**20
"""Most bytes of rectified maps that oneDNN convolves at a time. glibc returns larger blocks (over 32 MiB) to the system
when they are freed, so that their pages are faulted in and cleared again for every layer. Much smaller pieces cost more
in calls than they save."""

TYPICAL_LAYERS: Final = {1: (120, 48), 3: (48, 12)}
"""By kernel size, input and output channels of a layer in the middle of DenseNet-BC (k = 12)."""
IMAGES, SIDE, ROUNDS = 8, 32, 5
"""Of the measurement: images in a batch, height and width of the maps, and how often both are timed."""
_ONEDNN_VARIABLES: Final = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


class Convolutions:
    """The convolutions of one block, by PyTorch. They share one scratch tensor, so they must run one after another.

    Args:
        kernels: for the device and dtype of the maps.
        like: maps with N, H, W, device and dtype of the block's.
        units: whose convolutions are to be computed.
    """

    def __init__(self, kernels: Kernels, like: Tensor, units: Sequence[Unit]) -> None:
        self._kernels = kernels
        self._multiple = TENSOR_CORE_CHANNELS if like.is_cuda else 1
        # On a CPU newly allocated pages cost more than the pass that fills them.
        n, _, height, width = like.shape
        self._scratch = like.new_empty(n * height * width * self.padded(_max_in_channels(units)))
        weights = [unit.weight for unit in units if unit.weight is not None]
        converted = _convert(kernels, weights, [self._empty_weight(weight, like) for weight in weights])
        self._weights = {id(weight): out for weight, out in zip(weights, converted, strict=True)}

    def accumulates(self, unit: Unit) -> bool:
        """Return whether `backward_accumulate` is faster than `backward` followed by one sum for several units."""
        return False

    def padded(self, channels: int) -> int:
        """Round up to the multiple of channels that the device needs."""
        return -(-channels // self._multiple) * self._multiple

    def apply(self, unit: Unit, maps: Tensor, norm: Norm) -> Tensor:
        """Compute ``conv(relu(norm(maps)))``, without a weight BN-ReLU: (N, C, H, W) -> (N, K, H, W), new memory."""
        if unit.weight is None:
            out = empty_maps(maps, unit.in_channels)
            self._kernels.bn_relu(maps, norm, out)
            return out
        # A view of padded maps could not be changed in place by the caller.
        slot = None if self.padded(unit.out_channels) == unit.out_channels else empty_maps(maps, unit.out_channels)
        return self.forward(unit, maps, norm, None, slot, None)

    def forward(
        self, unit: Unit, maps: Tensor, norm: Norm, dropout: Dropout | None, slot: Tensor | None,
        into: Statistics | None,
    ) -> Tensor:  # fmt: skip
        """Compute ``slot = conv(relu(norm(maps))) * mask / keep`` and its statistics, as `Kernels.store_output` does.

        Returns:
            `slot`, or new memory if it is None.
        """
        assert unit.weight is not None
        output = self._convolve(unit.weight, maps, norm)
        if slot is None:
            slot = output if output.shape[1] == unit.out_channels else output[:, : unit.out_channels]
        self._kernels.store_output(output, dropout, slot, into)
        return slot

    def backward(
        self, unit: Unit, maps: Tensor, norm: Norm, d_output: OutputGradient, need_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the gradients of relu(norm(maps)), (N, >= C, H, W), and of the weight, for `like_weights`."""
        if unit.weight is None:
            return d_output.gradient, None
        weight, rectified = self._weights[id(unit.weight)], self._scratch_like(maps)
        gradient = self._corrected(d_output, unit.out_channels, BNReLU(maps, norm, rectified))
        d_rectified, d_weight, _ = torch.ops.aten.convolution_backward(
            gradient, rectified, weight, None, *_geometry(weight), [True, need_weight, False]
        )
        return _channels_last(d_rectified), d_weight if need_weight else None

    def backward_accumulate(
        self, unit: Unit, maps: Tensor, norm_grad: NormGrad, d_output: OutputGradient, need_weight: bool,
        accumulator: Tensor | None, out: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """Compute `backward`, then `Kernels.sum_gradients` of its result; return the weight's gradient."""
        d_rectified, d_weight = self.backward(unit, maps, norm_grad.norm, d_output, need_weight)
        self._kernels.sum_gradients(maps, [Consumer(d_rectified[:, : unit.in_channels], norm_grad)], accumulator, out)
        return d_weight

    def like_weights(self, gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """Give gradients the shapes, dtypes and strides of the weights: torch's fused optimizers ignore strides."""
        return _convert(self._kernels, gradients, [torch.empty_like(weight) for weight in weights])

    def _corrected(self, d_output: OutputGradient, channels: int, also: BNReLU | None = None) -> Tensor:
        """Return the gradient of a convolution's output, (N, padded K, H, W); run `also`."""
        gradient, maps, correction, dropout, owned = d_output
        padded, same_dtype = self.padded(channels), gradient.dtype == maps.dtype
        dense = gradient.shape[1] == padded and gradient.is_contiguous(memory_format=torch.channels_last)
        if same_dtype and dense and correction is None and dropout is None:
            if also is not None:
                self._kernels.bn_relu(*also)
            return gradient
        out = gradient if owned and same_dtype and padded == channels else empty_maps(maps, padded)
        self._kernels.correct_gradient(d_output, out, also)
        return out

    def _convolve(self, weight: Tensor, maps: Tensor, norm: Norm) -> Tensor:
        weight, rectified = self._weights[id(weight)], self._scratch_like(maps)
        self._kernels.bn_relu(maps, norm, rectified)
        output: Tensor = torch.ops.aten.convolution(rectified, weight, None, *_geometry(weight))
        return _channels_last(output)

    def _scratch_like(self, maps: Tensor) -> Tensor:
        """Return scratch memory for rectified maps, padded."""
        n, channels, height, width = maps.shape
        padded = self.padded(channels)
        flat = self._scratch[: n * height * width * padded]
        return flat.view(n, height, width, padded).permute(0, 3, 1, 2)

    def _empty_weight(self, weight: Tensor, like: Tensor) -> Tensor:
        """Allocate a weight in the maps' dtype, padded."""
        shape = (self.padded(weight.shape[0]), self.padded(weight.shape[1]), *weight.shape[2:])
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


class CpuConvolutions(Convolutions):
    """The convolutions of one block on a CPU: by the C++ kernels, or by oneDNN, some images at a time (`PIECE_BYTES`).

    The C++ kernels normalize what they read and compute the statistics of what they store, in one pass.

    Args:
        native_sizes: kernel sizes of the convolutions that the C++ kernels compute.
    """

    def __init__(
        self, kernels: Kernels, like: Tensor, units: Sequence[Unit], native_sizes: Collection[int] = ()
    ) -> None:
        self._native = kernels if isinstance(kernels, NativeKernels) else None
        self._native_sizes = native_sizes
        others = [unit for unit in units if not self._native_for(unit)]
        self._images = max(1, PIECE_BYTES // max(1, like[:1, :1].nbytes * _max_in_channels(others)))
        self._several_pieces = len(like) > self._images
        super().__init__(kernels, like[: self._images], others)

    def accumulates(self, unit: Unit) -> bool:
        """Return True if batches are split or C++ convolves; otherwise the gradients are small enough to wait."""
        return self._several_pieces or self._native_for(unit) is not None

    def forward(
        self, unit: Unit, maps: Tensor, norm: Norm, dropout: Dropout | None, slot: Tensor | None,
        into: Statistics | None,
    ) -> Tensor:  # fmt: skip
        """See `Convolutions.forward`."""
        assert unit.weight is not None
        native = self._native_for(unit)
        if native is None and len(maps) <= self._images:
            return super().forward(unit, maps, norm, dropout, slot, into)
        slot = empty_maps(maps, unit.out_channels) if slot is None else slot
        if native is not None:
            native.convolve(maps, norm, unit.weight.to(maps.dtype).contiguous(), dropout, slot, into)
            return slot
        pieces = self._split(maps)
        dropouts: list[Dropout | None] = [None] * len(pieces)
        if dropout is not None:
            dropouts = [Dropout(mask, dropout.keep) for mask in self._split(dropout.mask)]
        parts = None if into is None else into.mean.new_empty((len(pieces), 2, unit.out_channels))
        for i, (piece, dropout_piece, slot_piece) in enumerate(zip(pieces, dropouts, self._split(slot), strict=True)):
            statistics = None if parts is None else Statistics(*parts[i])
            self._kernels.store_output(self._convolve(unit.weight, piece, norm), dropout_piece, slot_piece, statistics)
        if into is not None and parts is not None:
            merge_statistics(parts, [len(piece) for piece in pieces], into)
        return slot

    def backward_accumulate(
        self, unit: Unit, maps: Tensor, norm_grad: NormGrad, d_output: OutputGradient, need_weight: bool,
        accumulator: Tensor | None, out: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """See `Convolutions.backward_accumulate`."""
        native = self._native_for(unit)
        if unit.weight is None or (native is None and len(maps) <= self._images):
            return super().backward_accumulate(unit, maps, norm_grad, d_output, need_weight, accumulator, out)
        gradient = self._corrected(d_output, unit.out_channels)
        if native is not None:
            weight = unit.weight.to(maps.dtype).contiguous()
            d_weight = torch.empty_like(weight) if need_weight else None
            native.convolve_backward(maps, norm_grad, weight, gradient, accumulator, out, d_weight)
            return d_weight
        pieces = self._split(maps)
        accumulators = [None] * len(pieces) if accumulator is None else self._split(accumulator)
        parts = norm_grad.gradients.new_empty(len(pieces), *norm_grad.gradients.shape)
        d_weight = torch.zeros_like(unit.weight, dtype=parts.dtype) if need_weight else None
        for piece, part, d_piece, accumulator_piece, out_piece in zip(
            pieces, parts, self._split(gradient), accumulators, self._split(out), strict=True
        ):
            d_weight_piece = super().backward_accumulate(
                unit, piece, norm_grad._replace(gradients=part), OutputGradient(d_piece, d_piece), need_weight,
                accumulator_piece, out_piece,
            )  # fmt: skip
            if d_weight is not None and d_weight_piece is not None:
                d_weight += d_weight_piece
        torch.sum(parts, 0, out=norm_grad.gradients)
        return d_weight

    def _native_for(self, unit: Unit) -> NativeKernels | None:
        """Return the C++ kernels if they compute this unit's convolution."""
        return None if unit.weight is None or unit.weight.shape[2] not in self._native_sizes else self._native

    def _split(self, maps: Tensor) -> tuple[Tensor, ...]:
        pieces: tuple[Tensor, ...] = maps.split(self._images)
        return pieces


def choose_convolutions(kernels: Kernels, like: Tensor, units: Sequence[Unit]) -> Convolutions:
    """Return the convolutions for the device of `like`; arguments as for `Convolutions`."""
    if like.device.type != "cpu":
        return Convolutions(kernels, like, units)
    sizes: frozenset[int] = frozenset()
    if isinstance(kernels, NativeKernels) and like.dtype == torch.float32:
        sizes = faster_native_sizes(kernels, torch.get_num_threads())
    elif isinstance(kernels, NativeKernels) and like.dtype == torch.float64:
        sizes = frozenset(KERNEL_SIZES)  # float64 is for tests; its speed does not matter
    return CpuConvolutions(kernels, like, units, sizes)


@cache
def faster_native_sizes(kernels: NativeKernels, threads: int) -> frozenset[int]:
    """Return the kernel sizes of the convolutions that `kernels` compute faster than oneDNN with this many threads.

    Both are timed in float32 (about 0.1 s), and the result is kept in `cache_folder`: C++ and oneDNN round differently,
    and runs on one machine must be reproducible bit for bit. If the result cannot be kept, all sizes are returned.
    """
    parts = [kernels.name, torch.__version__, str(threads), *(os.environ.get(name, "") for name in _ONEDNN_VARIABLES)]
    key = hashlib.blake2b("\0".join(parts).encode(), digest_size=10).hexdigest()
    file = cache_folder() / f"convolutions-{key}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # not measured yet, or a damaged file
        return _recorded(file)
    times = {size: _time_layer(kernels, size) for size in KERNEL_SIZES}
    faster = frozenset(size for size, (native, onednn) in times.items() if native <= onednn)
    record = {str(size): "own" if size in faster else "onednn" for size in KERNEL_SIZES}
    figures = {f"{size}_ms": [round(1e3 * seconds, 3) for seconds in pair] for size, pair in times.items()}
    temporary = file.with_name(f"{file.name}.{unique_suffix()}")
    try:
        temporary.write_text(json.dumps(record | figures) + "\n")
        try:
            os.link(temporary, file)
        except FileExistsError:  # another rank was first: all must use the same
            with suppress(ValueError, KeyError, TypeError):
                return _recorded(file)
            temporary.replace(file)  # it was damaged
        finally:
            temporary.unlink(missing_ok=True)
    except OSError:  # ranks, and this run when it is resumed, could measure something else
        return frozenset(KERNEL_SIZES)
    return faster


def _recorded(file: Path) -> frozenset[int]:
    return frozenset(size for size in KERNEL_SIZES if json.loads(file.read_text())[str(size)] == "own")


def _time_layer(kernels: NativeKernels, size: int) -> tuple[float, float]:
    """Return the seconds of a typical layer's forward and backward pass by `kernels` and by oneDNN, each the fastest.

    The two take turns, so that other work on the machine slows down both.
    """
    in_channels, out_channels = TYPICAL_LAYERS[size]
    generator = torch.Generator().manual_seed(0)
    like = torch.empty(IMAGES, 1, SIDE, SIDE)
    maps, d_output = (empty_maps(like, c).normal_(generator=generator) for c in (in_channels, out_channels))
    weight = torch.empty(out_channels, in_channels, size, size).normal_(generator=generator)
    ones, zeros = torch.ones(in_channels), torch.zeros(in_channels)
    unit = Unit(ones, zeros, weight, 1e-5, frozen=Statistics(zeros, ones))

    def run(sizes: Collection[int]) -> float:
        started = time.perf_counter()
        convolutions, norm = CpuConvolutions(kernels, maps, [unit], sizes), unit.norm(empty_statistics(0, maps))
        slot, into = empty_maps(maps, out_channels), empty_statistics(out_channels, maps)
        convolutions.forward(unit, maps, norm, None, slot, into)
        norm_grad, out = NormGrad(norm, maps.new_empty(2, in_channels), None), empty_maps(maps, in_channels)
        gradient = OutputGradient(d_output, d_output)
        d_weight = convolutions.backward_accumulate(unit, maps, norm_grad, gradient, True, maps, out)
        assert d_weight is not None
        convolutions.like_weights([d_weight], [weight])
        return time.perf_counter() - started

    rounds = [(run(KERNEL_SIZES), run(())) for _ in range(ROUNDS)]
    native, onednn = (min(times) for times in zip(*rounds, strict=True))
    return native, onednn


def _convert(kernels: Kernels, sources: Sequence[Tensor], outs: Sequence[Tensor]) -> list[Tensor]:
    """Return each source if it has the shape, strides and dtype of its `out`, else `out` with a copy of it."""
    pairs = list(zip(sources, outs, strict=True))
    different = [
        source.shape != out.shape or source.stride() != out.stride() or source.dtype != out.dtype
        for source, out in pairs
    ]
    needed = list(compress(pairs, different))
    kernels.copy_weights([source for source, _ in needed], [out for _, out in needed])
    return [out if differs else source for (source, out), differs in zip(pairs, different, strict=True)]


def _max_in_channels(units: Sequence[Unit]) -> int:
    return max((unit.in_channels for unit in units), default=1)


def _geometry(weight: Tensor) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    """Return stride, padding, dilation, whether it is transposed, output padding and groups of a convolution."""
    return [1, 1], [size // 2 for size in weight.shape[2:]], [1, 1], False, [0, 0], 1


def _channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)

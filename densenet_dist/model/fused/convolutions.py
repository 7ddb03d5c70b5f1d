"""BN-ReLU and the convolution after it, forward and backward."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import compress

import torch
from torch import Tensor

from densenet_dist.model.fused.structure import TENSOR_CORE_CHANNELS, Arriving, Statistics, Unit, new_maps
from densenet_dist.model.kernels.interface import Consumer, Kernels, Norm, Reader, Rectify
from densenet_dist.model.kernels.native import NativeKernels

PIECE_BYTES = 24 * 2**20
"""Most rectified maps that a CPU works on at a time. What is larger than 32 MiB glibc gives back to the system when it
is freed: its pages are faulted in and cleared anew for every layer. Much smaller pieces cost more calls than they
save."""


class Convolutions:
    """The convolutions of one block, one after the other, by PyTorch (oneDNN, cuDNN).

    Args:
        kernels: for the maps' device and type.
        like: maps of the block's images, device and type.
        units: whose convolutions they are.
    """

    def __init__(self, kernels: Kernels, like: Tensor, units: Sequence[Unit]) -> None:
        self._kernels, self._like = kernels, like
        self._multiple = TENSOR_CORE_CHANNELS if like.is_cuda else 1
        # One piece of memory for all layers: on a CPU fresh pages cost more than the pass that fills them.
        n, _, height, width = like.shape
        self._scratch = like.new_empty(n * height * width * self.padded(_widest(units)))
        # All weights are converted together on a GPU, for fewer launches, and one at a time on a CPU, for less memory.
        self._together = like.is_cuda
        self._prepared_weights: dict[int, Tensor] = {}
        if self._together:
            weights = [unit.weight for unit in units if unit.weight is not None]
            prepared = _convert(kernels, weights, [self._room_for_weight(weight) for weight in weights])
            self._prepared_weights = {id(weight): made for weight, made in zip(weights, prepared, strict=True)}

    def accumulates(self, unit: Unit) -> bool:
        """Whether `accumulate` is better than `backward`, with gradients that wait."""
        return False

    def padded(self, channels: int) -> int:
        """The next multiple that the device likes."""
        return -(-channels // self._multiple) * self._multiple

    def apply(self, unit: Unit, maps: Tensor, norm: Norm) -> Tensor:
        """``conv(relu(norm(maps)))``: (N, C, H, W) -> (N, K, H, W), fresh memory; without a weight BN-ReLU."""
        if unit.weight is None:
            out = new_maps(maps, unit.reads)
            self._kernels.bn_relu(maps, norm, out)
            return out
        # Not a view of padded maps: nobody could change it in place.
        slot = None if self.padded(unit.makes) == unit.makes else new_maps(maps, unit.makes)
        return self.write(unit, maps, norm, None, 1.0, slot, None)

    def write(
        self, unit: Unit, maps: Tensor, norm: Norm, mask: Tensor | None, keep: float, slot: Tensor | None,
        into: Statistics | None,
    ) -> Tensor:  # fmt: skip
        """``slot = conv(relu(norm(maps))) * mask / keep`` and the slot's statistics, as `Kernels.write`.

        Returns:
            `slot`, fresh memory where it is None.
        """
        assert unit.weight is not None
        made = self._convolve(unit.weight, maps, norm)
        if slot is None:
            slot = made if made.shape[1] == unit.makes else made[:, : unit.makes]
        self._kernels.write(made, mask, keep, slot, *(into or (None, None)))
        return slot

    def backward(
        self, unit: Unit, maps: Tensor, norm: Norm, arriving: Arriving, need_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        """From the gradient of what the convolution made.

        Returns:
            Gradients of relu(norm(maps)), (N, at least C, H, W), and of the weight, for `like_weights`.
        """
        if unit.weight is None:
            return arriving.gradient, None
        weight, rectified = self._prepared(unit.weight), self._room(maps)
        d_made = self._finished(arriving, unit.makes, Rectify(maps, norm, rectified))
        d_input, d_weight, _ = torch.ops.aten.convolution_backward(
            d_made, rectified, weight, None, [1, 1], _padding(weight), [1, 1], False, [0, 0], 1,
            [True, need_weight, False],
        )  # fmt: skip
        return _channels_last(d_input), self._like_weight(d_weight if need_weight else None, unit.weight)

    def accumulate(
        self, unit: Unit, maps: Tensor, reader: Reader, arriving: Arriving, need_weight: bool, carry: Tensor | None,
        out: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """`backward`, and `Kernels.gather` of what came out of it.

        Returns:
            The weight's gradient, for `like_weights`.
        """
        came, d_weight = self.backward(unit, maps, reader.norm, arriving, need_weight)
        self._kernels.gather(maps, [Consumer(came[:, : unit.reads], reader)], carry, out)
        return d_weight

    def like_weights(self, gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """Gradients with the shapes, types and strides of weights: torch's fused optimizers do not look at strides."""
        if not self._together:
            return list(gradients)
        return _convert(self._kernels, gradients, [torch.empty_like(weight) for weight in weights])

    def _like_weight(self, gradient: Tensor | None, weight: Tensor) -> Tensor | None:
        if gradient is None or self._together:
            return gradient
        return _convert(self._kernels, [gradient], [torch.empty_like(weight)])[0]

    def _prepared(self, weight: Tensor) -> Tensor:
        """The weight in the maps' type, padded."""
        if self._together:
            return self._prepared_weights[id(weight)]
        return _convert(self._kernels, [weight], [self._room_for_weight(weight)])[0]

    def _finished(self, arriving: Arriving, makes: int, also: Rectify | None = None) -> Tensor:
        """The gradient of what a convolution made: (N, `padded` K, H, W), padding zero; and `also` done."""
        gradient, maps, correction, mask, keep, owned = arriving
        padded, same = self.padded(makes), gradient.dtype == maps.dtype
        dense = gradient.shape[1] == padded and gradient.is_contiguous(memory_format=torch.channels_last)
        if same and dense and correction is None and mask is None:
            if also is not None:
                self._kernels.bn_relu(*also)
            return gradient
        out = gradient if owned and same and padded == makes else new_maps(maps, padded)
        self._kernels.finish(gradient, maps, correction, mask, keep, out, also)
        return out

    def _convolve(self, weight: Tensor, maps: Tensor, norm: Norm) -> Tensor:
        weight, rectified = self._prepared(weight), self._room(maps)
        self._kernels.bn_relu(maps, norm, rectified)
        made: Tensor = torch.ops.aten.convolution(
            rectified, weight, None, [1, 1], _padding(weight), [1, 1], False, [0, 0], 1
        )
        return _channels_last(made)

    def _room(self, maps: Tensor) -> Tensor:
        """For rectified maps, padded."""
        n, channels, height, width = maps.shape
        padded = self.padded(channels)
        flat = self._scratch[: n * height * width * padded]
        return flat.view(n, height, width, padded).permute(0, 3, 1, 2)

    def _room_for_weight(self, weight: Tensor) -> Tensor:
        """For a weight in the maps' type, padded."""
        shape = (self.padded(weight.shape[0]), self.padded(weight.shape[1]), *weight.shape[2:])
        like = self._like
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _convert(kernels: Kernels, sources: Sequence[Tensor], outs: Sequence[Tensor]) -> list[Tensor]:
    """Return `sources` in the shapes, types and strides of `outs`, into which they are copied if they differ."""
    pairs = list(zip(sources, outs, strict=True))
    different = [_layout(source) != _layout(out) for source, out in pairs]
    needed = list(compress(pairs, different))
    if needed:
        kernels.copy_weights([source for source, _ in needed], [out for _, out in needed])
    return [out if differs else source for (source, out), differs in zip(pairs, different, strict=True)]


def _layout(weight: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return weight.shape, weight.stride(), weight.dtype


class CpuConvolutions(Convolutions):
    """The same on a CPU: by kernels of our own, which normalise what they read and sum what they make, or by oneDNN.

    Args:
        own: the sides of the convolutions that go to our own kernels. The others are computed some images at a time
            (`PIECE_BYTES`).
    """

    def __init__(self, kernels: Kernels, like: Tensor, units: Sequence[Unit], own: Collection[int] = ()) -> None:
        self._native = kernels if isinstance(kernels, NativeKernels) else None
        self._own = own
        self._dtype = like.dtype
        cut = [unit for unit in units if not self._takes(unit)]
        self._images = max(1, PIECE_BYTES // max(1, like[:1, :1].nbytes * _widest(cut)))
        self._many = len(like) > self._images
        super().__init__(kernels, like[: self._images], cut)

    def accumulates(self, unit: Unit) -> bool:
        """Where there are several pieces or a kernel of our own; else several gradients are small enough to wait."""
        return self._many or self._takes(unit) is not None

    def write(
        self, unit: Unit, maps: Tensor, norm: Norm, mask: Tensor | None, keep: float, slot: Tensor | None,
        into: Statistics | None,
    ) -> Tensor:  # fmt: skip
        """As in the base class."""
        assert unit.weight is not None
        native = self._takes(unit)
        if native is None and len(maps) <= self._images:
            return super().write(unit, maps, norm, mask, keep, slot, into)
        slot = new_maps(maps, unit.makes) if slot is None else slot
        if native is not None:
            weight = unit.weight.to(maps.dtype).contiguous()
            native.convolve(maps, norm, weight, mask, keep, slot, *(into or (None, None)))
            return slot
        pieces = self._cut(maps)
        parts = None if into is None else torch.stack([torch.stack(into)] * len(pieces))
        masks = [None] * len(pieces) if mask is None else self._cut(mask)
        for i, (few, kept, place) in enumerate(zip(pieces, masks, self._cut(slot), strict=True)):
            made = self._convolve(unit.weight, few, norm)
            self._kernels.write(made, kept, keep, place, *((None, None) if parts is None else parts[i]))
        if into is not None and parts is not None:
            _merge(parts, [len(few) for few in pieces], into)
        return slot

    def accumulate(
        self, unit: Unit, maps: Tensor, reader: Reader, arriving: Arriving, need_weight: bool, carry: Tensor | None,
        out: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """As in the base class."""
        native = self._takes(unit)
        if unit.weight is None or (native is None and len(maps) <= self._images):
            return super().accumulate(unit, maps, reader, arriving, need_weight, carry, out)
        d_made = self._finished(arriving, unit.makes)
        if native is not None:
            weight, sums = unit.weight.to(maps.dtype).contiguous(), reader.norm.mean.new_empty(2, unit.reads)
            d_weight = torch.empty_like(weight) if need_weight else None
            native.convolve_backward(maps, reader.norm, weight, d_made, carry, out, sums, d_weight)
            reader.settle(sums)
            return self._like_weight(d_weight, unit.weight)
        pieces = self._cut(maps)
        carries = [None] * len(pieces) if carry is None else self._cut(carry)
        parts = reader.gradients.new_empty(len(pieces), *reader.gradients.shape)
        d_weight = torch.zeros_like(unit.weight, dtype=parts.dtype) if need_weight else None
        for i, (few, came, before, place) in enumerate(
            zip(pieces, self._cut(d_made), carries, self._cut(out), strict=True)
        ):
            part = reader._replace(gradients=parts[i])
            d_few = super().accumulate(unit, few, part, Arriving(came, came), need_weight, before, place)
            if d_weight is not None and d_few is not None:
                d_weight += d_few
        torch.sum(parts, 0, out=reader.gradients)
        return self._like_weight(d_weight, unit.weight)

    def _takes(self, unit: Unit) -> NativeKernels | None:
        """Return our own kernels where they convolve for this unit."""
        if self._native is None or unit.weight is None or unit.weight.shape[2] not in self._own:
            return None
        return self._native if self._native.convolves(unit.weight, self._dtype) else None

    def _cut(self, maps: Tensor) -> tuple[Tensor, ...]:
        pieces: tuple[Tensor, ...] = maps.split(self._images)
        return pieces


def _merge(parts: Tensor, images: list[int], into: Statistics) -> None:
    """Statistics of some images each, (pieces, 2, C), to those of all."""
    share = parts.new_tensor(images, dtype=torch.float64)[:, None] / sum(images)
    means, variances = parts.double().unbind(1)
    mean = (share * means).sum(0)
    into.mean.copy_(mean)
    into.var.copy_((share * (variances + (means - mean).square())).sum(0))


def _widest(units: Sequence[Unit]) -> int:
    """The most channels that a unit reads."""
    return max((unit.reads for unit in units), default=1)


def _padding(weight: Tensor) -> list[int]:
    return [side // 2 for side in weight.shape[2:]]


def _channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)

"""BN-ReLU and a convolution of PyTorch's after it, forward and backward, on scratch memory that layers share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from densenet_dist.model.fused.structure import Unit, new_maps
from densenet_dist.model.kernels.interface import Kernels, Norm

TENSOR_CORE_CHANNELS = 8
"""Tensor cores want channels in multiples of this (16 bytes of half precision): others cost cuDNN a copy or its slow
kernels. Padding is zeros, in weights as in maps, so that its products and gradients are exactly 0."""


class ConvGradients(NamedTuple):
    """Of relu(norm(maps)), (N, at least C, H, W), and of the weight, with its shape, type and strides."""

    rectified: Tensor
    weight: Tensor | None


class Convolver:
    """The convolutions of one block, one after the other.

    Args:
        kernels: for the maps' device and type.
        like: maps of the block's images, device and type.
        widest: the most channels that a unit reads.
    """

    def __init__(self, kernels: Kernels, like: Tensor, widest: int) -> None:
        self._kernels, self._like = kernels, like
        self._multiple = TENSOR_CORE_CHANNELS if like.is_cuda else 1
        # One piece of memory for all layers: on a CPU fresh pages cost more than the pass that fills them.
        self._scratch = torch.empty(new_maps(like, 0).shape[0] * self.padded(widest) * like.shape[2] * like.shape[3],
                                    dtype=like.dtype, device=like.device)  # fmt: skip

    def padded(self, channels: int) -> int:
        """The next multiple that the device likes."""
        return -(-channels // self._multiple) * self._multiple

    def forward(self, unit: Unit, maps: Tensor, norm: Norm) -> Tensor:
        """``conv(relu(norm(maps)))``: (N, C, H, W) -> (N, at least K, H, W), fresh memory; without a weight BN-ReLU."""
        if unit.weight is None:
            out = new_maps(maps, unit.reads)
            self._kernels.bn_relu(maps, norm, out)
            return out
        weight = self._prepared(unit.weight)
        made: Tensor = torch.ops.aten.convolution(
            self._rectified(maps, norm), weight, None, [1, 1], _padding(weight), [1, 1], False, [0, 0], 1
        )
        return _channels_last(made)

    def backward(self, unit: Unit, maps: Tensor, norm: Norm, gradient: Tensor, need_weight: bool) -> ConvGradients:
        """From the gradient of what `forward` made, (N, `padded` K, H, W), padding zero."""
        if unit.weight is None:
            return ConvGradients(gradient, None)
        weight = self._prepared(unit.weight)
        d_input, d_weight, _ = torch.ops.aten.convolution_backward(
            gradient, self._rectified(maps, norm), weight, None, [1, 1], _padding(weight), [1, 1], False, [0, 0], 1,
            [True, need_weight, False],
        )  # fmt: skip
        return ConvGradients(_channels_last(d_input), _like_weight(d_weight, unit.weight) if need_weight else None)

    def _rectified(self, maps: Tensor, norm: Norm) -> Tensor:
        n, channels, height, width = maps.shape
        padded = self.padded(channels)
        flat = self._scratch[: n * height * width * padded]
        out = flat.view(n, height, width, padded).permute(0, 3, 1, 2)
        self._kernels.bn_relu(maps, norm, out)
        return out

    def _prepared(self, weight: Tensor) -> Tensor:
        """The weight in the maps' type, padded."""
        makes, reads = self.padded(weight.shape[0]), self.padded(weight.shape[1])
        if (makes, reads) == tuple(weight.shape[:2]):
            return weight.to(self._like.dtype, memory_format=torch.channels_last)
        out = torch.zeros((makes, reads, *weight.shape[2:]), dtype=self._like.dtype, device=weight.device)
        out = out.contiguous(memory_format=torch.channels_last)
        out[: weight.shape[0], : weight.shape[1]] = weight
        return out


def _padding(weight: Tensor) -> list[int]:
    return [side // 2 for side in weight.shape[2:]]


def _channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def _like_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """Without padding, and with the weight's strides: torch's fused optimizers do not look at a gradient's."""
    if gradient.shape == weight.shape and gradient.stride() == weight.stride() and gradient.dtype == weight.dtype:
        return gradient
    return torch.empty_like(weight).copy_(gradient[: weight.shape[0], : weight.shape[1]])

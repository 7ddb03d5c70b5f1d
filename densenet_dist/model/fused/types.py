"""A dense block as tensors and numbers, and the memory of its feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from densenet_dist.model.kernels.interface import Norm, Statistics, accumulation_type

TENSOR_CORE_CHANNELS = 8
"""Tensor cores need channels in multiples of 8 (16 bytes in half precision); otherwise cuDNN copies or falls back to
slow kernels. Channels are padded with zeros, in weights and in maps, so that their products and gradients are exactly
0."""


@dataclass(frozen=True)
class Unit:
    """A BN-ReLU with the convolution after it, if there is one. C channels in, K channels out.

    Attributes:
        gamma: (C,), any floating dtype.
        beta: (C,).
        weight: (K, C, 1, 1) or (K, C, 3, 3); None: BN-ReLU alone.
        eps: of the batch normalization.
        frozen: running statistics, if the batch normalization is in evaluation mode.
        start: index of the first of its C channels in the block's statistics.
    """

    gamma: Tensor
    beta: Tensor
    weight: Tensor | None
    eps: float
    frozen: Statistics | None = None
    start: int = 0

    @property
    def in_channels(self) -> int:
        """Return C."""
        return self.gamma.shape[0]

    @property
    def out_channels(self) -> int:
        """Return K; C without a convolution."""
        return self.in_channels if self.weight is None else self.weight.shape[0]

    def norm(self, statistics: Statistics) -> Norm:
        """Return the normalization with its part of the block's statistics, or with the running ones."""
        mean, var = self.frozen or statistics.narrow(self.start, self.start + self.in_channels)
        gamma, beta, mean, var = (v.to(statistics.mean.dtype).contiguous() for v in (self.gamma, self.beta, mean, var))
        return Norm(gamma, beta, mean, var, self.eps)


class BlockSpec:
    """A dense block as its units. The arguments are those of `dense_block`.

    Attributes:
        units: layer by layer, then the tail.
        layers: each layer's unit, or two with a bottleneck: BN-ReLU-conv1x1 and BN-ReLU-conv3x3.
        tail: a unit after the block that reads all its channels: a transition's BN-ReLU-conv1x1, or the last BN-ReLU.
        buffer_units: the units that read the block's buffer, in order: each layer's first, then the tail.
        widths: number of channels before each layer and after the last: ``[C, C + k, .., C + L k]``.
        bottleneck_width: number of channels between the two convolutions of a layer; 0 without bottlenecks.
        buffer_start: index of the buffer's first channel in the block's statistics, after those of all bottlenecks.
        in_training: whether any batch normalization uses the statistics of the batch.
        synchronized: whether these are the statistics of all ranks.
    """

    def __init__(
        self, gammas: Sequence[Tensor], betas: Sequence[Tensor], weights: Sequence[Tensor], frozen: Sequence[Tensor],
        training: Sequence[bool], eps: Sequence[float], bottleneck: bool, tail: bool, synchronized: bool,
    ) -> None:  # fmt: skip
        step = 2 if bottleneck else 1
        self.bottleneck_width = weights[0].shape[0] if bottleneck else 0
        self.buffer_start = len(gammas) // 2 * self.bottleneck_width
        self.in_training, self.synchronized = any(training), synchronized
        running = (Statistics(*pair) for pair in zip(frozen[::2], frozen[1::2], strict=True))
        self.units: list[Unit] = []
        for i, (gamma, beta) in enumerate(zip(gammas, betas, strict=True)):
            weight = weights[i] if i < len(weights) else None
            start = i // 2 * self.bottleneck_width if bottleneck and i % 2 == 1 else self.buffer_start
            statistics = None if training[i] else next(running)
            self.units.append(Unit(gamma.detach(), beta.detach(), weight, eps[i], statistics, start))
        self.tail = self.units[-1] if tail else None
        in_layers = self.units[:-1] if tail else self.units
        self.layers = [tuple(in_layers[i : i + step]) for i in range(0, len(in_layers), step)]
        self.buffer_units = self.units[::step]
        growth = (layer[-1].out_channels for layer in self.layers)
        self.widths = list(accumulate(growth, initial=self.units[0].in_channels))


def empty_statistics(channels: int, like: Tensor) -> Statistics:
    """Allocate the statistics of maps of the dtype and device of `like`."""
    wide = accumulation_type(like.dtype)
    return Statistics(like.new_empty(channels, dtype=wide), like.new_empty(channels, dtype=wide))


def merge_statistics(parts: Tensor, images: list[int], into: Statistics) -> None:
    """Combine the mean and variance of pieces, (pieces, 2, C), of so many images each."""
    share = parts.new_tensor(images, dtype=torch.float64)[:, None] / sum(images)
    means, variances = parts.double().unbind(1)
    mean = (share * means).sum(0)
    into.mean.copy_(mean)
    into.var.copy_((share * (variances + (means - mean).square())).sum(0))


def empty_maps(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate maps (N, channels, H, W), channels_last, with N, H, W, dtype and device of `like`."""
    n, _, height, width = like.shape
    shape = (n, channels, height, width)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def empty_buffer(like: Tensor, channels: int) -> Tensor:
    """Allocate maps whose pixels start at multiples of 16 bytes on GPUs, so that a thread reads 8 channels at once."""
    multiple = TENSOR_CORE_CHANNELS if like.is_cuda else 1
    return empty_maps(like, -(-channels // multiple) * multiple)[:, :channels]

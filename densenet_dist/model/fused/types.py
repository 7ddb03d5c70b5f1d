"""A dense block as tensors and numbers, and what its forward and backward pass exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from densenet_dist.model.fused.reduction import Reduction
from densenet_dist.model.kernels.interface import Correction, Norm, accumulation_type

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
        eps: of the batch normalisation.
        frozen: running mean and variance, (C,) each, if the batch normalisation is in evaluation mode.
    """

    gamma: Tensor
    beta: Tensor
    weight: Tensor | None
    eps: float
    frozen: tuple[Tensor, Tensor] | None = None

    @property
    def in_channels(self) -> int:
        """Return C."""
        return self.gamma.shape[0]

    @property
    def out_channels(self) -> int:
        """Return K; C without a convolution."""
        return self.in_channels if self.weight is None else self.weight.shape[0]

    def norm(self, statistics: Statistics, dtype: torch.dtype) -> Norm:
        """Return the normalisation with the statistics of its input, or its running ones; vectors of `dtype`."""
        mean, var = statistics.narrow(0, self.in_channels) if self.frozen is None else self.frozen
        gamma, beta, mean, var = (v.to(dtype).contiguous() for v in (self.gamma, self.beta, mean, var))
        return Norm(gamma, beta, mean, var, self.eps)


@dataclass(frozen=True)
class BlockSpec:
    """A dense block as its units.

    Attributes:
        layers: each layer's unit, or two with a bottleneck: BN-ReLU-conv1x1 and BN-ReLU-conv3x3.
        tail: a unit after the block that reads all its channels: a transition's BN-ReLU-conv1x1, or the last BN-ReLU.
        keep: probability that dropout keeps a value.
        reduction: whether statistics are those of this rank or of all ranks.
    """

    layers: Sequence[tuple[Unit, ...]]
    tail: Unit | None
    keep: float
    reduction: Reduction

    @property
    def buffer_units(self) -> list[Unit]:
        """Return the units that read the block's buffer, in order: each layer's first, then the tail."""
        return [layer[0] for layer in self.layers] + ([self.tail] if self.tail else [])

    @property
    def units(self) -> list[Unit]:
        """Return all units, layer by layer, then the tail."""
        return [unit for layer in self.layers for unit in layer] + ([self.tail] if self.tail else [])

    @property
    def widths(self) -> list[int]:
        """Return the number of channels before each layer and after the last: ``[C, C + k, .., C + L k]``."""
        growth = (layer[-1].out_channels for layer in self.layers)
        return list(accumulate(growth, initial=self.layers[0][0].in_channels))

    @property
    def bottleneck_width(self) -> int:
        """Return the number of channels between the two convolutions of a layer; 0 without bottlenecks."""
        return self.layers[0][0].out_channels if len(self.layers[0]) == 2 else 0

    @property
    def in_training(self) -> bool:
        """Return whether any batch normalisation uses the statistics of the batch."""
        return any(unit.frozen is None for unit in self.units)


class Statistics(NamedTuple):
    """Mean and biased variance of each channel, (C,), accumulation dtype."""

    mean: Tensor
    var: Tensor

    @classmethod
    def empty(cls, channels: int, like: Tensor) -> Statistics:
        """Allocate them for maps of the dtype and device of `like`."""
        wide = accumulation_type(like.dtype)
        return cls(like.new_empty(channels, dtype=wide), like.new_empty(channels, dtype=wide))

    def narrow(self, start: int, stop: int) -> Statistics:
        """Return views of channels ``start:stop``."""
        return Statistics(self.mean[start:stop], self.var[start:stop])


class ForwardResult(NamedTuple):
    """The results of the forward pass.

    Attributes:
        maps: the buffer, (N, C + L k, H, W): the block's input, then each layer's output.
        out: the tail's output (N, K, H, W); None without a tail.
        statistics: of `maps`; of 0 channels if no batch normalisation is in training mode.
        bottlenecks: of each layer with a bottleneck, the output of its 1x1 convolution; empty if no backward pass
            follows.
        bottleneck_statistics: of `bottlenecks`, one layer after another.
    """

    maps: Tensor
    out: Tensor | None
    statistics: Statistics
    bottlenecks: list[Tensor]
    bottleneck_statistics: Statistics


class OutputGradient(NamedTuple):
    """The gradient with respect to a unit's stored output, as arguments of `Kernels.correct_gradient`.

    `correction` and `mask` are still to be applied; the result is the gradient of the convolution's output.

    Attributes:
        owned: whether `gradient` may be overwritten.
    """

    gradient: Tensor
    maps: Tensor
    correction: Correction | None = None
    mask: Tensor | None = None
    keep: float = 1.0
    owned: bool = False


def empty_maps(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate maps (N, channels, H, W), channels_last, with N, H, W, dtype and device of `like`."""
    n, _, height, width = like.shape
    shape = (n, channels, height, width)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def empty_buffer(like: Tensor, channels: int) -> Tensor:
    """Allocate maps whose pixels start at multiples of 16 bytes on GPUs, so that a thread reads 8 channels at once."""
    multiple = TENSOR_CORE_CHANNELS if like.is_cuda else 1
    return empty_maps(like, -(-channels // multiple) * multiple)[:, :channels]

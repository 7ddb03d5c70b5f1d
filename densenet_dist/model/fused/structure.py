"""A dense block as numbers and weights, and what its passes hand to each other."""

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
"""Tensor cores want channels in multiples of this (16 bytes of half precision): others cost cuDNN a copy or its slow
kernels. Padding is zeros, in weights as in maps, so that its products and gradients are exactly 0."""


@dataclass(frozen=True)
class Unit:
    """One BN-ReLU and the convolution after it, if there is one.

    Attributes:
        gamma: (C,), any floating type; C maps are read.
        beta: (C,).
        weight: (K, C, 1, 1) or (K, C, 3, 3); None: BN-ReLU alone.
        eps: of the batch normalisation.
        frozen: running mean and variance, (C,) each, where the batch normalisation is not in training.
    """

    gamma: Tensor
    beta: Tensor
    weight: Tensor | None
    eps: float
    frozen: tuple[Tensor, Tensor] | None = None

    @property
    def reads(self) -> int:
        """C."""
        return self.gamma.shape[0]

    @property
    def makes(self) -> int:
        """K."""
        return self.reads if self.weight is None else self.weight.shape[0]

    def norm(self, statistics: Statistics, dtype: torch.dtype) -> Norm:
        """With the statistics of the maps read, or its own where it is frozen; vectors of the accumulation `dtype`."""
        mean, var = statistics.narrow(0, self.reads) if self.frozen is None else self.frozen
        gamma, beta, mean, var = (v.to(dtype).contiguous() for v in (self.gamma, self.beta, mean, var))
        return Norm(gamma, beta, mean, var, self.eps)


@dataclass(frozen=True)
class Structure:
    """A dense block as its units.

    Attributes:
        layers: of each layer its unit, or with a bottleneck its two.
        tail: a further unit that reads all maps: a transition's BN-ReLU-conv1x1, or a last BN-ReLU.
        keep: probability that dropout keeps a value.
        reduction: what the statistics are taken over.
    """

    layers: Sequence[tuple[Unit, ...]]
    tail: Unit | None
    keep: float
    reduction: Reduction

    @property
    def readers(self) -> list[Unit]:
        """The units that read the block's own maps, in order: each layer's first, then the tail."""
        return [layer[0] for layer in self.layers] + ([self.tail] if self.tail else [])

    @property
    def units(self) -> list[Unit]:
        """All of them, layer by layer, then the tail."""
        return [unit for layer in self.layers for unit in layer] + ([self.tail] if self.tail else [])

    @property
    def widths(self) -> list[int]:
        """Maps before each layer, and after the last."""
        return list(accumulate((layer[-1].makes for layer in self.layers), initial=self.layers[0][0].reads))

    @property
    def inner_width(self) -> int:
        """Maps between the convolutions of a layer with a bottleneck; 0 without."""
        return self.layers[0][0].makes if len(self.layers[0]) == 2 else 0

    @property
    def in_training(self) -> bool:
        """Whether any batch normalisation takes the batch's statistics."""
        return any(unit.frozen is None for unit in self.units)


class Statistics(NamedTuple):
    """Mean and variance a channel (divided by the number of values), accumulation type."""

    mean: Tensor
    var: Tensor

    @classmethod
    def empty(cls, channels: int, like: Tensor) -> Statistics:
        """Room for `channels` of them, for maps like these."""
        wide = accumulation_type(like.dtype)
        return cls(like.new_empty(channels, dtype=wide), like.new_empty(channels, dtype=wide))

    def narrow(self, start: int, stop: int) -> Statistics:
        """Views of a range of channels."""
        return Statistics(self.mean[start:stop], self.var[start:stop])


class Forward(NamedTuple):
    """What the forward pass makes.

    Attributes:
        maps: (N, all maps, H, W).
        out: the tail's output (N, K, H, W); None without a tail.
        statistics: of `maps`; of no channels where no batch normalisation is in training.
        inner: with bottlenecks, the maps between each layer's convolutions; empty where nobody will need them.
        inner_statistics: theirs, layer after layer.
    """

    maps: Tensor
    out: Tensor | None
    statistics: Statistics
    inner: list[Tensor]
    inner_statistics: Statistics


class Gradients(NamedTuple):
    """What the backward pass makes.

    Attributes:
        x: (N, C, H, W), or None where it is not wanted.
        readers: (readers, 2, all maps): of beta and gamma, for each of `Structure.readers`; only a unit's own
            channels mean anything.
        inner: (layers, 2, `inner_width`): of beta and gamma of each layer's second unit; of no layers without.
        weights: of the units whose weight's gradient is wanted, in order of `Structure.units`.
    """

    x: Tensor | None
    readers: Tensor
    inner: Tensor
    weights: list[Tensor]


class Arriving(NamedTuple):
    """The gradient of what a unit made, before the statistics' share and dropout: arguments of `Kernels.finish`.

    Attributes:
        owned: whether `gradient` may be overwritten.
    """

    gradient: Tensor
    maps: Tensor
    correction: Correction | None = None
    mask: Tensor | None = None
    keep: float = 1.0
    owned: bool = False


def new_maps(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised maps (N, channels, H, W), channels_last, for the images and type of `like`."""
    n, _, height, width = like.shape
    shape = (n, channels, height, width)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def new_buffer(like: Tensor, channels: int) -> Tensor:
    """`new_maps` whose rows begin at multiples of 16 bytes on a GPU, where threads then read 8 channels at once."""
    multiple = TENSOR_CORE_CHANNELS if like.is_cuda else 1
    return new_maps(like, -(-channels // multiple) * multiple)[:, :channels]

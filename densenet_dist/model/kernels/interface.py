"""The pointwise kernels of the fused dense block, their arguments, and an implementation in PyTorch operators.

Conventions, also of `densenet_dist.model.fused`:

- ``maps`` are feature maps (N, C, H, W) in channels_last memory. They may be a slice of the channels of a wider tensor:
  channel c of pixel p lies at element ``p * ld + c`` with ``ld >= C``.
- The accumulation dtype is float32 for float32, bfloat16 and float16 maps and float64 for float64 maps. Vectors with
  one element per channel (gamma, mean, sums) have this dtype.
- Kernels write into tensors that the caller allocates. The order of their sums depends on shapes only, so that equal
  inputs give bitwise equal outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which maps of `dtype` are normalized and summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Statistics(NamedTuple):
    """Mean and biased variance (divided by N H W) of each channel, (C,), contiguous, accumulation dtype."""

    mean: Tensor
    var: Tensor

    def narrow(self, start: int, stop: int | None = None) -> Statistics:
        """Return views of channels ``start:stop``."""
        return Statistics(self.mean[start:stop], self.var[start:stop])


class Norm(NamedTuple):
    """A batch normalization with known statistics: y = gamma (x - mean) / sqrt(var + eps) + beta.

    The vectors have shape (C,), are contiguous and of the accumulation dtype.
    """

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    eps: float

    def scale(self) -> Tensor:
        """Return s = gamma / sqrt(var + eps), (C,): dy/dx if the statistics are constants."""
        return self.gamma * torch.rsqrt(self.var + self.eps)


class NormGrad(NamedTuple):
    """The normalization of a unit relu(norm(x)) in the backward pass, and where its gradients go.

    Below, g is the gradient of the loss with respect to norm(x): that of relu(norm(x)) where norm(x) > 0, else 0. Sums
    are over (N, H, W).

    Attributes:
        norm: of the C channels that the unit reads.
        gradients: (2, C), rows contiguous, accumulation dtype; overwritten with the gradients of beta, sum(g), and of
            gamma, sum(g (x - mean)) / sqrt(var + eps).
        correction: (2, C), likewise. The unit's share of `Correction.sums` is added to it. None if the statistics are
            constants (evaluation mode).
    """

    norm: Norm
    gradients: Tensor
    correction: Tensor | None

    def narrow(self, start: int, stop: int) -> NormGrad:
        """Return views of channels ``start:stop``."""
        gamma, beta, mean, var = (vector[start:stop] for vector in self.norm[:4])
        correction = None if self.correction is None else self.correction[:, start:stop]
        return NormGrad(Norm(gamma, beta, mean, var, self.norm.eps), self.gradients[:, start:stop], correction)

    def apply_sums(self, sums: Tensor) -> None:
        """Write `gradients` and add to `correction`, given the sums of g and of g (x - mean), (2, C)."""
        rstd = torch.rsqrt(self.norm.var + self.norm.eps)
        self.gradients[0] = sums[0]
        torch.mul(sums[1], rstd, out=self.gradients[1])
        if self.correction is not None:
            scale = self.norm.gamma * rstd
            self.correction[0].addcmul_(self.gradients[0], scale)
            self.correction[1].addcmul_(self.gradients[1], scale * rstd)


class Consumer(NamedTuple):
    """A unit that reads maps x, with the gradient of the loss with respect to its relu(norm(x)), (N, C, H, W)."""

    gradient: Tensor
    norm_grad: NormGrad


class Correction(NamedTuple):
    """The part of the gradient of maps that flows through their batch statistics.

    It is subtracted: (sums[0] + sums[1] (maps - mean)) / values. `densenet_dist.model.fused.backward` derives it.

    Attributes:
        mean: (C,), contiguous, accumulation dtype.
        sums: (2, C), rows contiguous, accumulation dtype.
        values: number of values that each statistic is over (N H W, of all ranks with SyncBN).
    """

    mean: Tensor
    sums: Tensor
    values: float


class Dropout(NamedTuple):
    """The values that dropout keeps: bool, (N, C, H, W), contiguous in channels_last, and the probability of True."""

    mask: Tensor
    keep: float


class OutputGradient(NamedTuple):
    """The gradient with respect to the maps that a convolution stored, to which two steps are still to be applied.

    The gradient with respect to the convolution's output is ``(gradient - correction) * mask / keep``.

    Attributes:
        gradient: (N, C, H, W), of the maps' or the accumulation dtype.
        maps: as stored, (N, C, H, W).
        correction: None: zero.
        dropout: None: all values are kept.
        owned: whether `gradient` may be overwritten.
    """

    gradient: Tensor
    maps: Tensor
    correction: Correction | None = None
    dropout: Dropout | None = None
    owned: bool = False


class BNReLU(NamedTuple):
    """Arguments of `Kernels.bn_relu`."""

    maps: Tensor
    norm: Norm
    out: Tensor


class Kernels:
    """The kernels in PyTorch operators: for every device and dtype, but slow. Subclasses are faster.

    Channels of an output beyond those of its input are padding and are set to 0. NaN propagates as in PyTorch.
    """

    def bn_relu(self, maps: Tensor, norm: Norm, out: Tensor) -> None:
        """Compute ``out = relu(norm(maps))``: maps (N, C, H, W), out (N, >= C, H, W)."""
        channels = maps.shape[1]
        out[:, :channels] = torch.relu(_normalize(maps, norm))
        out[:, channels:] = 0

    def store_output(self, output: Tensor, dropout: Dropout | None, slot: Tensor, into: Statistics | None) -> None:
        """Store a convolution's output after dropout, ``slot = output[:, :C] * mask / keep``, and its statistics.

        Args:
            output: (N, >= C, H, W). `slot` may be its first C channels; it is then changed in place.
            dropout: None: all values are kept.
            slot: (N, C, H, W), the destination.
            into: overwritten with the statistics of `slot` as stored, after rounding; 0 if it is empty. None: not
                needed.
        """
        slot.copy_(_dropout(output[:, : slot.shape[1]], dropout))
        if into is None:
            return
        mean, var = into
        if slot.numel() == 0:
            mean.zero_()
            var.zero_()
            return
        stored = slot.to(mean.dtype)
        torch.mean(stored, (0, 2, 3), out=mean)
        torch.mean((stored - _per_channel(mean)).square(), (0, 2, 3), out=var)

    def sum_gradients(
        self, maps: Tensor, consumers: Sequence[Consumer], accumulator: Tensor | None, out: Tensor
    ) -> None:
        """Compute ``out = accumulator + sum over consumers of s g``, and each consumer's `NormGrad`.

        g is defined there; s is `Norm.scale`.

        Args:
            maps: x, (N, C, H, W).
            consumers: one to `MAX_CONSUMERS`.
            accumulator: sum over consumers of earlier calls, (N, C, H, W), of the maps' dtype, or None; may be `out`.
            out: (N, C, H, W), of the maps' or the accumulation dtype.
        """
        x = maps.to(accumulation_type(maps.dtype))
        total = torch.zeros_like(x) if accumulator is None else accumulator.to(x.dtype)
        for gradient, norm_grad in consumers:
            norm = norm_grad.norm
            g = torch.where(_normalize(maps, norm) <= 0, 0, gradient.to(x.dtype))
            total = total + _per_channel(norm.scale()) * g
            norm_grad.apply_sums(torch.stack([g.sum((0, 2, 3)), (g * (x - _per_channel(norm.mean))).sum((0, 2, 3))]))
        out.copy_(total)

    def correct_gradient(self, d_output: OutputGradient, out: Tensor, also: BNReLU | None = None) -> None:
        """Compute the gradient with respect to a convolution's output, see `OutputGradient`.

        Args:
            d_output: its gradient may be `out`.
            out: (N, >= C, H, W).
            also: an independent `bn_relu`, on GPUs in the same launch.
        """
        gradient, maps, correction, dropout, _ = d_output
        channels, wide = maps.shape[1], accumulation_type(maps.dtype)
        total = gradient.to(wide)
        if correction is not None:
            offset, slope = (_per_channel(row / correction.values) for row in correction.sums)
            total = total - offset - slope * (maps.to(wide) - _per_channel(correction.mean))
        out[:, :channels] = _dropout(total, dropout)
        out[:, channels:] = 0
        if also is not None:
            self.bn_relu(*also)

    def copy_weights(self, sources: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """Copy weights (K, C, h, w) into tensors of any dtype, K and C: truncated, or padded with zeros."""
        for source, out in zip(sources, outs, strict=True):
            k, c = min(len(source), len(out)), min(source.shape[1], out.shape[1])
            if source.shape[:2] != out.shape[:2]:
                out.zero_()
            out[:k, :c] = source[:k, :c]


MAX_CONSUMERS = 4
"""Largest number of consumers in a call of `Kernels.sum_gradients`."""


def _per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def _normalize(maps: Tensor, norm: Norm) -> Tensor:
    scale = norm.scale()
    return maps.to(scale.dtype) * _per_channel(scale) + _per_channel(norm.beta - norm.mean * scale)


def _dropout(values: Tensor, dropout: Dropout | None) -> Tensor:
    if dropout is None:
        return values
    wide = values.to(accumulation_type(values.dtype))
    return wide * dropout.mask / dropout.keep if dropout.keep > 0 else torch.zeros_like(wide)

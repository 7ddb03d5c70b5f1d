"""What a fused dense block asks of a device besides convolutions: four pointwise passes over feature maps.

Every tensor of maps has shape (N, C, H, W) and its channels side by side in memory (channels_last), possibly as a range
of a wider tensor's channels. Arithmetic is float32 for float32, bfloat16 and float16 maps, float64 for float64 maps:
"accumulation type" below. Passes write into tensors that they are given, and sum in an order that depends on shapes
alone, so that the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which maps of `dtype` are normalised and summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Norm(NamedTuple):
    """A batch normalisation with settled statistics: y = gamma (x - mean) / sqrt(var + eps) + beta.

    The vectors have as many elements as there are channels, are contiguous and of the accumulation type.
    """

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    eps: float

    def narrow(self, start: int, stop: int) -> Norm:
        """That of the channels from `start` to before `stop`."""
        gamma, beta, mean, var = (vector[start:stop] for vector in (self.gamma, self.beta, self.mean, self.var))
        return Norm(gamma, beta, mean, var, self.eps)

    def scale(self) -> Tensor:
        """s = gamma / sqrt(var + eps), so that dy/dx = s where the statistics are constants."""
        return self.gamma * torch.rsqrt(self.var + self.eps)


class Reader(NamedTuple):
    """A layer that reads maps x as relu(norm(x)), and where a backward pass puts what belongs to its normalisation.

    Attributes:
        norm: over the channels that it reads.
        gradients: (2, C), rows contiguous, accumulation type, written by `Kernels.gather`: the gradients of beta and
            gamma, which are the sums over (N, H, W) of g and of g (x - mean) / sqrt(var + eps), where g is the gradient
            of relu(norm(x)) where norm(x) > 0, else 0.
        correction: likewise; the batch statistics' share in the gradient of x (`Correction.sums`) is added to it. None:
            the statistics are constants.
    """

    norm: Norm
    gradients: Tensor
    correction: Tensor | None

    def narrow(self, start: int, stop: int) -> Reader:
        """That of the channels from `start` to before `stop`."""
        correction = None if self.correction is None else self.correction[:, start:stop]
        return Reader(self.norm.narrow(start, stop), self.gradients[:, start:stop], correction)

    def settle(self, sums: Tensor) -> None:
        """Write `gradients` and add to `correction`, given the sums over (N, H, W) of g and g (x - mean), (2, C)."""
        rstd = torch.rsqrt(self.norm.var + self.norm.eps)
        self.gradients[0] = sums[0]
        torch.mul(sums[1], rstd, out=self.gradients[1])
        if self.correction is not None:
            scale = self.norm.gamma * rstd
            self.correction[0].addcmul_(self.gradients[0], scale)
            self.correction[1].addcmul_(self.gradients[1], scale * rstd)


class Consumer(NamedTuple):
    """A reader of maps x and the gradient of the loss with respect to relu(norm(x)), (N, C, H, W)."""

    gradient: Tensor
    reader: Reader


class Correction(NamedTuple):
    """What batch statistics subtract from the gradient of maps: (sums[0] + sums[1] (maps - mean)) / values.

    Attributes:
        mean: (C,), contiguous, accumulation type.
        sums: (2, C), rows contiguous, accumulation type.
        values: how many a statistic is over.
    """

    mean: Tensor
    sums: Tensor
    values: float


class Rectify(NamedTuple):
    """Arguments of `Kernels.bn_relu`."""

    maps: Tensor
    norm: Norm
    out: Tensor


class Kernels:
    """The four passes, here in PyTorch's own operators: for every device and type, and slow; subclasses are faster.

    Channels of an output beyond those of its input are padding and become 0. NaN in maps stays NaN in every output that
    it reaches.
    """

    def bn_relu(self, maps: Tensor, norm: Norm, out: Tensor) -> None:
        """``out = relu(norm(maps))``: maps (N, C, H, W), out (N, at least C, H, W)."""
        channels = maps.shape[1]
        out[:, :channels] = torch.relu(_normalised(maps, norm))
        out[:, channels:] = 0

    def write(
        self, made: Tensor, mask: Tensor | None, keep: float, slot: Tensor, mean: Tensor | None, var: Tensor | None
    ) -> None:
        """``slot = made[:, :C] * mask / keep`` (without a mask ``made[:, :C]``), and the slot's statistics.

        Args:
            made: (N, at least C, H, W); `slot` may be its first C channels, then it is changed in place.
            mask: bool, (N, C, H, W), dense in channels_last; what dropout keeps.
            keep: the probability that dropout keeps a value.
            slot: (N, C, H, W), where the maps go.
            mean: (C,), accumulation type: becomes the mean of what `slot` holds, rounding included; 0 of nothing; None:
                not wanted.
            var: (C,) likewise, the variance (divided by N H W).
        """
        slot.copy_(_dropped(made[:, : slot.shape[1]], mask, keep))
        if mean is None or var is None:
            return
        if slot.numel() == 0:
            mean.zero_()
            var.zero_()
            return
        stored = slot.to(mean.dtype)
        torch.mean(stored, (0, 2, 3), out=mean)
        torch.mean((stored - _channels(mean)).square(), (0, 2, 3), out=var)

    def gather(self, maps: Tensor, consumers: Sequence[Consumer], carry: Tensor | None, out: Tensor) -> None:
        """``out = carry + sum over consumers of s g`` (see `Reader`), and what each reader wants.

        Args:
            maps: (N, C, H, W): x.
            consumers: one to four of them.
            carry: (N, C, H, W), of the maps' type; may be `out` itself; None: zero.
            out: (N, C, H, W), of the maps' or the accumulation type.
        """
        x = maps.to(accumulation_type(maps.dtype))
        total = torch.zeros_like(x) if carry is None else carry.to(x.dtype)
        for gradient, reader in consumers:
            norm = reader.norm
            g = torch.where(_normalised(maps, norm) <= 0, 0, gradient.to(x.dtype))
            total = total + _channels(norm.scale()) * g
            reader.settle(torch.stack([g.sum((0, 2, 3)), (g * (x - _channels(norm.mean))).sum((0, 2, 3))]))
        out.copy_(total)

    def finish(
        self, gradient: Tensor, maps: Tensor, correction: Correction | None, mask: Tensor | None, keep: float,
        out: Tensor, also: Rectify | None = None,
    ) -> None:  # fmt: skip
        """``out = (gradient - correction) * mask / keep``.

        Args:
            gradient: (N, C, H, W), of the maps' or the accumulation type; may be `out` itself.
            maps: (N, C, H, W).
            correction: None: ``gradient * mask / keep``.
            mask: as for `write`.
            keep: as for `write`.
            out: (N, at least C, H, W).
            also: of another tensor, in the same launch where there are launches.
        """
        channels, wide = maps.shape[1], accumulation_type(maps.dtype)
        total = gradient.to(wide)
        if correction is not None:
            offset, slope = (_channels(row / correction.values) for row in correction.sums)
            total = total - offset - slope * (maps.to(wide) - _channels(correction.mean))
        out[:, :channels] = _dropped(total, mask, keep)
        out[:, channels:] = 0
        if also is not None:
            self.bn_relu(*also)

    def copy_weights(self, sources: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
        """Copy weights (K, C, h, w) to others of any type and size: zeros where the source ends, no more than fits."""
        for source, out in zip(sources, outs, strict=True):
            makes, reads = min(len(source), len(out)), min(source.shape[1], out.shape[1])
            if source.shape[:2] != out.shape[:2]:
                out.zero_()
            out[:makes, :reads] = source[:makes, :reads]


MOST_CONSUMERS = 4
"""How many consumers `Kernels.gather` takes at once."""


def _channels(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def _normalised(maps: Tensor, norm: Norm) -> Tensor:
    scale = norm.scale()
    return maps.to(scale.dtype) * _channels(scale) + _channels(norm.beta - norm.mean * scale)


def _dropped(values: Tensor, mask: Tensor | None, keep: float) -> Tensor:
    if mask is None:
        return values
    wide = values.to(accumulation_type(values.dtype))
    return wide * mask / keep if keep > 0 else torch.zeros_like(wide)

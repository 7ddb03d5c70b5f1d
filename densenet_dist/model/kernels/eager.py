"""The passes in PyTorch's own operators: for every device and type, and slow. They say what the others compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densenet_dist.model.kernels.interface import Consumer, Norm, accumulation_type


class EagerKernels:
    """See `densenet_dist.model.kernels.interface.Kernels`."""

    def bn_relu(self, maps: Tensor, norm: Norm, out: Tensor) -> None:
        """Normalise and rectify."""
        channels = maps.shape[1]
        out[:, :channels] = torch.relu(_normalised(maps, norm))
        out[:, channels:] = 0

    def write(
        self, made: Tensor, mask: Tensor | None, keep: float, slot: Tensor, mean: Tensor | None, var: Tensor | None
    ) -> None:
        """Drop, store, and take the statistics of what was stored."""
        slot.copy_(_dropped(made[:, : slot.shape[1]], mask, keep))
        if mean is not None and var is not None:
            stored = slot.to(mean.dtype)
            if stored.numel() == 0:
                mean.zero_()
                var.zero_()
                return
            torch.mean(stored, (0, 2, 3), out=mean)
            torch.mean((stored - _channels(mean)).square(), (0, 2, 3), out=var)

    def gather(self, maps: Tensor, consumers: Sequence[Consumer], carry: Tensor | None, out: Tensor) -> None:
        """Sum what came back to the consumers."""
        x = maps.to(accumulation_type(maps.dtype))
        total = torch.zeros_like(x) if carry is None else carry.to(x.dtype)
        for gradient, norm, sums in consumers:
            g = torch.where(_normalised(maps, norm) <= 0, 0, gradient.to(x.dtype))
            total = total + _channels(norm.scale()) * g
            sums[0] = g.sum((0, 2, 3))
            sums[1] = (g * (x - _channels(norm.mean))).sum((0, 2, 3))
        out.copy_(total)

    def finish(
        self, gradient: Tensor, maps: Tensor, correction: tuple[Tensor, Tensor, Tensor] | None, mask: Tensor | None,
        keep: float, out: Tensor,
    ) -> None:  # fmt: skip
        """Apply the statistics' share of the gradient, then dropout's."""
        channels, wide = maps.shape[1], accumulation_type(maps.dtype)
        total = gradient.to(wide)
        if correction is not None:
            mean, offset, slope = (_channels(vector) for vector in correction)
            total = total - offset - slope * (maps.to(wide) - mean)
        out[:, :channels] = _dropped(total, mask, keep)
        out[:, channels:] = 0


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

"""What a fused dense block asks of a device besides convolutions: four pointwise passes over feature maps.

Every tensor of maps has shape (N, C, H, W) and its channels side by side in memory (channels_last), possibly as a range
of a wider tensor's channels. Arithmetic is float32 for float32, bfloat16 and float16 maps, float64 for float64 maps:
"accumulation type" below. Passes write into tensors that they are given, and sum in an order that depends on shapes
alone, so that the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

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


class Consumer(NamedTuple):
    """A layer that read maps x as relu(norm(x)), and what came back to it.

    Attributes:
        gradient: of the loss with respect to relu(norm(x)); (N, C, H, W).
        norm: over the same channels.
        sums: (2, C), accumulation type, written by `Kernels.gather`: the sums over (N, H, W) of g and of
            g (x - norm.mean), where g = gradient where norm(x) > 0, else 0.
    """

    gradient: Tensor
    norm: Norm
    sums: Tensor


class Kernels(Protocol):
    """The four passes. Channels of an output beyond those of its input are padding and become 0.

    NaN in maps stays NaN in every output that it reaches, as it does in PyTorch's own operators.
    """

    def bn_relu(self, maps: Tensor, norm: Norm, out: Tensor) -> None:
        """``out = relu(norm(maps))``: maps (N, C, H, W), out (N, at least C, H, W)."""

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

    def gather(self, maps: Tensor, consumers: Sequence[Consumer], carry: Tensor | None, out: Tensor) -> None:
        """``out = carry + sum over consumers of s g`` (see `Consumer`), and each consumer's sums.

        Args:
            maps: (N, C, H, W): x.
            consumers: one to four of them.
            carry: (N, C, H, W), of the maps' type; may be `out` itself; None: zero.
            out: (N, C, H, W), of the maps' or the accumulation type.
        """

    def finish(
        self, gradient: Tensor, maps: Tensor, correction: tuple[Tensor, Tensor, Tensor] | None, mask: Tensor | None,
        keep: float, out: Tensor,
    ) -> None:  # fmt: skip
        """``out = (gradient - offset - slope (maps - mean)) * mask / keep``.

        Args:
            gradient: (N, C, H, W), of the maps' or the accumulation type.
            maps: (N, C, H, W).
            correction: mean, offset, slope: (C,) each, accumulation type; None: ``gradient * mask / keep``.
            mask: as for `write`.
            keep: as for `write`.
            out: (N, at least C, H, W).
        """


MOST_CONSUMERS = 4
"""How many consumers `Kernels.gather` takes at once."""

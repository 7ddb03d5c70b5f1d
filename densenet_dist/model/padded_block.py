"""The reference form with every layer's maps padded to what tensor cores like: a baseline for measurements."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densenet_dist.model.dense_block import DenseBlock
from densenet_dist.model.fused.convolutions import TENSOR_CORE_CHANNELS


class PaddedDenseBlock(DenseBlock):
    """The same function as `DenseBlock`, of the same state dict: widths are padded with zeros inside `forward` only.

    Padded weights, gammas and betas are zero, and so are padded maps and all gradients of the padding. Shapes of input
    and output are those of `DenseBlock`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers in order; see the class."""
        columns = torch.arange(x.shape[1], device=x.device)
        x = _pad_maps(x)
        for layer in self.values():
            made, read = x, columns
            for i in range(1, 3 if hasattr(layer, "conv2") else 2):
                norm, conv, drop = (
                    getattr(layer, f"norm{i}"),
                    getattr(layer, f"conv{i}"),
                    getattr(layer, f"drop{i}", None),
                )
                made = F.relu(_norm(made, norm, read), inplace=True)
                weight = _spread(_spread(conv.weight, 1, read, made.shape[1]), 0, *_places(conv.out_channels, x.device))
                made = F.conv2d(made, weight, padding=conv.padding)
                if drop is not None:
                    made = _pad_maps(drop(made[:, : conv.out_channels]))
                read = torch.arange(conv.out_channels, device=x.device)
            columns = torch.cat((columns, x.shape[1] + read))
            x = torch.cat((x, made), dim=1)
        return x.index_select(1, columns).contiguous(memory_format=torch.channels_last)


def _norm(x: Tensor, norm: nn.BatchNorm2d, columns: Tensor) -> Tensor:
    width, mean, var = x.shape[1], norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    wide_mean, wide_var = _spread(mean, 0, columns, width), _spread(var, 0, columns, width)
    gamma, beta = _spread(norm.weight, 0, columns, width), _spread(norm.bias, 0, columns, width)
    y = F.batch_norm(x, wide_mean, wide_var, gamma, beta, norm.training, norm.momentum or 0.0, norm.eps)
    if norm.training:
        with torch.no_grad():
            mean.copy_(wide_mean[columns])
            var.copy_(wide_var[columns])
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
    return y


def _places(channels: int, device: torch.device) -> tuple[Tensor, int]:
    return torch.arange(channels, device=device), _padded(channels)


def _padded(channels: int) -> int:
    return -(-channels // TENSOR_CORE_CHANNELS) * TENSOR_CORE_CHANNELS


def _pad_maps(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, _padded(x.shape[1]) - x.shape[1])).contiguous(memory_format=torch.channels_last)


def _spread(values: Tensor, dim: int, places: Tensor, size: int) -> Tensor:
    """Zeros of `size` along `dim`, with the values at their places."""
    shape = [*values.shape[:dim], size, *values.shape[dim + 1 :]]
    return values.new_zeros(shape).index_copy(dim, places, values)

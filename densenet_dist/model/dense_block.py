"""The reference form of the dense block (Huang et al. 2017, sec. 3), differentiated by autograd."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

NormFactory = Callable[[int], nn.BatchNorm2d]
"""Builds a batch normalization for a number of channels, with the network's momentum and epsilon."""


class DenseLayer(nn.Sequential):
    """Compute ``growth_rate`` new channels from all channels so far: BN-ReLU-conv3x3, or with a bottleneck before it.

    The bottleneck is BN-ReLU-conv1x1. Dropout follows each convolution, as in the paper's Torch code (so twice with a
    bottleneck; torchvision applies it after the second convolution only).

    Shape: (N, in_channels, H, W) -> (N, growth_rate, H, W), floating point, in the input's memory format.

    Args:
        in_channels: input channels.
        growth_rate: output channels (k).
        bn_size: width of the bottleneck in units of the growth rate (4 in the paper); None: no bottleneck.
        drop_rate: probability of dropout in training.
        norm: builds the batch normalizations.
    """

    def __init__(
        self, in_channels: int, growth_rate: int, *, bn_size: int | None, drop_rate: float, norm: NormFactory
    ) -> None:
        super().__init__()
        if bn_size is None:
            widths, kernel_sizes = [in_channels, growth_rate], [3]
        else:
            widths, kernel_sizes = [in_channels, bn_size * growth_rate, growth_rate], [1, 3]
        for i, kernel_size in enumerate(kernel_sizes, start=1):
            self.add_module(f"norm{i}", norm(widths[i - 1]))
            self.add_module(f"relu{i}", nn.ReLU(inplace=True))
            conv = nn.Conv2d(widths[i - 1], widths[i], kernel_size, padding=kernel_size // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            if drop_rate > 0:
                self.add_module(f"drop{i}", nn.Dropout(drop_rate))


class DenseBlock(nn.ModuleDict):
    """Concatenate the input with the output of each layer, which reads all channels before it.

    Shape: (N, in_channels, H, W) -> (N, in_channels + num_layers * growth_rate, H, W), floating point, in the input's
    memory format. The input's channels come first, then each layer's.

    Args:
        num_layers: number of layers.
        in_channels: input channels.
        growth_rate: channels that each layer adds (k).
        bn_size, drop_rate, norm: see :class:`DenseLayer`.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        in_channels: int,
        growth_rate: int,
        bn_size: int | None,
        drop_rate: float,
        norm: NormFactory,
    ) -> None:
        super().__init__()
        for i in range(num_layers):
            width = in_channels + i * growth_rate
            self[f"denselayer{i + 1}"] = DenseLayer(width, growth_rate, bn_size=bn_size, drop_rate=drop_rate, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers in order."""
        for layer in self.values():
            x = torch.cat((x, layer(x)), dim=1)
        return x

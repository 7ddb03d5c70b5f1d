"""The dense block (Huang et al. 2017, sec. 3) in its reference form: the definition, for autograd to differentiate."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

NormFactory = Callable[[int], nn.BatchNorm2d]
"""Makes the batch normalisation of a number of channels, with the net's own momentum and epsilon."""


class DenseLayer(nn.Sequential):
    """Makes ``growth_rate`` new maps of all maps so far: BN-ReLU-conv3x3, with a bottleneck BN-ReLU-conv1x1 before it.

    Each convolution is followed by dropout when there is any, as in the paper's own Torch code (with a bottleneck
    twice a layer; torchvision has it after the second convolution only).

    Input (N, in_channels, H, W), output (N, growth_rate, H, W), floating point, the input's memory format.

    Args:
        in_channels: maps read.
        growth_rate: maps made (k).
        bn_size: the bottleneck's width in units of the growth rate (4 in the paper); None leaves it out.
        drop_rate: probability of an activation to be zeroed in training.
        norm: makes the batch normalisations.
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
    """The reference form: each layer's input is concatenated, everything else is left to autograd.

    Input (N, in_channels, H, W), output (N, in_channels + num_layers * growth_rate, H, W): the input's maps first, then
    each layer's in order. Floating point, the input's memory format.

    Args:
        num_layers: layers in the block.
        in_channels: maps entering the block.
        growth_rate: maps each layer adds (k).
        bn_size: see :class:`DenseLayer`.
        drop_rate: see :class:`DenseLayer`.
        norm: see :class:`DenseLayer`.
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
        """Run the layers in order; see the class for shapes."""
        for layer in self.values():
            x = torch.cat((x, layer(x)), dim=1)
        return x

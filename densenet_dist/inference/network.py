"""A trained net as one program: grey levels in, logits out. Every exported format holds this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from densenet_dist.inference.header import Header, architecture_of
from densenet_dist.model import DenseNet


class Network(nn.Module):
    """Normalises images and classifies them.

    Input (N, 3, H, W) float32 in grey levels, 0 to 255, RGB; output (N, classes) float32 logits. The net computes in
    its weights' dtype; in bfloat16 its batch normalisations keep float32 parameters (`to_bfloat16`).

    Args:
        model: the trained net.
        mean, std: by which images in [0, 1] are normalised.
    """

    model: DenseNet
    scale: Tensor
    shift: Tensor

    def __init__(self, model: DenseNet, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        # To the last bit the numbers of data.torch_loader.TorchEngine, and two roundings as there.
        levels = 255.0 * np.asarray(std, dtype=np.float64)
        for name, values in (("scale", 1.0 / levels), ("shift", -255.0 * np.asarray(mean, dtype=np.float64) / levels)):
            self.register_buffer(name, torch.from_numpy(values.astype(np.float32)).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Classify; see the class."""
        images = pixels * self.scale + self.shift
        first = next(self.model.parameters())
        logits: Tensor = self.model(images.to(first.dtype))
        return logits.float()


def to_bfloat16(model: DenseNet) -> DenseNet:
    """Make the weights of all convolutions and linear layers bfloat16, in place; batch normalisations stay float32."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(torch.bfloat16)
    return model


def empty_net(header: Header) -> DenseNet:
    """The net of a header, in the reference form, without memory for its weights: a file must bring it."""
    architecture = replace(architecture_of(header), block="reference", init="torchvision")
    with torch.device("meta"):
        model = DenseNet(architecture)
    if header.precision == "bf16":
        to_bfloat16(model)
    return model

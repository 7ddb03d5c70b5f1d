"""Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): which parts of an image a network's decision depends on."""

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densenet_dist.model.densenet import DenseNet


def has_heat_maps(model: nn.Module) -> TypeGuard[DenseNet]:
    """Return whether heat maps say something: the last maps of a DenseNet, not of a subclass, exceed one pixel."""
    return type(model) is DenseNet and model.architecture.block_sides()[-1] > 1


def grad_cam(model: DenseNet, images: Tensor, labels: Tensor) -> Tensor:
    """Compute heat maps from the feature maps of the last dense block.

    Args:
        model: in evaluation mode.
        images: (N, in_channels, H, W), normalized, as for `model`.
        labels: (N,) int64, the class to explain for each image.

    Returns:
        (N, h, w) float32 from 0 to 1, of the size of the feature maps; all 0 where nothing supports the class.
    """
    with torch.no_grad():
        maps = model.features(images.contiguous(memory_format=torch.channels_last))
    with torch.enable_grad():
        maps = maps.detach().requires_grad_()
        logits = model.classify(maps).gather(1, labels[:, None].to(maps.device))
        (gradient,) = torch.autograd.grad(logits.sum(), maps)
    weights = gradient.mean(dim=(2, 3), keepdim=True)  # eq. 1
    heat = F.relu((weights * maps.detach()).sum(1)).float()  # eq. 2
    return heat / heat.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

"""Batch normalization over the global batch, on CPUs too: `torch.nn.SyncBatchNorm` supports GPUs only."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce  # differentiable: gradients are summed over ranks

from densenet_dist.errors import ConfigError


def synchronize_batchnorm(model: nn.Module) -> nn.Module:
    """Make all batch norms of `model` compute statistics over all ranks, in place. The state dict does not change.

    Raises:
        ConfigError: a custom model on CPUs has batch norms other than 2D ones with weights and running statistics.
    """
    if next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if type(module) is not nn.BatchNorm2d or None in (module.weight, module.running_mean, module.momentum):
                raise ConfigError(f"train.sync_bn: {module} of a custom model cannot be synchronized on CPUs")
            module.__class__ = SyncBatchNorm
    return model


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch normalization over all ranks on CPUs (gloo). Ranks may have different numbers of images.

    Not a subclass of `torch.nn.SyncBatchNorm`, which DDP rejects on CPUs.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, H, W) with the statistics of all ranks, in evaluation mode with the running ones."""
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        x = input.float()
        count = torch.tensor([x.numel() / x.shape[1]], dtype=torch.float64)
        dist.all_reduce(count)
        total = float(count)
        mean: Tensor = all_reduce(x.sum((0, 2, 3)), group=None) / total
        centered = x - mean[:, None, None]
        variance: Tensor = all_reduce(centered.square().sum((0, 2, 3)), group=None) / total
        self._update_running(mean.detach(), variance.detach() * (total / max(total - 1, 1)))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias[:, None, None], centered, scale[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased_variance, self.momentum)
        self.num_batches_tracked.add_(1)

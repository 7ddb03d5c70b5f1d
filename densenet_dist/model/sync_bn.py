"""BatchNorm over the global batch. torch's own `SyncBatchNorm` computes on GPUs only; this adds the CPU."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce  # its gradient is the sum of the ranks' gradients


def synchronise_batchnorm(model: nn.Module) -> nn.Module:
    """Make every BatchNorm of `model` one over all ranks, in place; parameters and state dict stay the same."""
    if next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm
    return model


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over all ranks' images on CPUs (gloo), for unequal shares of the batch as well.

    Not a kind of `torch.nn.SyncBatchNorm`: DDP refuses those on a CPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (n, C, H, W) by the statistics of all ranks' n together; in eval mode by the running ones."""
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        x = input.float()
        count = torch.tensor([x.numel() / x.shape[1]], dtype=torch.float64)
        dist.all_reduce(count)
        total = float(count)
        mean: Tensor = all_reduce(x.sum((0, 2, 3)), group=None) / total
        centred = x - mean[:, None, None]
        variance: Tensor = all_reduce(centred.square().sum((0, 2, 3)), group=None) / total
        self._update_running(mean.detach(), variance.detach() * (total / max(total - 1, 1)))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias[:, None, None], centred, scale[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased_variance, self.momentum)
        self.num_batches_tracked.add_(1)

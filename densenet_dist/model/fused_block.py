"""The fused form of the dense block: the reference form's parameters, computed by `densenet_dist.model.fused`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # base class of BatchNorm2d and both SyncBatchNorms

from densenet_dist.model.dense_block import DenseBlock
from densenet_dist.model.fused.operator import dense_block
from densenet_dist.model.fused.types import empty_maps
from densenet_dist.model.kernels import unavailable
from densenet_dist.model.sync_bn import SyncBatchNorm


class FusedDenseBlock(DenseBlock):
    """Compute the same function as `DenseBlock` in memory linear in depth and without concatenations.

    Shapes and state dict are those of the reference form. `forward` also takes the modules after the block, a batch
    norm and a 1x1 convolution, so that BN-ReLU(-conv) of all its channels is part of the same operator.

    Hooks on the modules inside are not called. Under ``torch.autocast`` feature maps have its dtype. Second derivatives
    are not supported. Without fast kernels for the device the reference form is used, with a warning.

    Raises:
        ValueError: in training mode with one value per channel, as PyTorch's batch norm does.
    """

    def forward(self, x: Tensor, norm: BatchNorm | None = None, conv: nn.Conv2d | None = None) -> Tensor:
        """Run the layers, then `norm`, ReLU and `conv` if they are given; see the class."""
        modules = [module for layer in self.values() for module in layer.children()]
        norms = [module for module in modules if isinstance(module, BatchNorm)]
        convs = [module for module in modules if isinstance(module, nn.Conv2d)]
        drops = [module for module in modules if isinstance(module, nn.Dropout)]
        bottleneck = len(convs) == 2 * len(self)
        if norm is not None:
            norms.append(norm)
        if conv is not None:
            convs.append(conv)
        if _falls_back(x.device.type) or not _is_supported(norms, drops):
            return self._forward_reference(x, norm, conv)
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = x.contiguous(memory_format=torch.channels_last)
        training = [bn.training for bn in norms]
        values, synchronized = x.numel() // x.shape[1], any(training) and _is_synchronized(norms[0])
        if any(training) and values == 1 and not synchronized:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        drop_rate = drops[0].p if drops and drops[0].training else 0.0
        maps, out, mean, var, _, count = dense_block(
            x,
            [bn.weight for bn in norms],
            [bn.bias for bn in norms],
            [module.weight for module in convs],
            [stat for bn in norms if not bn.training for stat in (bn.running_mean, bn.running_var)],
            list(_dropout_masks(x, convs, drops)),
            1 - drop_rate,
            training,
            [bn.eps for bn in norms],
            bottleneck,
            norm is not None,
            synchronized,
            torch.is_grad_enabled(),
        )
        if any(training):
            counts = [bn.num_batches_tracked for bn in norms if bn.training]
            torch._foreach_add_(counts, 1)  # type: ignore[arg-type]
        if any(training) and (values > 0 or synchronized):  # like PyTorch, learn nothing from an empty batch
            # Running variances are unbiased: times M / (M - 1), the same factor for every channel of the block. A
            # channel is read by many batch norms, so it is scaled here: 1 operation per block instead of 1 per norm.
            unbias = count / (count - 1) if synchronized else values / (values - 1)
            with torch.no_grad():
                _update_running_statistics(norms, bottleneck, mean, (var * unbias).to(var.dtype))
        result: Tensor = maps if norm is None else out
        return result

    def _forward_reference(self, x: Tensor, norm: BatchNorm | None, conv: nn.Conv2d | None) -> Tensor:
        x = super().forward(x)
        x = x if norm is None else F.relu(norm(x), inplace=True)
        return x if conv is None else conv(x)


def _dropout_masks(x: Tensor, convs: list[nn.Conv2d], drops: list[nn.Dropout]) -> Iterator[Tensor]:
    """Draw the masks that the reference form would draw from the same state of the generator."""
    for conv, drop in zip(convs, drops, strict=False):
        if drop.training and drop.p > 0:
            ones = empty_maps(x, conv.out_channels).fill_(1)
            yield F.dropout(ones, drop.p, training=True).bool()


def _is_supported(norms: list[BatchNorm], drops: list[nn.Dropout]) -> bool:
    """Return whether the operator can replace the modules. It can unless a user has changed them."""
    first = norms[0]
    alike = all(type(bn) is type(first) and bn.momentum == first.momentum for bn in norms)
    plain = all(bn.affine and bn.track_running_stats and bn.running_mean is not None for bn in norms)
    rates = {drop.p if drop.training else 0.0 for drop in drops}
    group = getattr(first, "process_group", None)
    return alike and plain and first.momentum is not None and len(rates) <= 1 and group in (None, dist.group.WORLD)


def _is_synchronized(norm: BatchNorm) -> bool:
    """Return whether statistics are those of all ranks."""
    kinds = (SyncBatchNorm, nn.SyncBatchNorm)
    return isinstance(norm, kinds) and dist.is_initialized() and dist.get_world_size() > 1


def _update_running_statistics(norms: list[BatchNorm], bottleneck: bool, mean: Tensor, unbiased_var: Tensor) -> None:
    """Move the running statistics toward those of the batch, in one multi-tensor operation.

    Args:
        norms: those in training mode are updated.
        bottleneck: whether the norm of a bottleneck follows that of each layer's input.
        mean: of the bottlenecks, layer after layer, then of the buffer, of which a norm reads the first channels.
        unbiased_var: likewise.
    """
    running: list[Tensor] = []
    batch: list[Tensor] = []
    width = norms[1].num_features if bottleneck else 0
    buffer_start = len(norms) // 2 * width
    for i, bn in enumerate(norms):
        if not bn.training:
            continue
        start = i // 2 * width if bottleneck and i % 2 == 1 else buffer_start
        assert bn.running_mean is not None
        assert bn.running_var is not None
        running += [bn.running_mean, bn.running_var]
        batch += [stat[start : start + bn.num_features].to(bn.running_mean.dtype) for stat in (mean, unbiased_var)]
    momentum = norms[0].momentum
    assert momentum is not None
    torch._foreach_lerp_(running, batch, momentum)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's
def _falls_back(device_type: str) -> bool:
    """Return whether a device has no fast kernels; warn the first time."""
    reason = unavailable(device_type)
    if reason is not None:
        _warn_once(f"model.block: the reference form is used, not the fused one: {reason}")
    return reason is not None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)

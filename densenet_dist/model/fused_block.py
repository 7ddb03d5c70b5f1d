"""The fused form of the dense block: the reference form's parameters, computed by `densenet_dist.model.fused`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # base class of BatchNorm2d and both SyncBatchNorms

from densenet_dist.model.dense_block import DenseBlock
from densenet_dist.model.fused.operator import dense_block
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
        modules = self._modules_in_order(norm, conv)
        if _falls_back(x.device.type) or not _is_supported(modules):
            return self._forward_reference(x, norm, conv)
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = x.contiguous(memory_format=torch.channels_last)
        training = [bn.training for bn in modules.norms]
        values, synchronised = x.numel() // x.shape[1], any(training) and _is_synchronised(modules)
        if any(training) and values == 1 and not synchronised:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        drop_rate = modules.drops[0].p if modules.drops and modules.drops[0].training else 0.0
        maps, out, mean, var, _, inner_mean, inner_var, count = dense_block(
            x,
            [bn.weight for bn in modules.norms],
            [bn.bias for bn in modules.norms],
            [module.weight for module in modules.convs],
            [stat for bn in modules.norms if not bn.training for stat in (bn.running_mean, bn.running_var)],
            list(self._dropout_masks(x, modules)),
            training,
            [bn.eps for bn in modules.norms],
            modules.bottleneck,
            norm is not None,
            1 - drop_rate,
            synchronised,
            torch.is_grad_enabled(),
        )
        if any(training):
            counts = [bn.num_batches_tracked for bn in modules.norms if bn.training]
            torch._foreach_add_(counts, 1)  # type: ignore[arg-type]
        if any(training) and (values > 0 or synchronised):  # like PyTorch, learn nothing from an empty batch
            # Running variances are unbiased: times M / (M - 1), the same factor for every channel of the block. A
            # channel is read by many batch norms, so it is scaled here, once: 2 operations per block instead of 1 per
            # norm.
            unbias = count / (count - 1) if synchronised else values / (values - 1)
            with torch.no_grad():
                outer, inner = (mean, (var * unbias).to(var.dtype)), (inner_mean, (inner_var * unbias).to(var.dtype))
                _update_running_statistics(modules, outer, inner)
        result: Tensor = maps if norm is None else out
        return result

    def _modules_in_order(self, norm: BatchNorm | None, conv: nn.Conv2d | None) -> _Modules:
        modules = [module for layer in self.values() for module in layer.children()]
        norms = [module for module in modules if isinstance(module, BatchNorm)]
        convs = [module for module in modules if isinstance(module, nn.Conv2d)]
        drops = [module for module in modules if isinstance(module, nn.Dropout)]
        bottleneck = len(convs) == 2 * len(self)
        return _Modules(norms + [n for n in (norm,) if n], convs + [c for c in (conv,) if c], drops, bottleneck)

    def _dropout_masks(self, x: Tensor, modules: _Modules) -> Iterator[Tensor]:
        """Draw the masks that the reference form would draw from the same state of the generator."""
        n, _, height, width = x.shape
        for conv, drop in zip(modules.convs, modules.drops, strict=False):
            if drop.training and drop.p > 0:
                ones = torch.ones((n, conv.out_channels, height, width), dtype=x.dtype, device=x.device)
                ones = ones.contiguous(memory_format=torch.channels_last)
                yield F.dropout(ones, drop.p, training=True).bool()

    def _forward_reference(self, x: Tensor, norm: BatchNorm | None, conv: nn.Conv2d | None) -> Tensor:
        x = super().forward(x)
        x = x if norm is None else F.relu(norm(x), inplace=True)
        return x if conv is None else conv(x)


class _Modules(NamedTuple):
    """The modules of a block and its tail, in the order of the operator's units."""

    norms: list[BatchNorm]
    convs: list[nn.Conv2d]
    drops: list[nn.Dropout]
    bottleneck: bool


def _is_supported(modules: _Modules) -> bool:
    """Return whether the operator can replace the modules. It can unless a user has changed them."""
    first = modules.norms[0]
    alike = all(type(bn) is type(first) and bn.momentum == first.momentum for bn in modules.norms)
    plain = all(bn.affine and bn.track_running_stats and bn.running_mean is not None for bn in modules.norms)
    rates = {drop.p if drop.training else 0.0 for drop in modules.drops}
    group = getattr(first, "process_group", None)
    return alike and plain and first.momentum is not None and len(rates) <= 1 and group in (None, dist.group.WORLD)


def _is_synchronised(modules: _Modules) -> bool:
    """Return whether statistics are those of all ranks."""
    kinds = (SyncBatchNorm, nn.SyncBatchNorm)
    return isinstance(modules.norms[0], kinds) and dist.is_initialized() and dist.get_world_size() > 1


def _update_running_statistics(modules: _Modules, outer: tuple[Tensor, Tensor], inner: tuple[Tensor, Tensor]) -> None:
    """Move the running statistics towards those of the batch, in one multi-tensor operation.

    Args:
        modules: whose batch norms in training mode are updated.
        outer: mean and unbiased variance of the buffer's channels, of which a norm reads the first ones.
        inner: mean and unbiased variance of all bottlenecks, one after another: with a width of 8, the second norm of
            layer index 2 reads channels 16:24.
    """
    running: list[Tensor] = []
    batch: list[Tensor] = []
    width = modules.norms[1].num_features if modules.bottleneck else 0
    for i, bn in enumerate(modules.norms):
        if not bn.training:
            continue
        is_inner = modules.bottleneck and i % 2 == 1
        start = i // 2 * width if is_inner else 0
        mean, var = (stat[start : start + bn.num_features] for stat in (inner if is_inner else outer))
        assert bn.running_mean is not None
        assert bn.running_var is not None
        running += [bn.running_mean, bn.running_var]
        batch += [mean.to(bn.running_mean.dtype), var.to(bn.running_var.dtype)]
    momentum = modules.norms[0].momentum
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

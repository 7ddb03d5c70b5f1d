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
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # BatchNorm2d, and both kinds that are synchronised

from densenet_dist.model.dense_block import DenseBlock
from densenet_dist.model.fused.operator import dense_block
from densenet_dist.model.kernels.choice import unavailable
from densenet_dist.model.sync_bn import SyncBatchNorm


class FusedDenseBlock(DenseBlock):
    """The same function as `DenseBlock`, of the same state dict, in memory linear in depth and without copies.

    Input (N, in_channels, H, W) and output are those of the reference form. With a `norm`, and perhaps a 1x1 `conv`,
    it goes on to what follows a block, without copies there either: BN-ReLU, or BN-ReLU-convolution, of all maps.

    Hooks on the modules inside are not called. Under ``torch.autocast`` maps are of its type. The gradient cannot be
    differentiated again.

    Raises:
        ValueError: in training, where a batch normalisation has one value a channel only, as PyTorch does.
    """

    def forward(self, x: Tensor, norm: BatchNorm | None = None, conv: nn.Conv2d | None = None) -> Tensor:
        """Run the layers, then `norm`, ReLU and `conv` where they are given; see the class."""
        parts = self._parts(norm, conv)
        if _falls_back(x.device.type) or not _usual(parts):
            return self._as_reference(x, norm, conv)
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = x.contiguous(memory_format=torch.channels_last)
        training = [bn.training for bn in parts.norms]
        values, synchronised = x.numel() // x.shape[1], any(training) and _synchronised(parts)
        if any(training) and values == 1 and not synchronised:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        drop_rate = parts.drops[0].p if parts.drops and parts.drops[0].training else 0.0
        maps, out, mean, var, _, inner_mean, inner_var, count = dense_block(
            x,
            [bn.weight for bn in parts.norms],
            [bn.bias for bn in parts.norms],
            [module.weight for module in parts.convs],
            [stat for bn in parts.norms if not bn.training for stat in (bn.running_mean, bn.running_var)],
            list(self._masks(x, parts)),
            training,
            [bn.eps for bn in parts.norms],
            parts.bottleneck,
            norm is not None,
            1 - drop_rate,
            synchronised,
            torch.is_grad_enabled(),
        )
        if any(training):
            counts = [bn.num_batches_tracked for bn in parts.norms if bn.training]
            torch._foreach_add_(counts, 1)  # type: ignore[arg-type]
        if any(training) and (values > 0 or synchronised):  # as PyTorch's, it learns nothing from no images
            unbias = count / (count - 1) if synchronised else values / (values - 1)
            with torch.no_grad():
                outer, inner = (mean, (var * unbias).to(var.dtype)), (inner_mean, (inner_var * unbias).to(var.dtype))
                _update_running(parts, outer, inner)
        made: Tensor = maps if norm is None else out
        return made

    def _parts(self, norm: BatchNorm | None, conv: nn.Conv2d | None) -> _Parts:
        modules = [module for layer in self.values() for module in layer.children()]
        norms = [module for module in modules if isinstance(module, BatchNorm)]
        convs = [module for module in modules if isinstance(module, nn.Conv2d)]
        drops = [module for module in modules if isinstance(module, nn.Dropout)]
        bottleneck = len(convs) == 2 * len(self)
        return _Parts(norms + [n for n in (norm,) if n], convs + [c for c in (conv,) if c], drops, bottleneck)

    def _masks(self, x: Tensor, parts: _Parts) -> Iterator[Tensor]:
        """What dropout keeps: the masks that the reference form would draw from the same state of the generator."""
        for conv, drop in zip(parts.convs, parts.drops, strict=False):
            if drop.training and drop.p > 0:
                yield _dropout_mask(x, conv.out_channels, drop.p)

    def _as_reference(self, x: Tensor, norm: BatchNorm | None, conv: nn.Conv2d | None) -> Tensor:
        x = super().forward(x)
        x = x if norm is None else F.relu(norm(x), inplace=True)
        return x if conv is None else conv(x)


class _Parts(NamedTuple):
    """The modules of a block and of what follows it, in the order of the operator's units."""

    norms: list[BatchNorm]
    convs: list[nn.Conv2d]
    drops: list[nn.Dropout]
    bottleneck: bool


def _usual(parts: _Parts) -> bool:
    """Whether the operator can stand in for them; what this project builds always is."""
    first = parts.norms[0]
    alike = all(type(bn) is type(first) and bn.momentum == first.momentum for bn in parts.norms)
    plain = all(bn.affine and bn.track_running_stats and bn.running_mean is not None for bn in parts.norms)
    rates = {drop.p if drop.training else 0.0 for drop in parts.drops}
    group = getattr(first, "process_group", None)
    return alike and plain and first.momentum is not None and len(rates) <= 1 and group in (None, dist.group.WORLD)


def _synchronised(parts: _Parts) -> bool:
    """Whether statistics are those of all ranks."""
    kinds = (SyncBatchNorm, nn.SyncBatchNorm)
    return isinstance(parts.norms[0], kinds) and dist.is_initialized() and dist.get_world_size() > 1


def _update_running(parts: _Parts, outer: tuple[Tensor, Tensor], inner: tuple[Tensor, Tensor]) -> None:
    """Follow the batch: `outer` mean and unbiased variance of all maps, `inner` of those within layers, one by one."""
    running: list[Tensor] = []
    batch: list[Tensor] = []
    width = parts.norms[1].num_features if parts.bottleneck else 0
    for number, bn in enumerate(parts.norms):
        if not bn.training:
            continue
        is_inner = parts.bottleneck and number % 2 == 1 and number // 2 * width < len(inner[0])
        start = number // 2 * width if is_inner else 0
        mean, var = (stat[start : start + bn.num_features] for stat in (inner if is_inner else outer))
        assert bn.running_mean is not None
        assert bn.running_var is not None
        running += [bn.running_mean, bn.running_var]
        batch += [mean.to(bn.running_mean.dtype), var.to(bn.running_var.dtype)]
    momentum = parts.norms[0].momentum
    assert momentum is not None
    torch._foreach_lerp_(running, batch, momentum)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's
def _falls_back(device_type: str) -> bool:
    """Whether there are no fast kernels for a device; says so the first time."""
    reason = unavailable(device_type)
    if reason is not None:
        _warn_once(f"model.block: the reference form is used, not the fused one: {reason}")
    return reason is not None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _dropout_mask(x: Tensor, channels: int, drop_rate: float) -> Tensor:
    n, _, height, width = x.shape
    shape = (n, channels, height, width)
    like = torch.ones(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=torch.channels_last)
    return F.dropout(like, drop_rate, training=True).bool()

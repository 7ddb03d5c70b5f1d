"""The fused dense block as two PyTorch operators: ``densenet_dist::dense_block`` and its gradient.

As operators they are one node of the autograd graph, and one of a compiled or exported program. Random numbers and
running statistics are handled outside, so both are pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from densenet_dist.model.fused.backward import BackwardPass
from densenet_dist.model.fused.forward import run_forward
from densenet_dist.model.fused.types import BlockSpec, empty_buffer, empty_maps, empty_statistics
from densenet_dist.model.kernels import choose_kernels
from densenet_dist.model.kernels.interface import Dropout, Statistics, accumulation_type


@torch.library.custom_op("densenet_dist::dense_block", mutates_args=())
def dense_block(
    x: Tensor,
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weights: Sequence[Tensor],
    frozen: Sequence[Tensor],
    masks: Sequence[Tensor],
    keep: float,
    training: Sequence[bool],
    eps: Sequence[float],
    bottleneck: bool,
    tail: bool,
    synchronized: bool,
    keep_bottlenecks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """Run a dense block. Lists have one element per unit, a BN-ReLU with the convolution after it: see `Unit`.

    Args:
        x: (N, C, H, W), channels_last; the convolutions compute in its dtype.
        gammas: scales of the batch normalizations.
        betas: their shifts.
        weights: of the convolutions; the tail may have none.
        frozen: running mean and variance of the units in evaluation mode, one unit after another.
        masks: bool (N, K, H, W), channels_last: what dropout keeps after each convolution but the tail's; may be empty.
        keep: probability that dropout keeps a value.
        training: whether each unit uses the statistics of the batch.
        eps: of each batch normalization.
        bottleneck: whether layers have two units.
        tail: whether the last unit is a tail.
        synchronized: whether statistics are those of all ranks.
        keep_bottlenecks: whether a backward pass may follow.

    Returns:
        The maps, (N, C + L k, H, W): x, then each layer's output; the tail's output, empty without a tail; mean and
        variance of the bottlenecks, layer after layer, then of the maps, empty if no unit is in training mode; with
        `keep_bottlenecks` the output of each layer's bottleneck; the number of values of each statistic, (1,) if
        synchronized, else empty.
    """
    block = BlockSpec(gammas, betas, weights, frozen, training, eps, bottleneck, tail, synchronized)
    with torch.autocast(x.device.type, enabled=False):
        kernels = choose_kernels(x.device, x.dtype, x.numel())
        return run_forward(kernels, block, x, _dropouts(masks, keep), keep_bottlenecks)


@torch.library.custom_op("densenet_dist::dense_block_backward", mutates_args=())
def dense_block_backward(
    gradient: Tensor,
    maps: Tensor,
    mean: Tensor,
    var: Tensor,
    bottlenecks: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weights: Sequence[Tensor],
    frozen: Sequence[Tensor],
    masks: Sequence[Tensor],
    keep: float,
    training: Sequence[bool],
    eps: Sequence[float],
    bottleneck: bool,
    tail: bool,
    synchronized: bool,
    need_x: bool,
    need_weights: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute the gradients of `dense_block`. The other arguments are the arguments and results of `dense_block`.

    Args:
        gradient: with respect to the tail's output, or without a tail to the maps.
        need_x: whether the gradient of x is needed.
        need_weights: whether the gradient of each weight is needed.

    Returns:
        The gradients of x, (N, C, H, W), empty if it is not needed; of all betas and of all gammas, one unit after
        another, (2, channels of all units), accumulation dtype; of the weights that need one.
    """
    block = BlockSpec(gammas, betas, weights, frozen, training, eps, bottleneck, tail, synchronized)
    with torch.autocast(maps.device.type, enabled=False):
        kernels = choose_kernels(maps.device, maps.dtype, maps.numel())
        dropouts = _dropouts(masks, keep)
        backward = BackwardPass(kernels, block, maps, Statistics(mean, var), bottlenecks, dropouts, need_weights)
        return backward.run(gradient.contiguous(memory_format=torch.channels_last), need_x)


def _dropouts(masks: Sequence[Tensor], keep: float) -> list[Dropout]:
    # A compiled program may have given them another layout.
    return [Dropout(mask.contiguous(memory_format=torch.channels_last), keep) for mask in masks]


# The fake implementations return empty tensors of the right shapes, dtypes and strides. `settings` are the operator's
# remaining arguments, from `training` on.


@dense_block.register_fake
def _dense_block_fake(
    x: Tensor, gammas: Sequence[Tensor], betas: Sequence[Tensor], weights: Sequence[Tensor], frozen: Sequence[Tensor],
    masks: Sequence[Tensor], keep: float, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], Tensor]:  # fmt: skip
    *settings, keep_bottlenecks = settings  # type: ignore[assignment]
    block = BlockSpec(gammas, betas, weights, frozen, *settings)
    width, narrow = block.widths[-1], block.bottleneck_width
    statistics = empty_statistics(block.buffer_start + width if block.in_training else 0, x)
    bottlenecks = [empty_maps(x, narrow) for _ in block.layers] if narrow and keep_bottlenecks else []
    out = empty_maps(x, block.tail.out_channels) if block.tail else x.new_empty(0)
    count = x.new_empty(1 if block.synchronized else 0, dtype=torch.float64)
    return empty_buffer(x, width), out, *statistics, bottlenecks, count


@dense_block_backward.register_fake
def _dense_block_backward_fake(
    gradient: Tensor, maps: Tensor, mean: Tensor, var: Tensor, bottlenecks: Sequence[Tensor],
    gammas: Sequence[Tensor], betas: Sequence[Tensor], weights: Sequence[Tensor], *settings: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    *_, need_x, need_weights = settings
    d_x = empty_maps(maps, gammas[0].numel()) if need_x else maps.new_empty(0)
    d_norms = maps.new_empty((2, sum(gamma.numel() for gamma in gammas)), dtype=accumulation_type(maps.dtype))
    d_weights = [torch.empty_like(weight) for weight, needed in zip(weights, need_weights, strict=True) if needed]
    return d_x, d_norms, d_weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, gammas, betas, weights, frozen, masks, *settings, _ = inputs
    maps, _, mean, var, bottlenecks, _ = output
    groups = ([maps, mean, var], bottlenecks, gammas, betas, weights, frozen, masks)
    ctx.save_for_backward(*(tensor for group in groups for tensor in group))
    ctx.lengths, ctx.settings = [len(group) for group in groups], settings
    ctx.set_materialize_grads(False)  # no zeros for outputs that the loss does not use, as large as the maps


def _backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    (maps, mean, var), *groups = [[saved.pop(0) for _ in range(length)] for length in ctx.lengths]
    bottlenecks, gammas, betas, weights, frozen, masks = groups
    *_, tail, _ = ctx.settings
    gradient = gradients[1] if tail else gradients[0]
    need_x, need_gammas, need_betas, need_weights = ctx.needs_input_grad[:4]
    rest = ([None] * len(frozen), [None] * len(masks), *[None] * 7)
    if gradient is None:
        return None, [None] * len(gammas), [None] * len(gammas), [None] * len(weights), *rest
    d_x, d_norms, d_weights = dense_block_backward(
        gradient,
        maps,
        mean,
        var,
        bottlenecks,
        gammas,
        betas,
        weights,
        frozen,
        masks,
        *ctx.settings,
        need_x,
        need_weights,
    )
    sizes = [gamma.numel() for gamma in gammas]
    d_betas, d_gammas = (
        [part.to(p.dtype) if need else None for part, p, need in zip(row.split(sizes), of, needs, strict=True)]
        for row, of, needs in zip(d_norms, (betas, gammas), (need_betas, need_gammas), strict=True)
    )
    remaining = iter(d_weights)
    all_weights = [next(remaining) if need else None for need in need_weights]
    return d_x if need_x else None, d_gammas, d_betas, all_weights, *rest


dense_block.register_autograd(_backward, setup_context=_setup_context)

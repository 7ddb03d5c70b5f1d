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
from densenet_dist.model.fused.reduction import Reduction
from densenet_dist.model.fused.types import BlockSpec, ForwardResult, Statistics, Unit, empty_buffer, empty_maps
from densenet_dist.model.kernels import choose_kernels
from densenet_dist.model.kernels.interface import accumulation_type


@torch.library.custom_op("densenet_dist::dense_block", mutates_args=())
def dense_block(
    x: Tensor,
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weights: Sequence[Tensor],
    frozen: Sequence[Tensor],
    masks: Sequence[Tensor],
    training: Sequence[bool],
    eps: Sequence[float],
    bottleneck: bool,
    tail: bool,
    keep: float,
    synchronised: bool,
    keep_inner: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """Run a dense block. Lists have one element per unit, a BN-ReLU with the convolution after it: see `Unit`.

    Args:
        x: (N, C, H, W), channels_last; the convolutions compute in its dtype.
        gammas: scales of the batch normalisations.
        betas: their shifts.
        weights: of the convolutions; the tail may have none.
        frozen: running mean and variance of the units in evaluation mode, one unit after another.
        masks: bool (N, K, H, W), channels_last: what dropout keeps after each convolution but the tail's; may be empty.
        training: whether each unit uses the statistics of the batch.
        eps: of each batch normalisation.
        bottleneck: whether layers have two units.
        tail: whether the last unit is a tail.
        keep: probability that dropout keeps a value.
        synchronised: whether statistics are those of all ranks.
        keep_inner: whether a backward pass may follow.

    Returns:
        The maps, (N, C + L k, H, W); the tail's output, empty without a tail; mean and variance of the maps, empty if
        no unit is in training mode; with `keep_inner` the outputs of each layer's bottleneck, and their mean and
        variance; the number of values of each statistic, (1,) if synchronised, else empty.
    """
    block = _block_spec(gammas, betas, weights, frozen, training, eps, bottleneck, tail, keep, synchronised)
    with torch.autocast(x.device.type, enabled=False):
        kernels = choose_kernels(x.device, x.dtype, x.numel())
        result = run_forward(kernels, block, x, _channels_last(masks), keep_inner)
        count = block.reduction.count(x.numel() // x.shape[1], x.device)
    out = x.new_empty(0) if result.out is None else result.out.contiguous(memory_format=torch.channels_last)
    return result.maps, out, *result.statistics, result.bottlenecks, *result.bottleneck_statistics, count


@torch.library.custom_op("densenet_dist::dense_block_backward", mutates_args=())
def dense_block_backward(
    gradient: Tensor,
    maps: Tensor,
    mean: Tensor,
    var: Tensor,
    inner: Sequence[Tensor],
    inner_mean: Tensor,
    inner_var: Tensor,
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    weights: Sequence[Tensor],
    frozen: Sequence[Tensor],
    masks: Sequence[Tensor],
    training: Sequence[bool],
    eps: Sequence[float],
    bottleneck: bool,
    tail: bool,
    keep: float,
    synchronised: bool,
    need_x: bool,
    need_weights: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Compute the gradients of `dense_block`. The other arguments are the arguments and results of `dense_block`.

    Args:
        gradient: with respect to the tail's output, or without a tail to the maps.
        need_x: whether the gradient of x is needed.
        need_weights: whether the gradient of each weight is needed.

    Returns:
        As `BackwardPass.run`, with an empty gradient of x if it is not needed.
    """
    block = _block_spec(gammas, betas, weights, frozen, training, eps, bottleneck, tail, keep, synchronised)
    result = ForwardResult(maps, None, Statistics(mean, var), list(inner), Statistics(inner_mean, inner_var))
    needs = [*need_weights, *[False] * (len(gammas) - len(weights))]
    with torch.autocast(maps.device.type, enabled=False):
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        kernels = choose_kernels(maps.device, maps.dtype, maps.numel())
        backward = BackwardPass(kernels, block, result, _channels_last(masks), needs)
        d_x, buffer_gradients, inner_gradients, d_weights = backward.run(gradient, need_x)
    return maps.new_empty(0) if d_x is None else d_x, buffer_gradients, inner_gradients, d_weights


def _channels_last(masks: Sequence[Tensor]) -> list[Tensor]:
    # A compiled program may have given them another layout.
    return [mask.contiguous(memory_format=torch.channels_last) for mask in masks]


def _block_spec(
    gammas: Sequence[Tensor], betas: Sequence[Tensor], weights: Sequence[Tensor], frozen: Sequence[Tensor],
    training: Sequence[bool], eps: Sequence[float], bottleneck: bool, tail: bool, keep: float, synchronised: bool,
) -> BlockSpec:  # fmt: skip
    pairs = iter(zip(frozen[::2], frozen[1::2], strict=True))
    weight_or_none = [*weights, *[None] * (len(gammas) - len(weights))]
    units = [
        Unit(gamma.detach(), beta.detach(), weight, epsilon, None if trains else next(pairs))
        for gamma, beta, weight, epsilon, trains in zip(gammas, betas, weight_or_none, eps, training, strict=True)
    ]
    last = units.pop() if tail else None
    step = 2 if bottleneck else 1
    layers = [tuple(units[i : i + step]) for i in range(0, len(units), step)]
    return BlockSpec(layers, last, keep, Reduction(synchronised))


# The fake implementations return empty tensors of the right shapes, dtypes and strides. `settings` are the operator's
# remaining arguments, from `training` on.


@dense_block.register_fake
def _dense_block_fake(
    x: Tensor, gammas: Sequence[Tensor], betas: Sequence[Tensor], weights: Sequence[Tensor], frozen: Sequence[Tensor],
    masks: Sequence[Tensor], *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    *settings, keep_inner = settings  # type: ignore[assignment]
    block = _block_spec(gammas, betas, weights, frozen, *settings)
    width, narrow = block.widths[-1], block.bottleneck_width
    stats = Statistics.empty(width if block.in_training else 0, x)
    inner_stats = Statistics.empty(narrow * len(block.layers) if block.in_training else 0, x)
    inner = [empty_maps(x, narrow) for _ in block.layers] if narrow and keep_inner else []
    out = empty_maps(x, block.tail.out_channels) if block.tail else x.new_empty(0)
    count = x.new_empty(1 if block.reduction.synchronised else 0, dtype=torch.float64)
    return empty_buffer(x, width), out, *stats, inner, *inner_stats, count


@dense_block_backward.register_fake
def _dense_block_backward_fake(
    gradient: Tensor, maps: Tensor, mean: Tensor, var: Tensor, inner: Sequence[Tensor], inner_mean: Tensor,
    inner_var: Tensor, gammas: Sequence[Tensor], betas: Sequence[Tensor], weights: Sequence[Tensor],
    frozen: Sequence[Tensor], masks: Sequence[Tensor], *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    *settings, need_x, need_weights = settings  # type: ignore[assignment]
    block = _block_spec(gammas, betas, weights, frozen, *settings)
    wide = accumulation_type(maps.dtype)
    d_x = empty_maps(maps, block.widths[0]) if need_x else maps.new_empty(0)
    buffer_gradients = maps.new_empty((len(block.buffer_units), 2, maps.shape[1]), dtype=wide)
    inner_gradients = maps.new_empty((len(inner), 2, block.bottleneck_width), dtype=wide)
    d_weights = [torch.empty_like(weight) for weight, needed in zip(weights, need_weights, strict=True) if needed]
    return d_x, buffer_gradients, inner_gradients, d_weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, gammas, betas, weights, frozen, masks, *settings, _ = inputs
    maps, _, mean, var, inner, inner_mean, inner_var, _ = output
    groups = ([maps], [mean, var], inner, [inner_mean, inner_var], gammas, betas, weights, frozen, masks)
    ctx.save_for_backward(*(tensor for group in groups for tensor in group))
    ctx.lengths, ctx.settings = [len(group) for group in groups], settings
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    groups = [[saved.pop(0) for _ in range(length)] for length in ctx.lengths]
    (maps,), (mean, var), inner, (inner_mean, inner_var), gammas, betas, weights, frozen, masks = groups
    _, _, _, tail, *_ = ctx.settings
    gradient = gradients[1] if tail else gradients[0]
    need_x, need_gammas, need_betas, need_weights = ctx.needs_input_grad[:4]
    rest = ([None] * len(frozen), [None] * len(masks), *[None] * 7)
    if gradient is None:
        return None, [None] * len(gammas), [None] * len(gammas), [None] * len(weights), *rest
    d_x, buffer_gradients, inner_gradients, d_weights = dense_block_backward(
        gradient, maps, mean, var, inner, inner_mean, inner_var, gammas, betas, weights, frozen, masks, *ctx.settings,
        need_x, need_weights,
    )  # fmt: skip
    # In order of the units: with bottlenecks, each layer's second unit comes after its first.
    by_unit = list(buffer_gradients)
    for i in reversed(range(len(inner))):
        by_unit.insert(i + 1, inner_gradients[i])
    remaining = iter(d_weights)
    d_betas, d_gammas = (
        [part[row, : len(p)].to(p.dtype) if need else None for part, p, need in zip(by_unit, of, needs, strict=True)]
        for row, (of, needs) in enumerate(((betas, need_betas), (gammas, need_gammas)))
    )
    all_weights = [next(remaining) if need else None for need in need_weights]
    return d_x if need_x else None, d_gammas, d_betas, all_weights, *rest


dense_block.register_autograd(_backward, setup_context=_setup_context)

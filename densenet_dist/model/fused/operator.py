"""The fused dense block as two operators of PyTorch: ``densenet_dist::dense_block`` and its gradient.

As operators they are one node of the autograd graph and one of a compiled or exported program. Random numbers and
running statistics stay outside, so that both are pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from densenet_dist.model.fused.backward import BackwardPass
from densenet_dist.model.fused.forward import run_forward
from densenet_dist.model.fused.reduction import Reduction
from densenet_dist.model.fused.structure import Forward, Statistics, Structure, Unit, new_buffer, new_maps
from densenet_dist.model.kernels.choice import choose_kernels
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
    """Run a dense block. A "unit" is a BN-ReLU and the convolution after it, see `Unit`.

    Args:
        x: (N, C, H, W), channels_last; the convolutions compute in its type.
        gammas: of every unit.
        betas: of every unit.
        weights: of every unit; the tail may have none.
        frozen: running mean and variance of every unit that is not in training, one after the other.
        masks: bool (N, channels, H, W), channels_last: what dropout keeps after each convolution but the tail's.
        training: of every unit, whether it takes the batch's statistics.
        eps: of every unit.
        bottleneck: whether layers have two units.
        tail: whether the last unit is a tail.
        keep: probability that dropout keeps a value.
        synchronised: whether statistics are over all ranks.
        keep_inner: whether a gradient may be asked for.

    Returns:
        maps (N, all maps, H, W); the tail's output, of no elements without a tail; mean and variance of the maps, of
        no elements where no unit is in training; with a bottleneck and `keep_inner` each layer's maps between its
        convolutions; mean and variance of those; the number of values that a statistic is over, (1,) where
        synchronised, else of no elements.
    """
    block = _structure(gammas, betas, weights, frozen, training, eps, bottleneck, tail, keep, synchronised)
    with torch.autocast(x.device.type, enabled=False):
        kernels = choose_kernels(x.device, x.dtype, x.numel())
        made = run_forward(kernels, block, x, _channels_last(masks), keep_inner)
        count = block.reduction.count(x.numel() // x.shape[1], x.device)
    out = x.new_empty(0) if made.out is None else made.out.contiguous(memory_format=torch.channels_last)
    return made.maps, out, *made.statistics, made.inner, *made.inner_statistics, count


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
    """Gradients of `dense_block`; most arguments are its own or what it returned.

    Args:
        gradient: of the tail's output, or without a tail of the maps.
        need_x: whether x's gradient is wanted.
        need_weights: of every weight, whether its gradient is wanted.

    Returns:
        x's gradient, of no elements where it is not wanted; `Gradients.readers`; `Gradients.inner`; the weights'
        gradients that are wanted.
    """
    block = _structure(gammas, betas, weights, frozen, training, eps, bottleneck, tail, keep, synchronised)
    made = Forward(maps, None, Statistics(mean, var), list(inner), Statistics(inner_mean, inner_var))
    needs = [*need_weights, *[False] * (len(gammas) - len(weights))]
    with torch.autocast(maps.device.type, enabled=False):
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        kernels = choose_kernels(maps.device, maps.dtype, maps.numel())
        found = BackwardPass(kernels, block, made, _channels_last(masks), needs).run(gradient, need_x)
    return maps.new_empty(0) if found.x is None else found.x, found.readers, found.inner, found.weights


def _channels_last(masks: Sequence[Tensor]) -> list[Tensor]:
    # A compiled program may have laid them out otherwise.
    return [mask.contiguous(memory_format=torch.channels_last) for mask in masks]


def _structure(
    gammas: Sequence[Tensor], betas: Sequence[Tensor], weights: Sequence[Tensor], frozen: Sequence[Tensor],
    training: Sequence[bool], eps: Sequence[float], bottleneck: bool, tail: bool, keep: float, synchronised: bool,
) -> Structure:  # fmt: skip
    pairs = iter(zip(frozen[::2], frozen[1::2], strict=True))
    padded = [*weights, *[None] * (len(gammas) - len(weights))]
    units = [
        Unit(gamma.detach(), beta.detach(), weight, epsilon, None if trains else next(pairs))
        for gamma, beta, weight, epsilon, trains in zip(gammas, betas, padded, eps, training, strict=True)
    ]
    last = units.pop() if tail else None
    step = 2 if bottleneck else 1
    layers = [tuple(units[i : i + step]) for i in range(0, len(units), step)]
    return Structure(layers, last, keep, Reduction(synchronised))


@dense_block.register_fake
def _dense_block_fake(
    x: Tensor, gammas: Sequence[Tensor], betas: Sequence[Tensor], weights: Sequence[Tensor], frozen: Sequence[Tensor],
    masks: Sequence[Tensor], training: Sequence[bool], eps: Sequence[float], bottleneck: bool, tail: bool, keep: float,
    synchronised: bool, keep_inner: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    block = _structure(gammas, betas, weights, frozen, training, eps, bottleneck, tail, keep, synchronised)
    width, between = block.widths[-1], block.inner_width
    stats = Statistics.empty(width if block.in_training else 0, x)
    inner_stats = Statistics.empty(between * len(block.layers) if block.in_training else 0, x)
    inner = [new_maps(x, between) for _ in block.layers] if between and keep_inner else []
    out = new_maps(x, block.tail.makes) if block.tail else x.new_empty(0)
    count = x.new_empty(1 if synchronised else 0, dtype=torch.float64)
    return new_buffer(x, width), out, *stats, inner, *inner_stats, count


@dense_block_backward.register_fake
def _dense_block_backward_fake(
    gradient: Tensor, maps: Tensor, mean: Tensor, var: Tensor, inner: Sequence[Tensor], inner_mean: Tensor,
    inner_var: Tensor, gammas: Sequence[Tensor], betas: Sequence[Tensor], weights: Sequence[Tensor],
    frozen: Sequence[Tensor], masks: Sequence[Tensor], training: Sequence[bool], eps: Sequence[float],
    bottleneck: bool, tail: bool, keep: float, synchronised: bool, need_x: bool, need_weights: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    block = _structure(gammas, betas, weights, frozen, training, eps, bottleneck, tail, keep, synchronised)
    wide = accumulation_type(maps.dtype)
    d_x = new_maps(maps, block.widths[0]) if need_x else maps.new_empty(0)
    readers = maps.new_empty((len(block.readers), 2, maps.shape[1]), dtype=wide)
    inner_gradients = maps.new_empty((len(inner), 2, block.inner_width), dtype=wide)
    d_weights = [torch.empty_like(weight) for weight, needed in zip(weights, need_weights, strict=True) if needed]
    return d_x, readers, inner_gradients, d_weights


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, gammas, betas, weights, frozen, masks, training, eps, bottleneck, tail, keep, synchronised, _ = inputs
    maps, _, mean, var, inner, inner_mean, inner_var, _ = output
    groups = ([maps], [mean, var], inner, [inner_mean, inner_var], gammas, betas, weights, frozen, masks)
    ctx.save_for_backward(*(tensor for group in groups for tensor in group))
    ctx.lengths = [len(group) for group in groups]
    ctx.settings = (training, eps, bottleneck, tail, keep, synchronised)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    groups = [[saved.pop(0) for _ in range(length)] for length in ctx.lengths]
    (maps,), (mean, var), inner, (inner_mean, inner_var), gammas, betas, weights, frozen, masks = groups
    training, eps, bottleneck, tail, keep, synchronised = ctx.settings
    gradient = gradients[1] if tail else gradients[0]
    need_x, need_gammas, need_betas, need_weights = ctx.needs_input_grad[:4]
    nothing = ([None] * len(frozen), [None] * len(masks), *[None] * 7)
    if gradient is None:
        return None, [None] * len(gammas), [None] * len(gammas), [None] * len(weights), *nothing
    d_x, readers, inner_gradients, d_weights = dense_block_backward(
        gradient, maps, mean, var, inner, inner_mean, inner_var, gammas, betas, weights, frozen, masks, training, eps,
        bottleneck, tail, keep, synchronised, need_x, need_weights,
    )  # fmt: skip
    by_unit = list(readers)
    for number in reversed(range(len(inner))):
        by_unit.insert(number + 1, inner_gradients[number])
    remaining = iter(d_weights)
    d_betas, d_gammas = (
        [part[row, : len(p)].to(p.dtype) if need else None for part, p, need in zip(by_unit, of, needs, strict=True)]
        for row, (of, needs) in enumerate(((betas, need_betas), (gammas, need_gammas)))
    )
    all_weights = [next(remaining) if need else None for need in need_weights]
    return d_x if need_x else None, d_gammas, d_betas, all_weights, *nothing


dense_block.register_autograd(_backward, setup_context=_setup_context)

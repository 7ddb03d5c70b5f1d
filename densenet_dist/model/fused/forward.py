"""The fused dense block, forward. Three facts make it cheaper than its definition, none of them an approximation.

A map's batch statistics do not depend on the layer that reads it: they are taken once, when the map is made. All maps
lie in one buffer: nothing is concatenated. And (see `densenet_dist.model.fused.backward`) the statistics' share of a
map's gradient is one correction for all layers that read it. The first is the only one that others are known to have
used in part (Jung et al. 2018, arXiv:1807.01702: BN fission and fusion).

    made_l = conv(relu(s_l x + t_l), W_l);  x[slot_l] = dropout(made_l);  mean, var of x[slot_l]
    s_l = gamma_l / sqrt(var + eps),  t_l = beta_l - mean s_l
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from densenet_dist.model.fused.own_convolutions import choose_convolutions
from densenet_dist.model.fused.structure import Forward, Statistics, Structure, Unit, new_buffer
from densenet_dist.model.kernels.interface import Kernels, accumulation_type


def run_forward(kernels: Kernels, block: Structure, x: Tensor, masks: Sequence[Tensor], keep_inner: bool) -> Forward:
    """The maps of a block, and its tail's output.

    Args:
        kernels: for the device and type of `x`.
        block: what to compute; its weights may be of another type than `x`.
        x: (N, C, H, W), channels_last.
        masks: what dropout keeps after each convolution of the layers, in order; none without dropout.
        keep_inner: whether a backward pass may follow.
    """
    widths, between, wide = block.widths, block.inner_width, accumulation_type(x.dtype)
    convolutions, remaining = choose_convolutions(kernels, x, block.units), iter(masks)

    def merge(own: Statistics, made: Tensor) -> None:
        if block.in_training:
            block.reduction.merge(own.mean, own.var, made.numel() // made.shape[1])

    def write(unit: Unit, read: Tensor, stats: Statistics, slot: Tensor | None, own: Statistics) -> Tensor:
        """Put what a unit makes of maps, after dropout, into a slot, and its statistics into `own`."""
        into = own if block.in_training else None
        mask = next(remaining, None)
        made = convolutions.write(unit, read, unit.norm(stats, wide), mask, block.keep, slot, into)
        merge(own, made)
        return made

    maps, inner = new_buffer(x, widths[-1]), []
    stats = Statistics.empty(widths[-1] if block.in_training else 0, x)
    inner_stats = Statistics.empty(between * len(block.layers) if block.in_training else 0, x)
    entering = stats.narrow(0, widths[0])
    kernels.write(x, None, 1.0, maps[:, : widths[0]], *(entering if block.in_training else (None, None)))
    merge(entering, x)
    for number, (layer, (start, stop)) in enumerate(zip(block.layers, pairwise(widths), strict=True)):
        read, read_stats = maps[:, :start], stats
        if between:
            read_stats = inner_stats.narrow(number * between, (number + 1) * between)
            read = write(layer[0], maps[:, :start], stats, None, read_stats)
            if keep_inner:
                inner.append(read)
        write(layer[-1], read, read_stats, maps[:, start:stop], stats.narrow(start, stop))
    out = None if block.tail is None else convolutions.apply(block.tail, maps, block.tail.norm(stats, wide))
    return Forward(maps, out, stats, inner, inner_stats)

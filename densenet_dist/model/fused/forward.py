"""The forward pass of the fused dense block: the same function as the reference form, with less memory traffic.

- Batch statistics of a channel do not depend on the layer that reads it, so they are computed once, when the channel is
  stored. (Related: BN fission and fusion, Jung et al. 2018, arXiv:1807.01702.)
- All channels lie in one buffer; a layer reads its first channels and writes the next k. Nothing is concatenated. With
  3 input channels, k = 2 and 2 layers:

      buffer    0 1 2 | 3 4 | 5 6
      layer 1   reads 0:3, writes 3:5
      layer 2   reads 0:5, writes 5:7
      tail      reads 0:7

- The gradient through the statistics is one correction for all layers that read a channel: see
  `densenet_dist.model.fused.backward`.

For each layer l, with the statistics of the channels that it reads:

    s_l = gamma_l / sqrt(var + eps),  t_l = beta_l - mean s_l
    buffer[slot_l] = dropout(conv(relu(s_l x + t_l), W_l));  mean, var of buffer[slot_l]
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from densenet_dist.model.fused.convolutions import choose_convolutions
from densenet_dist.model.fused.types import BlockSpec, Unit, empty_buffer, empty_statistics
from densenet_dist.model.kernels.interface import Dropout, Kernels, Statistics


def run_forward(
    kernels: Kernels, block: BlockSpec, x: Tensor, dropouts: Sequence[Dropout], keep_bottlenecks: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """Compute the results of `dense_block`.

    Args:
        kernels: for the device and dtype of `x`.
        block: what to compute; its weights may have another dtype than `x`.
        x: (N, C, H, W), channels_last.
        dropouts: after each convolution of the layers, in order; empty without dropout.
        keep_bottlenecks: whether a backward pass may follow.
    """
    widths, narrow, values = block.widths, block.bottleneck_width, x.numel() // x.shape[1]
    convolutions, remaining_dropouts = choose_convolutions(kernels, x, block.units), iter(dropouts)
    maps, bottlenecks = empty_buffer(x, widths[-1]), []
    statistics = empty_statistics(block.buffer_start + widths[-1] if block.in_training else 0, x)

    def run_unit(unit: Unit, unit_input: Tensor, slot: Tensor | None, own: Statistics) -> Tensor:
        """Store a unit's output, after dropout, in `slot` and its statistics in `own`."""
        dropout, into = next(remaining_dropouts, None), own if block.in_training else None
        output = convolutions.forward(unit, unit_input, unit.norm(statistics), dropout, slot, into)
        if block.synchronized:
            merge_over_ranks(own, values)
        return output

    buffer_statistics = statistics.narrow(block.buffer_start)
    own = buffer_statistics.narrow(0, widths[0])
    kernels.store_output(x, None, maps[:, : widths[0]], own if block.in_training else None)
    count = merge_over_ranks(own, values) if block.synchronized else x.new_empty(0, dtype=torch.float64)
    for i, (layer, (start, stop)) in enumerate(zip(block.layers, pairwise(widths), strict=True)):
        unit_input = maps[:, :start]
        if narrow:
            unit_input = run_unit(layer[0], unit_input, None, statistics.narrow(i * narrow, (i + 1) * narrow))
            if keep_bottlenecks:
                bottlenecks.append(unit_input)
        run_unit(layer[-1], unit_input, maps[:, start:stop], buffer_statistics.narrow(start, stop))
    out = x.new_empty(0)
    if block.tail is not None:
        out = convolutions.apply(block.tail, maps, block.tail.norm(statistics))
    return maps, out, *statistics, bottlenecks, count


def merge_over_ranks(statistics: Statistics, count: int) -> Tensor:
    """Replace this rank's statistics of `count` values per channel by those of all ranks, in one all-reduce.

    Ranks may have different numbers of images. Sums are float64, because a mean far from zero must not cancel the
    variance.

    Returns:
        The number of values per channel of all ranks, (1,), float64.
    """
    mean, var = (vector.double() for vector in statistics)
    if count == 0:  # a rank without images has NaN statistics, which must not spread
        mean, var = torch.zeros_like(mean), torch.zeros_like(var)
    sums = torch.cat([mean * count, (var + mean.square()) * count, mean.new_full((1,), count)])
    dist.all_reduce(sums)
    total = sums / sums[-1]
    global_mean, second_moment = total[:-1].chunk(2)
    statistics.mean.copy_(global_mean)
    statistics.var.copy_((second_moment - global_mean.square()).clamp_(min=0))
    return sums[-1:].clone()

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

from torch import Tensor

from densenet_dist.model.fused.convolutions import choose_convolutions
from densenet_dist.model.fused.types import BlockSpec, ForwardResult, Statistics, Unit, empty_buffer
from densenet_dist.model.kernels.interface import Kernels, accumulation_type


def run_forward(
    kernels: Kernels, block: BlockSpec, x: Tensor, masks: Sequence[Tensor], keep_bottlenecks: bool
) -> ForwardResult:
    """Compute a block's feature maps and its tail's output.

    Args:
        kernels: for the device and dtype of `x`.
        block: what to compute; its weights may have another dtype than `x`.
        x: (N, C, H, W), channels_last.
        masks: what dropout keeps after each convolution of the layers, in order; empty without dropout.
        keep_bottlenecks: whether a backward pass may follow.
    """
    widths, narrow, wide = block.widths, block.bottleneck_width, accumulation_type(x.dtype)
    convolutions, remaining_masks = choose_convolutions(kernels, x, block.units), iter(masks)

    def merge(own: Statistics, stored: Tensor) -> None:
        if block.in_training:
            block.reduction.merge(own.mean, own.var, stored.numel() // stored.shape[1])

    def run_unit(unit: Unit, maps: Tensor, stats: Statistics, slot: Tensor | None, own: Statistics) -> Tensor:
        """Store a unit's output, after dropout, in `slot` and its statistics in `own`."""
        mask, into = next(remaining_masks, None), own if block.in_training else None
        output = convolutions.forward(unit, maps, unit.norm(stats, wide), mask, block.keep, slot, into)
        merge(own, output)
        return output

    maps, bottlenecks = empty_buffer(x, widths[-1]), []
    stats = Statistics.empty(widths[-1] if block.in_training else 0, x)
    bottleneck_stats = Statistics.empty(narrow * len(block.layers) if block.in_training else 0, x)
    input_stats = stats.narrow(0, widths[0])
    kernels.store_output(x, None, 1.0, maps[:, : widths[0]], *(input_stats if block.in_training else (None, None)))
    merge(input_stats, x)
    for i, (layer, (start, stop)) in enumerate(zip(block.layers, pairwise(widths), strict=True)):
        unit_input, unit_stats = maps[:, :start], stats
        if narrow:
            unit_stats = bottleneck_stats.narrow(i * narrow, (i + 1) * narrow)
            unit_input = run_unit(layer[0], maps[:, :start], stats, None, unit_stats)
            if keep_bottlenecks:
                bottlenecks.append(unit_input)
        run_unit(layer[-1], unit_input, unit_stats, maps[:, start:stop], stats.narrow(start, stop))
    out = None if block.tail is None else convolutions.apply(block.tail, maps, block.tail.norm(stats, wide))
    return ForwardResult(maps, out, stats, bottlenecks, bottleneck_stats)

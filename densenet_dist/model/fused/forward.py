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

from densenet_dist.model.fused.convolver import Convolver
from densenet_dist.model.fused.structure import Forward, Statistics, Structure, Unit, new_maps
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
    return _Pass(kernels, block, x, masks).run(x, keep_inner)


class _Pass:
    def __init__(self, kernels: Kernels, block: Structure, x: Tensor, masks: Sequence[Tensor]) -> None:
        self._kernels, self._block = kernels, block
        self._masks = iter(masks)
        self._convolver = Convolver(kernels, x, max(unit.reads for unit in block.units))
        self._wide = accumulation_type(x.dtype)

    def run(self, x: Tensor, keep_inner: bool) -> Forward:
        block, inner = self._block, []
        widths, between = block.widths, block.inner_width
        maps = new_maps(x, widths[-1])
        stats = Statistics.empty(widths[-1] if block.in_training else 0, x)
        inner_stats = Statistics.empty(between * len(block.layers) if block.in_training else 0, x)
        self._store(x, None, maps[:, : widths[0]], stats.narrow(0, widths[0]))
        for number, (layer, (start, stop)) in enumerate(zip(block.layers, pairwise(widths), strict=True)):
            made = self._convolve(layer[0], maps[:, :start], stats)
            if between:
                own = inner_stats.narrow(number * between, (number + 1) * between)
                narrowed = made[:, :between]
                self._store(narrowed, next(self._masks, None), narrowed, own)
                made = self._convolve(layer[1], narrowed, own)
                inner += [narrowed] if keep_inner else []
            self._store(made, next(self._masks, None), maps[:, start:stop], stats.narrow(start, stop))
        out = None
        if block.tail is not None:
            out = self._convolve(block.tail, maps, stats)[:, : block.tail.makes]
        return Forward(maps, out, stats, inner, inner_stats)

    def _convolve(self, unit: Unit, maps: Tensor, stats: Statistics) -> Tensor:
        return self._convolver.forward(unit, maps, unit.norm(stats, self._wide))

    def _store(self, made: Tensor, mask: Tensor | None, slot: Tensor, into: Statistics) -> None:
        if not self._block.in_training:
            self._kernels.write(made, mask, self._block.keep, slot, None, None)
            return
        self._kernels.write(made, mask, self._block.keep, slot, into.mean, into.var)
        self._block.reduction.merge(into.mean, into.var, slot.numel() // slot.shape[1])

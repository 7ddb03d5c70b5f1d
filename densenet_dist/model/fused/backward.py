"""The backward pass of the fused dense block; notation as in `densenet_dist.model.fused.forward`.

Let x be a channel of the buffer with its batch mean and variance, M = N H W, and let l run over the units that read it,
r_l = 1 / sqrt(var + eps_l). All sums without an index are over (N, H, W).

    g_l = [s_l x + t_l > 0] * conv_transpose(d output_l, W_l)        the gradient of norm_l(x)
    d beta_l = sum g_l,   d gamma_l = r_l sum g_l (x - mean)

The textbook gradient of one batch normalization in training mode is

    dx = s_l (g_l - sum(g_l) / M - (x - mean) r_l^2 sum(g_l (x - mean)) / M)

All units share x and its mean, so the gradient of x, the sum over l, is

    dx = G - (A + B (x - mean)) / M
    G = sum_l s_l g_l,   A = sum_l s_l sum g_l,   B = sum_l s_l r_l^2 sum g_l (x - mean)

G needs a pass over the maps for each unit, but the second term, the "correction", is only two numbers per channel that
are summed up meanwhile and applied once. Units in evaluation mode have constant statistics: they add to G alone.

Example: 3 input channels, k = 2, two layers and a tail. x marks the channels whose G, A and B a unit adds to, in the
order of the backward pass; "=>" marks the channels that no further unit reads, whose correction is applied then.

    channel     0 1 2 | 3 4 | 5 6
    tail        x x x   x x   x x      => 5, 6: corrected and multiplied by dropout's mask, d output of layer 2
    layer 2     x x x   x x            => 3, 4: d output of layer 1
    layer 1     x x x                  => 0, 1, 2: the gradient of the block's input

A and B of all channels are one tensor, in the order of the statistics: of the bottlenecks, layer after layer, then of
the buffer. The gradients of beta and gamma of all units are another.

The outputs of conv_transpose are not added to G one by one: they wait, and `MAX_WAITING` of them are added to the
buffer of G in one pass. So it is read and written once for several layers, and memory stays linear in depth. Channels
whose gradient is needed before that are summed separately. None waits if the convolution itself adds to the buffer
(`Convolutions.accumulates`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from densenet_dist.model.fused.convolutions import choose_convolutions
from densenet_dist.model.fused.types import BlockSpec, Unit, empty_buffer, empty_maps
from densenet_dist.model.kernels import interface
from densenet_dist.model.kernels.interface import (
    Consumer,
    Correction,
    Dropout,
    Kernels,
    NormGrad,
    OutputGradient,
    Statistics,
)

MAX_WAITING = interface.MAX_CONSUMERS
"""How many layers' gradients wait. More would cost memory and save traffic."""


class BackwardPass:
    """Compute the gradients of a block. It runs once.

    Args:
        kernels: for the device and dtype of the maps.
        block: as for the forward pass.
        maps: of the forward pass, like the two that follow.
        statistics: of the bottlenecks, layer after layer, then of the maps.
        bottlenecks: outputs of each layer's bottleneck.
        dropouts: as for the forward pass.
        need_weights: whether the gradient of each weight is needed.
    """

    def __init__(
        self, kernels: Kernels, block: BlockSpec, maps: Tensor, statistics: Statistics, bottlenecks: Sequence[Tensor],
        dropouts: Sequence[Dropout], need_weights: Sequence[bool],
    ) -> None:  # fmt: skip
        self._kernels, self._block, self._maps, self._statistics = kernels, block, maps, statistics
        self._wide = interface.accumulation_type(maps.dtype)
        self._convolutions = choose_convolutions(kernels, maps, block.units)
        channels = [unit.in_channels for unit in block.units]
        self._gradients = maps.new_empty((2, sum(channels)), dtype=self._wide)
        self._corrections = maps.new_zeros((2, block.buffer_start + maps.shape[1]), dtype=self._wide)
        norm_grads = map(self._norm_grad, block.units, self._gradients.split(channels, dim=1))
        needs = [*need_weights, *[False] * (len(channels) - len(need_weights))]
        self._left = list(zip(block.units, norm_grads, needs, strict=True))  # in order; the last one is next
        self._bottlenecks, self._dropouts = list(bottlenecks), list(dropouts)
        self._d_weights: list[Tensor | None] = []  # of all units, the last one's first
        self._waiting: list[Consumer] = []
        self._accumulator: Tensor | None = None  # G so far; without a tail it starts as the maps' gradient
        self._buffer: Tensor | None = None  # the memory of G
        self._d_bottleneck: Tensor | None = None  # the memory of a bottleneck's gradient, of one layer at a time

    def run(self, gradient: Tensor, need_x: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Compute the results of `dense_block_backward`; its arguments, with the gradient in channels_last."""
        block = self._block
        weights = [unit.weight for unit, _, need_weight in self._left if need_weight and unit.weight is not None]
        if block.tail is None:
            self._accumulator = gradient
        else:
            self._backward_buffer_unit(OutputGradient(gradient, gradient))
        for start, stop in reversed(list(pairwise(block.widths))):
            d_output = self._slot_gradient(start, stop, self._next_dropout())
            if block.bottleneck_width:
                d_output = self._backward_second_unit(d_output)
            self._backward_buffer_unit(d_output)
        d_input, d_x = self._slot_gradient(0, block.widths[0], None), self._maps.new_empty(0)
        if need_x:
            d_x = empty_maps(self._maps, block.widths[0])
            self._kernels.correct_gradient(d_input, d_x)
        d_weights = [d_weight for d_weight in reversed(self._d_weights) if d_weight is not None]
        return d_x, self._gradients, self._convolutions.like_weights(d_weights, weights)

    def _norm_grad(self, unit: Unit, gradients: Tensor) -> NormGrad:
        stop = unit.start + unit.in_channels
        correction = self._corrections[:, unit.start : stop] if unit.frozen is None else None
        return NormGrad(unit.norm(self._statistics), gradients, correction)

    def _backward_buffer_unit(self, d_output: OutputGradient) -> None:
        """Go back through the last of `BlockSpec.buffer_units` that is left: its gradient is added to G, or waits."""
        unit, norm_grad, need_weight = self._left.pop()
        maps = self._maps[:, : unit.in_channels]
        if self._convolutions.accumulates(unit):
            if self._waiting:
                self._flush(unit.in_channels)
            accumulator, out = self._accumulator_slice(0, unit.in_channels), self._buffer_slice(unit.in_channels)
            d_weight = self._convolutions.backward_accumulate(
                unit, maps, norm_grad, d_output, need_weight, accumulator, out
            )
            self._accumulator = out
        else:
            gradient, d_weight = self._convolutions.backward(unit, maps, norm_grad.norm, d_output, need_weight)
            self._waiting.insert(0, Consumer(gradient, norm_grad))
            if len(self._waiting) == MAX_WAITING and self._left:
                self._flush(unit.in_channels)
        self._d_weights.append(d_weight)

    def _flush(self, channels: int) -> None:
        """Add all that waits to G of the first channels."""
        out = self._buffer_slice(channels)
        self._sum_waiting(0, channels, out)
        self._accumulator = out
        self._waiting.clear()

    def _backward_second_unit(self, d_output: OutputGradient) -> OutputGradient:
        """Go back through a layer's second unit; return the gradient of the bottleneck."""
        unit, norm_grad, need_weight = self._left.pop()
        maps = self._bottlenecks.pop()
        if self._d_bottleneck is None:
            self._d_bottleneck = empty_maps(maps, unit.in_channels, self._wide)
        out = self._d_bottleneck
        d_weight = self._convolutions.backward_accumulate(unit, maps, norm_grad, d_output, need_weight, None, out)
        self._d_weights.append(d_weight)
        correction = None
        if norm_grad.correction is not None:
            correction = self._correction(norm_grad.norm.mean, norm_grad.correction)
        return OutputGradient(out, maps, correction, self._next_dropout(), owned=True)

    def _buffer_slice(self, channels: int) -> Tensor:
        """Return the first channels of the buffer of G."""
        if self._buffer is None:
            self._buffer = empty_buffer(self._maps, channels)
        return self._buffer[:, :channels]

    def _accumulator_slice(self, start: int, stop: int) -> Tensor | None:
        return None if self._accumulator is None else self._accumulator[:, start:stop]

    def _slot_gradient(self, start: int, stop: int, dropout: Dropout | None) -> OutputGradient:
        """Return the gradient of channels ``start:stop`` of the buffer, which no further unit reads."""
        maps = self._maps[:, start:stop]
        if self._waiting:
            total = empty_maps(maps, stop - start, self._wide)
            self._sum_waiting(start, stop, total)
        else:
            assert self._accumulator is not None
            total = self._accumulator[:, start:stop]
        correction = None
        if any(unit.frozen is None for unit in self._block.buffer_units):
            first, last = self._block.buffer_start + start, self._block.buffer_start + stop
            correction = self._correction(self._statistics.mean[first:last], self._corrections[:, first:last])
        return OutputGradient(total, maps, correction, dropout)

    def _sum_waiting(self, start: int, stop: int, out: Tensor) -> None:
        """Write G of channels ``start:stop``, with all that waits, to `out`."""
        consumers = [
            Consumer(gradient[:, start:stop], norm_grad.narrow(start, stop)) for gradient, norm_grad in self._waiting
        ]
        self._kernels.sum_gradients(self._maps[:, start:stop], consumers, self._accumulator_slice(start, stop), out)

    def _correction(self, mean: Tensor, sums: Tensor) -> Correction:
        """Return the correction of channels given A and B (2, C) of this rank."""
        values = self._maps.numel() // self._maps.shape[1]
        if not self._block.synchronized:
            return Correction(mean, sums, max(values, 1))
        flat = torch.cat([sums.double().flatten(), sums.new_full((1,), values, dtype=torch.float64)])
        dist.all_reduce(flat)
        # Divided here, because reading the number of values from a GPU would wait for it.
        return Correction(mean, (flat[:-1] / flat[-1]).to(sums.dtype).view_as(sums), 1.0)

    def _next_dropout(self) -> Dropout | None:
        return self._dropouts.pop() if self._dropouts else None

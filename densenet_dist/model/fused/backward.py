"""The backward pass of the fused dense block; notation as in `densenet_dist.model.fused.forward`.

Let x be a channel of the buffer with its batch mean and variance, M = N H W, and let l run over the units that read it,
r_l = 1 / sqrt(var + eps_l). All sums without an index are over (N, H, W).

    g_l = [s_l x + t_l > 0] * conv_transpose(d output_l, W_l)        the gradient of norm_l(x)
    d beta_l = sum g_l,   d gamma_l = r_l sum g_l (x - mean)

The textbook gradient of one batch normalisation in training mode is

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

The gradients of beta and gamma of these units are one tensor (3, 2, 7) and A and B one tensor (2, 7), so that each is
allocated once. Unit i uses row i up to its number of channels (the x above); the rest of the row is never read.

The outputs of conv_transpose are not added to G one by one: they wait, and `MAX_WAITING` of them are added to the
buffer of G in one pass. So it is read and written once for several layers, and memory stays linear in depth. Channels
whose gradient is needed before that are summed separately. None waits if the convolution itself adds to the buffer
(`Convolutions.accumulates`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from densenet_dist.model.fused.convolutions import choose_convolutions
from densenet_dist.model.fused.types import (
    BlockSpec,
    ForwardResult,
    OutputGradient,
    Statistics,
    Unit,
    empty_buffer,
    empty_maps,
)
from densenet_dist.model.kernels import interface
from densenet_dist.model.kernels.interface import Consumer, Correction, Kernels, NormGrad

MAX_WAITING = interface.MAX_CONSUMERS
"""How many layers' gradients wait. More would cost memory and save traffic."""


class BackwardPass:
    """Compute the gradients of a block.

    Args:
        kernels: for the device and dtype of the maps.
        block: as for the forward pass.
        result: of the forward pass; `ForwardResult.out` is not used.
        masks: as for the forward pass.
        need_weights: whether each unit's weight needs a gradient, in order of `BlockSpec.units`; False without a
            weight.
    """

    def __init__(
        self, kernels: Kernels, block: BlockSpec, result: ForwardResult, masks: Sequence[Tensor],
        need_weights: Sequence[bool],
    ) -> None:  # fmt: skip
        maps, layers = result.maps, len(result.bottlenecks)
        self._kernels, self._block, self._result = kernels, block, result
        self._masks, self._need_weights = list(masks), list(need_weights)
        self._wide = interface.accumulation_type(maps.dtype)
        self._values = maps.numel() // maps.shape[1]
        self._convolutions = choose_convolutions(kernels, maps, block.units)
        self._gradients = maps.new_empty((len(block.buffer_units), 2, maps.shape[1]), dtype=self._wide)
        self._bottleneck_gradients = maps.new_empty((layers, 2, block.bottleneck_width), dtype=self._wide)
        # A and B of all channels: of the buffer, then of the bottlenecks, layer after layer.
        self._corrections = maps.new_zeros((2, maps.shape[1] + layers * block.bottleneck_width), dtype=self._wide)
        self._norm_grads = [
            self._norm_grad(unit, result.statistics, self._gradients[i], 0) for i, unit in enumerate(block.buffer_units)
        ]
        self._d_weights: list[Tensor | None] = []  # last layer first
        self._waiting: list[Consumer] = []
        self._carry: Tensor | None = None  # G without the waiting gradients; without a tail, first the maps' gradient
        self._buffer: Tensor | None = None  # the memory of G
        self._d_bottleneck: Tensor | None = None  # the memory of a bottleneck's gradient, of one layer at a time

    def run(self, gradient: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor, list[Tensor]]:
        """Run the backward pass.

        Args:
            gradient: with respect to `ForwardResult.out`, or without a tail to `ForwardResult.maps`; channels_last.
            need_x: whether the gradient of the block's input is needed.

        Returns:
            The gradient of the input (N, C, H, W), or None; of beta and gamma of `BlockSpec.buffer_units`, (units, 2,
            all channels), of which a unit's own channels are valid; of beta and gamma of each layer's second unit,
            (layers, 2, bottleneck width); of the weights that need one, in order of `BlockSpec.units`.
        """
        layers, widths = self._block.layers, self._block.widths
        needed = zip(self._block.units, self._need_weights, strict=True)
        weights = [unit.weight for unit, need in needed if need and unit.weight is not None]
        tail = self._block.tail
        if tail is None:
            self._carry = gradient
        else:
            self._backward_buffer_unit(len(layers), tail, OutputGradient(gradient, gradient))
        for i, (start, stop) in reversed(list(enumerate(pairwise(widths)))):
            layer = layers[i]
            d_output = self._slot_gradient(start, stop, self._next_mask())
            if len(layer) == 2:
                d_output = self._backward_second_unit(i, layer[1], d_output)
            self._backward_buffer_unit(i, layer[0], d_output)
        d_input, d_x = self._slot_gradient(0, widths[0], None), None
        if need_x:
            d_x = empty_maps(self._result.maps, widths[0])
            self._kernels.correct_gradient(d_input.gradient, d_input.maps, d_input.correction, None, 1.0, d_x)
        d_weights = [weight for weight in reversed(self._d_weights) if weight is not None]
        d_weights = self._convolutions.like_weights(d_weights, weights)
        return d_x, self._gradients, self._bottleneck_gradients, d_weights

    def _norm_grad(self, unit: Unit, statistics: Statistics, gradients: Tensor, start: int) -> NormGrad:
        """Return a unit's normalisation; `start` is the index of its first channel in the corrections."""
        channels = unit.in_channels
        correction = self._corrections[:, start : start + channels] if unit.frozen is None else None
        return NormGrad(unit.norm(statistics, self._wide), gradients[:, :channels], correction)

    def _backward_buffer_unit(self, i: int, unit: Unit, d_output: OutputGradient) -> None:
        """Go back through `BlockSpec.buffer_units` [i]: its gradient is added to G, or waits."""
        norm_grad, need_weight = self._norm_grads[i], self._need_weights.pop()
        maps = self._result.maps[:, : unit.in_channels]
        if self._convolutions.accumulates(unit):
            if self._waiting:
                self._flush(unit.in_channels)
            carry, out = self._carry_slice(0, unit.in_channels), self._buffer_slice(unit.in_channels)
            self._d_weights.append(
                self._convolutions.backward_accumulate(unit, maps, norm_grad, d_output, need_weight, carry, out)
            )
            self._carry = out
            return
        gradient, d_weight = self._convolutions.backward(unit, maps, norm_grad.norm, d_output, need_weight)
        self._d_weights.append(d_weight)
        self._waiting.insert(0, Consumer(gradient, norm_grad))
        if len(self._waiting) == MAX_WAITING and i > 0:
            self._flush(unit.in_channels)

    def _flush(self, channels: int) -> None:
        """Add all that waits to G of the first channels."""
        out = self._buffer_slice(channels)
        self._sum_waiting(0, channels, out)
        self._carry = out
        self._waiting.clear()

    def _backward_second_unit(self, i: int, unit: Unit, d_output: OutputGradient) -> OutputGradient:
        """Go back through the second unit of layer i; return the gradient of the bottleneck."""
        maps, width = self._result.bottlenecks[i], unit.in_channels
        statistics = self._result.bottleneck_statistics.narrow(i * width, (i + 1) * width)
        start = self._result.maps.shape[1] + i * width
        norm_grad = self._norm_grad(unit, statistics, self._bottleneck_gradients[i], start)
        if self._d_bottleneck is None:
            self._d_bottleneck = empty_maps(maps, width, self._wide)
        out, need_weight = self._d_bottleneck, self._need_weights.pop()
        self._d_weights.append(
            self._convolutions.backward_accumulate(unit, maps, norm_grad, d_output, need_weight, None, out)
        )
        correction = self._correction(norm_grad.norm.mean, start, start + width) if unit.frozen is None else None
        return OutputGradient(out, maps, correction, self._next_mask(), self._block.keep, owned=True)

    def _buffer_slice(self, channels: int) -> Tensor:
        """Return the first channels of the buffer of G."""
        if self._buffer is None:
            self._buffer = empty_buffer(self._result.maps, channels)
        return self._buffer[:, :channels]

    def _carry_slice(self, start: int, stop: int) -> Tensor | None:
        return None if self._carry is None else self._carry[:, start:stop]

    def _slot_gradient(self, start: int, stop: int, mask: Tensor | None) -> OutputGradient:
        """Return the gradient of channels ``start:stop`` of the buffer, which no further unit reads."""
        maps = self._result.maps[:, start:stop]
        if self._waiting:
            total = empty_maps(maps, stop - start, self._wide)
            self._sum_waiting(start, stop, total)
        else:
            assert self._carry is not None
            total = self._carry[:, start:stop]
        correction = None
        if any(unit.frozen is None for unit in self._block.buffer_units):
            correction = self._correction(self._result.statistics.mean[start:stop], start, stop)
        return OutputGradient(total, maps, correction, mask, self._block.keep)

    def _sum_waiting(self, start: int, stop: int, out: Tensor) -> None:
        """Write G of channels ``start:stop``, with all that waits, to `out`."""
        consumers = [
            Consumer(gradient[:, start:stop], norm_grad.narrow(start, stop)) for gradient, norm_grad in self._waiting
        ]
        self._kernels.sum_gradients(self._result.maps[:, start:stop], consumers, self._carry_slice(start, stop), out)

    def _correction(self, mean: Tensor, start: int, stop: int) -> Correction:
        return Correction(mean, *self._block.reduction.total(self._corrections[:, start:stop], self._values))

    def _next_mask(self) -> Tensor | None:
        return self._masks.pop() if self._masks else None

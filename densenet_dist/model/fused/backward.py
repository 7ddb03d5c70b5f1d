"""The fused dense block, backward; notation as in `densenet_dist.model.fused.forward`.

    g_l = [s_l x + t_l > 0] (W_l^T * d made_l);  d beta_l = sum g_l;  d gamma_l = sum g_l (x - mean) / sigma
    for a map, over all units l that read it:  G = sum_l s_l g_l
    dx = G - offset - slope (x - mean),  offset = sum_l s_l sum(g_l) / M,
    slope = sum_l s_l sum(g_l (x - mean)) / (sigma^2 M),  M = N H W
    d made_j = dropout mask * dx[slot_j]

Sums are over (N, H, W); offset and slope count the units in training only (a frozen one has constant statistics).

Gradients W_l^T * d made_l wait until a map below them is needed; after a few of them (`WAITING`) all that they add to
the maps below is added to the buffer of G at once. So the buffer is read and written once for several layers, and
memory stays linear in depth. Where a convolution adds to the buffer itself (`Convolutions.accumulates`) none waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from densenet_dist.model.fused.own_convolutions import choose_convolutions
from densenet_dist.model.fused.structure import (
    Arriving,
    Forward,
    Gradients,
    Statistics,
    Structure,
    Unit,
    new_buffer,
    new_maps,
)
from densenet_dist.model.kernels.interface import (
    MOST_CONSUMERS,
    Consumer,
    Correction,
    Kernels,
    Reader,
    accumulation_type,
)

WAITING = MOST_CONSUMERS
"""How many layers' gradients wait: more of them cost memory and save traffic."""


class BackwardPass:
    """All gradients of a block.

    Args:
        kernels: for the device and type of the maps.
        block: as for the forward pass.
        made: by the forward pass; `Forward.out` is not needed.
        masks: as for the forward pass.
        need_weights: whether a unit's weight needs a gradient, in order of `Structure.units`; False where it has none.
    """

    def __init__(
        self, kernels: Kernels, block: Structure, made: Forward, masks: Sequence[Tensor], need_weights: Sequence[bool]
    ) -> None:
        maps, layers = made.maps, len(made.inner)
        self._kernels, self._block, self._made = kernels, block, made
        self._masks, self._needs = list(masks), list(need_weights)
        self._wide = accumulation_type(maps.dtype)
        self._count = maps.numel() // maps.shape[1]
        self._convolutions = choose_convolutions(kernels, maps, block.units)
        self._sums = maps.new_empty((len(block.readers), 2, maps.shape[1]), dtype=self._wide)
        self._inner_sums = maps.new_empty((layers, 2, block.inner_width), dtype=self._wide)
        # The statistics' share in the gradients of all maps: of those that layers read, then of those within layers.
        self._corrections = maps.new_zeros((2, maps.shape[1] + layers * block.inner_width), dtype=self._wide)
        self._readers = [self._reader(unit, made.statistics, self._sums[i], 0) for i, unit in enumerate(block.readers)]
        self._weights: list[Tensor | None] = []  # last layer first
        self._waiting: list[Consumer] = []
        self._carry: Tensor | None = None  # G without what waits; at first the gradient of the maps themselves
        self._buffer: Tensor | None = None
        self._between: Tensor | None = None  # what comes back to the maps between two convolutions: one layer at a time

    def run(self, gradient: Tensor, need_x: bool) -> Gradients:
        """Compute them from that of `Forward.out`, or without a tail of `Forward.maps`; channels_last."""
        layers, widths = self._block.layers, self._block.widths
        needs = zip(self._block.units, self._needs, strict=True)
        weights = [unit.weight for unit, needed in needs if needed and unit.weight is not None]
        tail = self._block.tail
        if tail is None:
            self._carry = gradient
        else:
            self._through_reader(len(layers), tail, Arriving(gradient, gradient))
        for number, (start, stop) in reversed(list(enumerate(pairwise(widths)))):
            layer = layers[number]
            arriving = self._slot(start, stop, self._next_mask())
            if len(layer) == 2:
                arriving = self._through_inner(number, layer[1], arriving)
            self._through_reader(number, layer[0], arriving)
        entering, d_x = self._slot(0, widths[0], None), None
        if need_x:
            d_x = new_maps(self._made.maps, widths[0])
            self._kernels.finish(entering.gradient, entering.maps, entering.correction, None, 1.0, d_x)
        found = [weight for weight in reversed(self._weights) if weight is not None]
        return Gradients(d_x, self._sums, self._inner_sums, self._convolutions.like_weights(found, weights))

    def _reader(self, unit: Unit, statistics: Statistics, gradients: Tensor, first: int) -> Reader:
        """That of a unit; `first` is the place of its first channel in the corrections."""
        correction = self._corrections[:, first : first + unit.reads] if unit.frozen is None else None
        return Reader(unit.norm(statistics, self._wide), gradients[:, : unit.reads], correction)

    def _through_reader(self, number: int, unit: Unit, arriving: Arriving) -> None:
        """Back through a unit that reads the block's maps: what comes out is added to G, at once or with others."""
        reader, needed = self._readers[number], self._needs.pop()
        maps = self._made.maps[:, : unit.reads]
        if self._convolutions.accumulates(unit):
            if self._waiting:
                self._flush(unit.reads)
            carry, out = self._carried(0, unit.reads), self._room(unit.reads)
            self._weights.append(self._convolutions.accumulate(unit, maps, reader, arriving, needed, carry, out))
            self._carry = out
            return
        came, d_weight = self._convolutions.backward(unit, maps, reader.norm, arriving, needed)
        self._weights.append(d_weight)
        self._waiting.insert(0, Consumer(came, reader))
        if len(self._waiting) == WAITING and number > 0:
            self._flush(unit.reads)

    def _flush(self, channels: int) -> None:
        """Add all that waits to G of the first channels."""
        out = self._room(channels)
        self._gather(0, channels, out)
        self._carry = out
        self._waiting.clear()

    def _through_inner(self, number: int, unit: Unit, arriving: Arriving) -> Arriving:
        """Back through a second unit, to the gradient of what the first one's convolution made."""
        maps, width = self._made.inner[number], unit.reads
        statistics = self._made.inner_statistics.narrow(number * width, (number + 1) * width)
        first = self._made.maps.shape[1] + number * width
        reader = self._reader(unit, statistics, self._inner_sums[number], first)
        if self._between is None:
            self._between = new_maps(maps, width, self._wide)
        total, needed = self._between, self._needs.pop()
        self._weights.append(self._convolutions.accumulate(unit, maps, reader, arriving, needed, None, total))
        correction = self._correction(reader.norm.mean, first, first + width) if unit.frozen is None else None
        return Arriving(total, maps, correction, self._next_mask(), self._block.keep, owned=True)

    def _room(self, channels: int) -> Tensor:
        """The first channels of the buffer of G."""
        if self._buffer is None:
            self._buffer = new_buffer(self._made.maps, channels)
        return self._buffer[:, :channels]

    def _carried(self, start: int, stop: int) -> Tensor | None:
        return None if self._carry is None else self._carry[:, start:stop]

    def _slot(self, start: int, stop: int, mask: Tensor | None) -> Arriving:
        """The gradient of what was stored as the block's maps `start` to before `stop`."""
        maps = self._made.maps[:, start:stop]
        if self._waiting:
            total = new_maps(maps, stop - start, self._wide)
            self._gather(start, stop, total)
        else:
            assert self._carry is not None
            total = self._carry[:, start:stop]
        correction = None
        if any(unit.frozen is None for unit in self._block.readers):
            correction = self._correction(self._made.statistics.mean[start:stop], start, stop)
        return Arriving(total, maps, correction, mask, self._block.keep)

    def _gather(self, start: int, stop: int, out: Tensor) -> None:
        """Put G of a range of channels and what waits into `out`."""
        consumers = [
            Consumer(gradient[:, start:stop], reader.narrow(start, stop)) for gradient, reader in self._waiting
        ]
        self._kernels.gather(self._made.maps[:, start:stop], consumers, self._carried(start, stop), out)

    def _correction(self, mean: Tensor, start: int, stop: int) -> Correction:
        return Correction(mean, *self._block.reduction.total(self._corrections[:, start:stop], self._count))

    def _next_mask(self) -> Tensor | None:
        return self._masks.pop() if self._masks else None

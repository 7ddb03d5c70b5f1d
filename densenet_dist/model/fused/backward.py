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
from typing import NamedTuple

import torch
from torch import Tensor

from densenet_dist.model.fused.own_convolutions import choose_convolutions
from densenet_dist.model.fused.structure import Forward, Gradients, Structure, Unit, new_maps
from densenet_dist.model.kernels.interface import MOST_CONSUMERS, Consumer, Kernels, Norm, accumulation_type

WAITING = MOST_CONSUMERS
"""How many layers' gradients wait: more of them cost memory and save traffic."""


class _Waiting(NamedTuple):
    """What came back to a reader that is not yet counted in the maps below it."""

    reader: int
    gradient: Tensor
    norm: Norm


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
        maps = made.maps
        self._kernels, self._block, self._made = kernels, block, made
        self._masks, self._needs = list(masks), list(need_weights)
        self._wide = accumulation_type(maps.dtype)
        self._count = maps.numel() // maps.shape[1]
        self._convolutions = choose_convolutions(kernels, maps, block.units)
        self._norms = [unit.norm(made.statistics, self._wide) for unit in block.readers]
        self._sums = maps.new_zeros((len(self._norms), 2, maps.shape[1]), dtype=self._wide)
        self._shares = _shares_of(block.readers, self._norms, self._sums)
        self._inner_gradients: list[Tensor] = []  # last layer first, as are these:
        self._weights: list[Tensor | None] = []
        self._waiting: list[_Waiting] = []
        self._carry: Tensor | None = None  # G without what waits; at first the gradient of the maps themselves
        self._buffer: Tensor | None = None
        self._between: Tensor | None = None  # what comes back to the maps between two convolutions: one layer at a time

    def run(self, gradient: Tensor, need_x: bool) -> Gradients:
        """Compute them from that of `Forward.out`, or without a tail of `Forward.maps`; channels_last."""
        layers, widths = self._block.layers, self._block.widths
        tail = self._block.tail
        if tail is None:
            self._carry = gradient
        else:
            self._through_reader(len(layers), tail, self._padded(tail, gradient))
        for number, (start, stop) in reversed(list(enumerate(pairwise(widths)))):
            layer = layers[number]
            d_made = self._d_slot(start, stop, self._next_mask(), self._convolutions.padded(stop - start))
            if len(layer) == 2:
                d_made = self._through_inner(number, layer[1], d_made)
            self._through_reader(number, layer[0], d_made)
        d_x = self._d_slot(0, widths[0], None, widths[0])
        for sums, norm in zip(self._sums, self._norms, strict=True):
            sums[:, : len(norm.gamma)] *= _betas_and_gammas(norm)
        inner = self._inner_gradients[::-1]
        d_inner = torch.stack(inner) if inner else self._sums.new_empty(0, 2, 0)
        weights = [weight for weight in reversed(self._weights) if weight is not None]
        return Gradients(d_x if need_x else None, self._sums, d_inner, weights)

    def _through_reader(self, number: int, unit: Unit, d_made: Tensor) -> None:
        """Back through a unit that reads the block's maps: what comes out is added to G, at once or with others."""
        norm, needed = self._norms[number], self._needs.pop()
        maps = self._made.maps[:, : unit.reads]
        if self._convolutions.accumulates(unit) and not self._waiting:
            sums = self._sums.new_empty(2, unit.reads)
            carry, out = self._carried(0, unit.reads), self._room(unit.reads)
            self._weights.append(self._convolutions.accumulate(unit, maps, norm, d_made, needed, carry, out, sums))
            self._sums[number, :, : unit.reads] = sums
            self._carry = out
            return
        came, d_weight = self._convolutions.backward(unit, maps, norm, d_made, needed)
        self._weights.append(d_weight)
        self._waiting.insert(0, _Waiting(number, came, norm))
        if len(self._waiting) == WAITING and number > 0:
            out = self._room(unit.reads)
            self._gather(0, unit.reads, out)
            self._carry = out
            self._waiting.clear()

    def _through_inner(self, number: int, unit: Unit, d_made: Tensor) -> Tensor:
        """Back through a second unit, to the gradient of what the first one's convolution made."""
        maps, width = self._made.inner[number], unit.reads
        norm = unit.norm(self._made.inner_statistics.narrow(number * width, (number + 1) * width), self._wide)
        if self._between is None:
            self._between = new_maps(maps, width, self._wide)
        sums, total = self._sums.new_empty(2, width), self._between
        needed = self._needs.pop()
        self._weights.append(self._convolutions.accumulate(unit, maps, norm, d_made, needed, None, total, sums))
        self._inner_gradients.append(sums * _betas_and_gammas(norm))
        shares = _shares(unit, norm)
        correction = None if shares is None else self._correction(norm.mean, shares * sums)
        padded = self._convolutions.padded(width)
        out = total if total.dtype == maps.dtype and padded == width else new_maps(maps, padded)
        self._kernels.finish(total, maps, correction, self._next_mask(), self._block.keep, out)
        return out

    def _room(self, channels: int) -> Tensor:
        """The first channels of the buffer of G."""
        if self._buffer is None:
            self._buffer = new_maps(self._made.maps, channels)
        return self._buffer[:, :channels]

    def _carried(self, start: int, stop: int) -> Tensor | None:
        return None if self._carry is None else self._carry[:, start:stop]

    def _d_slot(self, start: int, stop: int, mask: Tensor | None, padded: int) -> Tensor:
        """The gradient of what was stored as the block's maps `start` to before `stop`, dropout included."""
        maps = self._made.maps[:, start:stop]
        if self._waiting:
            total = new_maps(maps, stop - start, self._wide)
            self._gather(start, stop, total)
        else:
            assert self._carry is not None
            total = self._carry[:, start:stop]
        correction = None
        if self._shares is not None:
            shares = (self._shares[:, :, start:stop] * self._sums[:, :, start:stop]).sum(0)
            correction = self._correction(self._made.statistics.mean[start:stop], shares)
        out = new_maps(maps, padded)
        self._kernels.finish(total, maps, correction, mask, self._block.keep, out)
        return out

    def _gather(self, start: int, stop: int, out: Tensor) -> None:
        """Add what waits to G for a range of channels, and keep the sums."""
        sums = self._sums.new_empty(len(self._waiting), 2, stop - start)
        consumers = [
            Consumer(waiting.gradient[:, start:stop], waiting.norm.narrow(start, stop), into)
            for waiting, into in zip(self._waiting, sums, strict=True)
        ]
        self._kernels.gather(self._made.maps[:, start:stop], consumers, self._carried(start, stop), out)
        first = self._waiting[0].reader
        self._sums[first : first + len(sums), :, start:stop] = sums

    def _correction(self, mean: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        offset, slope = self._block.reduction.average(sums, self._count)
        return mean, offset, slope

    def _next_mask(self) -> Tensor | None:
        return self._masks.pop() if self._masks else None

    def _padded(self, tail: Unit, gradient: Tensor) -> Tensor:
        """A gradient from outside with as many channels as the tail's convolution made."""
        channels = self._convolutions.padded(tail.makes)
        if tail.weight is None or channels == tail.makes:
            return gradient
        out = new_maps(gradient, channels)
        self._kernels.finish(gradient, gradient, None, None, 1.0, out)
        return out


def _betas_and_gammas(norm: Norm) -> Tensor:
    """What turns the sums over g and g (x - mean) into the gradients of beta and gamma: (2, C)."""
    rstd = torch.rsqrt(norm.var + norm.eps)
    return torch.stack([torch.ones_like(rstd), rstd])


def _shares(unit: Unit, norm: Norm) -> Tensor | None:
    """What turns the same sums into M times offset and slope: (2, C); None where the statistics are constants."""
    if unit.frozen is not None:
        return None
    scale = norm.scale()
    return torch.stack([scale, scale / (norm.var + norm.eps)])


def _shares_of(readers: Sequence[Unit], norms: Sequence[Norm], like: Tensor) -> Tensor | None:
    """`_shares` of all readers, zero where a reader reads no further: (readers, 2, all maps)."""
    found = [_shares(unit, norm) for unit, norm in zip(readers, norms, strict=True)]
    if all(shares is None for shares in found):
        return None
    out = torch.zeros_like(like)
    for into, shares in zip(out, found, strict=True):
        if shares is not None:
            into[:, : shares.shape[1]] = shares
    return out

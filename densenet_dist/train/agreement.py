"""What all ranks decide together a few times a second: whether a loss was not finite, whether to save, or to leave."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from densenet_dist.train.context import RunContext
from densenet_dist.train.metrics import FiniteWatch, gather_ranks
from densenet_dist.train.pulse import Wish

MOST_STEPS = 50
"""Steps between two looks at most: each is a host sync and a collective call."""
_EVERY_S = 0.5


@dataclass(frozen=True)
class Decision:
    """The same on every rank.

    Attributes:
        not_finite: the first step whose loss was NaN or infinite, on any rank.
        wish: the greatest that any rank was asked for.
    """

    not_finite: int | None
    wish: Wish


class Agreement:
    """When the ranks look, and at what.

    They look after the process' first step, then about twice a second by rank 0's clock, but at least every
    `MOST_STEPS` steps.
    """

    def __init__(self, context: RunContext, finite: FiniteWatch) -> None:
        self._context, self._finite = context, finite
        self._gap = 1
        self._steps = 0
        self._looked = time.perf_counter()

    def due(self) -> bool:
        """Whether to look after this step; called once a step, with the same answer on every rank."""
        self._steps += 1
        alone = self._context.world_size == 1
        return self._steps >= self._gap or (alone and self._context.pulse.wish is not Wish.NOTHING)

    def look(self, wish: Wish = Wish.NOTHING) -> Decision:
        """Tell the others what this rank was asked for, or wishes for itself, and hear. A collective call."""
        pulse = self._context.pulse
        mine = torch.tensor([max(wish, pulse.wish), self._next_gap()], device=self._context.device)
        every = gather_ranks(torch.cat([self._finite.step[None], mine])).tolist()
        self._gap, self._steps = every[0][2], 0
        first = min(row[0] for row in every)
        if pulse.wish is Wish.SAVE:
            pulse.wish = Wish.NOTHING  # it is on its way
        return Decision(None if first == FiniteWatch.NEVER else first, Wish(max(row[1] for row in every)))

    def _next_gap(self) -> int:
        now = time.perf_counter()
        step_s = (now - self._looked) / max(self._steps, 1)
        self._looked = now
        return max(1, min(2 * self._gap, int(_EVERY_S / step_s), MOST_STEPS))

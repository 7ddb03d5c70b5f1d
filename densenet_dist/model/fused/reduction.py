"""Batch statistics of one rank, or of all ranks together (SyncBN)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Reduction:
    """Sums over all ranks if `synchronised`, else over this rank. Ranks may have different numbers of images.

    Sums are float64, because a mean far from zero must not cancel the variance.
    """

    synchronised: bool = False

    def merge(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Replace this rank's mean and variance (C,) of `count` values each by those of all ranks.

        One all-reduce of 2 C + 1 numbers.
        """
        if not self.synchronised:
            return
        local, square = mean.double(), var.double()
        if count == 0:  # a rank without images has NaN statistics, which must not spread
            local, square = torch.zeros_like(local), torch.zeros_like(square)
        sums = torch.cat([local * count, (square + local.square()) * count, local.new_full((1,), count)])
        dist.all_reduce(sums)
        total = sums / sums[-1]
        global_mean, second_moment = total[:-1].chunk(2)
        mean.copy_(global_mean)
        var.copy_((second_moment - global_mean.square()).clamp_(min=0))

    def total(self, sums: Tensor, count: int) -> tuple[Tensor, float]:
        """Return sums (2, C) and the number of values they are over.

        Synchronised: the sums of all ranks divided by that number, and 1, because reading the number from a GPU would
        wait for it.
        """
        if not self.synchronised:
            return sums, max(count, 1)
        flat = torch.cat([sums.double().flatten(), sums.new_full((1,), count, dtype=torch.float64)])
        dist.all_reduce(flat)
        return (flat[:-1] / flat[-1]).to(sums.dtype).view_as(sums), 1.0

    def count(self, values: int, device: torch.device) -> Tensor:
        """Return the number of values of all ranks, (1,), float64; an empty tensor if not synchronised."""
        if not self.synchronised:
            return torch.empty(0, dtype=torch.float64, device=device)
        total = torch.full((1,), values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total

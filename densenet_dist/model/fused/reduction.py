"""What batch statistics are taken over: this process' maps, or those of all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Reduction:
    """Sums over ranks where `synchronised`; nothing where not. Ranks may have unequal numbers of images.

    Sums are float64: a mean far from zero must not swallow the variance.
    """

    synchronised: bool = False

    def merge(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Turn this rank's mean and variance (C,) of `count` values each into those of all ranks', in place.

        One collective call of 2 C + 1 numbers.
        """
        if not self.synchronised:
            return
        local, square = mean.double(), var.double()
        if count == 0:  # a rank may be without images: its NaN must not count
            local, square = torch.zeros_like(local), torch.zeros_like(square)
        sums = torch.cat([local * count, (square + local.square()) * count, local.new_full((1,), count)])
        dist.all_reduce(sums)
        total = sums / sums[-1]
        middle, second = total[:-1].chunk(2)
        mean.copy_(middle)
        var.copy_((second - middle.square()).clamp_(min=0))

    def total(self, sums: Tensor, count: int) -> tuple[Tensor, float]:
        """Return sums (2, C) over this rank's `count` values and that, or the mean over all ranks' values and 1."""
        if not self.synchronised:
            return sums, max(count, 1)
        flat = torch.cat([sums.double().flatten(), sums.new_full((1,), count, dtype=torch.float64)])
        dist.all_reduce(flat)
        return (flat[:-1] / flat[-1]).to(sums.dtype).view_as(sums), 1.0

    def count(self, values: int, device: torch.device) -> Tensor:
        """How many values a statistic is over, all ranks together: (1,), float64; empty where not synchronised."""
        if not self.synchronised:
            return torch.empty(0, dtype=torch.float64, device=device)
        total = torch.full((1,), values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total

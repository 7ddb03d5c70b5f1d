"""The fused dense block in several processes: DDP, and batch statistics over all ranks."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from fused import assert_same, small_net, state_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from densenet_dist.model.fused.forward import merge_over_ranks
from densenet_dist.model.kernels.interface import Statistics
from densenet_dist.model.sync_bn import synchronize_batchnorm

IMAGES = 7
SHARES = [slice(0, 2), slice(2, IMAGES)]
CHANNELS = 5


def images(channels: int = 3, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(IMAGES, channels, 8, 8, generator=generator, dtype=torch.float64) + mean
    return x, torch.randn(IMAGES, 3, generator=generator, dtype=torch.float64)


def step(model: nn.Module, x: Tensor, weights: Tensor, factor: float = 1.0) -> dict[str, Any]:
    """Run a step with the sum of the loss, scaled so that DDP's average is the sum over all images."""
    x = x.clone().requires_grad_()
    logits = model(x)
    (((logits * weights).sum() + logits.square().sum()) * factor).backward()
    module = model.module if isinstance(model, DistributedDataParallel) else model
    return {"logits": logits.detach(), "x": x.grad / factor, **state_of(module)}


FORMS = {"reference": (torch.float32, 1e-3), "fused": (torch.float64, 1e-10)}
"""Each form with the dtype in which its synchronized batch norms compute, and a tolerance."""


def synchronized_steps(variant: str) -> dict[str, Any]:
    found = {}
    own = SHARES[dist.get_rank()]
    for form, (dtype, _) in FORMS.items():
        x, weights = (tensor[own].to(dtype) for tensor in images(mean=3.0))
        model = DistributedDataParallel(synchronize_batchnorm(small_net(form, variant).to(dtype)))
        found[form] = step(model, x, weights, 2.0)
        model.eval()
        with torch.no_grad():
            found[form]["judged"] = model(x)
    return found


@pytest.mark.parametrize("variant", ["notebook", "densenet_bc"])
def test_synchronized_ranks_with_unequal_shares_together_equal_one_process(variant: str) -> None:
    synchronized = run_ranks(synchronized_steps, 2, variant)
    for form, (dtype, atol) in FORMS.items():
        x, weights = (tensor.to(dtype) for tensor in images(mean=3.0))
        model = small_net(form, variant).to(dtype)
        whole = step(model, x, weights)
        # Statistics of one rank's share give different logits, so the test can fail.
        alone = step(small_net(form, variant).to(dtype), x[SHARES[0]], weights[SHARES[0]])
        assert (alone["logits"] - whole["logits"][SHARES[0]]).abs().max() > 10 * atol
        model.eval()
        with torch.no_grad():
            whole["judged"] = model(x)
        ranks = [rank[form] for rank in synchronized]
        for name in ("logits", "x", "judged"):
            joined = torch.cat([rank.pop(name) for rank in ranks])
            torch.testing.assert_close(joined, whole.pop(name), rtol=0, atol=atol)
        for rank in ranks:
            assert_same(rank, whole, atol)


def merged() -> list[tuple[Tensor, Tensor]]:
    """Return float32 statistics over all ranks, from the fused block and from the batch norm."""
    x = far_from_zero()[SHARES[dist.get_rank()]]
    mean, var = x.double().mean((0, 2, 3)).float(), x.double().var((0, 2, 3), correction=0).float()
    merge_over_ranks(Statistics(mean, var), x.numel() // x.shape[1])
    net = synchronize_batchnorm(nn.Sequential(nn.BatchNorm2d(CHANNELS, momentum=1.0)))
    net(x)
    count = IMAGES * x[0, 0].numel()
    return [(mean, var), (net[0].running_mean, net[0].running_var * (count - 1) / count)]


def far_from_zero() -> Tensor:
    x = images(CHANNELS)[0].float()
    x[:, 1] += 1e4
    x[:, 2] = x[:, 2] * 1e-3 + 10
    x[:, 3] = 1 / 3
    return x


def test_statistics_of_all_ranks_survive_a_mean_far_from_zero() -> None:
    x, varies = far_from_zero().double(), [0, 1, 2, 4]
    exact = x.var((0, 2, 3), correction=0)
    for mean, var in itertools.chain(*run_ranks(merged, 2)):
        torch.testing.assert_close(mean.double(), x.mean((0, 2, 3)), rtol=1e-6, atol=1e-8)
        # Ranks exchange float32, with a resolution of 5e-4 for a mean of 1e4 and 5e-7 for a mean of 10.
        torch.testing.assert_close(var.double()[varies], exact[varies], rtol=1e-3, atol=0)
        assert 0 <= var[3] < 1e-12

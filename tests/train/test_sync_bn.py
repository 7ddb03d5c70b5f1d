"""BatchNorm over ranks with unequal shares equals BatchNorm over the whole batch in one process."""

import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import nn

from densenet_dist.model.sync_bn import SyncBatchNorm, synchronise_batchnorm

CHANNELS = 5
SHARES = [slice(0, 1), slice(1, 4), slice(4, 11)]


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False),
        nn.BatchNorm2d(CHANNELS, momentum=0.01, eps=1e-3),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False),
        nn.BatchNorm2d(CHANNELS),
    )
    with torch.no_grad():
        for module in (model[1], model[4]):
            module.weight.copy_(torch.rand(CHANNELS) + 0.5)
            module.bias.copy_(torch.randn(CHANNELS))
    return model.to(memory_format=torch.channels_last)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(11, 3, 6, 6, generator=generator) * 3 + 100  # far from zero, where a poor variance would show
    return x.to(memory_format=torch.channels_last), torch.randn(11, CHANNELS, 6, 6, generator=generator)


def run(model: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    (out * weight).sum().backward()
    model.eval()
    judged = model(x)
    grads = {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()}
    state = {f"state {name}": tensor.clone() for name, tensor in model.state_dict().items()}
    return {"out": out.detach(), "x": x.grad, "eval": judged.detach(), **grads, **state}


def run_share() -> dict[str, torch.Tensor]:
    model = net()
    names, parameters = list(model.state_dict()), list(model.parameters())
    assert synchronise_batchnorm(model) is model
    assert sum(isinstance(module, SyncBatchNorm) for module in model.modules()) == 2
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    share = SHARES[dist.get_rank()]
    x, weight = images()
    found = run(model, x[share], weight[share])
    for name, tensor in found.items():
        if name.startswith("grad"):
            dist.all_reduce(tensor)  # as DDP does, but for the mean
    return found


def test_ranks_with_unequal_shares_equal_one_process():
    whole = run(net(), *images())
    ranks = run_ranks(run_share, 3)
    for name, tensor in whole.items():
        if name in ("out", "x", "eval"):
            joined = torch.cat([rank[name] for rank in ranks])
            torch.testing.assert_close(joined, tensor, rtol=1e-5, atol=1e-5)
        else:
            for rank in ranks:
                torch.testing.assert_close(rank[name], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()))
                assert torch.equal(rank[name], ranks[0][name]), name
    assert float((whole["out"] - whole["eval"]).abs().max()) > 0.1  # eval is another thing than training
    # The test can tell: statistics of a share alone are others.
    x, weight = images()
    alone = run(net(), x[:3], weight[:3])
    assert float((alone["out"] - whole["out"][:3]).abs().max()) > 0.01

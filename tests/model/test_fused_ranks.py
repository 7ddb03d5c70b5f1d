"""The fused dense block over several processes: DDP, and batch statistics of all ranks together."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from densenet_dist.model import DenseNet, densenet
from densenet_dist.model.forms import dense_block
from densenet_dist.model.fused.reduction import Reduction
from densenet_dist.model.sync_bn import synchronise_batchnorm

IMAGES = 7
SHARES = {"equal": [slice(0, 3), slice(3, 6)], "unequal": [slice(0, 2), slice(2, IMAGES)]}
LAYERS, CHANNELS, GROWTH, BN_SIZE = 3, 5, 4, 2
Found = dict[str, Tensor]


def seeded(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    return model.double().to(memory_format=torch.channels_last)


def net(form: str, variant: str, drop_rate: float = 0.0) -> DenseNet:
    torch.manual_seed(0)
    compression = {"compression": 0.5} if variant == "notebook" else {}
    return seeded(
        densenet(
            variant,
            num_classes=3,
            block=form,
            growth_rate=4,
            num_layers=(3, 2),
            image_size=8,
            drop_rate=drop_rate,
            **compression,
        )
    )


def block(bn_size: int | None) -> nn.Module:
    torch.manual_seed(0)
    norm = partial(nn.BatchNorm2d, momentum=0.01, eps=1e-3)
    made = dense_block(
        "fused",
        num_layers=LAYERS,
        in_channels=CHANNELS,
        growth_rate=GROWTH,
        bn_size=bn_size,
        drop_rate=0.0,
        norm=norm,
    )
    return seeded(made)


def images(channels: int = 3, mean: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(IMAGES, channels, 8, 8, generator=generator, dtype=torch.float64) + mean
    return x, torch.randn(IMAGES, 3, generator=generator, dtype=torch.float64)


def loss_of(logits: Tensor, weights: Tensor) -> Tensor:
    return (logits * weights).sum() + logits.square().sum()


def step(model: nn.Module, x: Tensor, weights: Tensor, factor: float = 1.0) -> Found:
    """Sum the loss over the images, scaled so that DDP's average over ranks is the sum over all images."""
    x = x.clone().requires_grad_()
    logits = model(x)
    (loss_of(logits, weights) * factor).backward()
    return {"logits": logits.detach(), "x": x.grad / factor, **state_of(model)}


def state_of(model: nn.Module) -> Found:
    model = model.module if isinstance(model, DistributedDataParallel) else model
    gradients = {f"{name}.grad": parameter.grad.clone() for name, parameter in model.named_parameters()}
    return gradients | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found: Found, expected: Found, atol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


CASES = [
    ("notebook", "equal", 0.0),
    ("notebook", "unequal", 0.2),
    ("densenet_bc", "equal", 0.2),
    ("densenet_bc", "unequal", 0.0),
]


def ddp_steps() -> dict[str, Any]:
    """Steps of both forms under DDP, and of the fused one without."""
    rank, found = dist.get_rank(), {}
    x, weights = images()
    for variant, share, drop_rate in CASES:
        own = SHARES[share][rank]
        for form in ("reference", "fused"):
            model = DistributedDataParallel(net(form, variant, drop_rate))
            torch.manual_seed(rank)
            found[variant, share, form] = step(model, x[own], weights[own], 2.0)
        alone = net("fused", variant, drop_rate)
        torch.manual_seed(rank)
        found[variant, share, "alone"] = step(alone, x[own], weights[own])
    return found


@pytest.fixture(scope="module")
def ddp() -> list[dict[str, Any]]:
    return run_ranks(ddp_steps, 2)


@pytest.mark.parametrize(("variant", "share", "drop_rate"), CASES)
def test_ddp_averages_the_gradients_of_the_ranks(
    ddp: list[dict[str, Any]], variant: str, share: str, drop_rate: float
) -> None:
    for rank in ddp:
        assert_same(rank[variant, share, "fused"], rank[variant, share, "reference"])
    summed = {
        name: sum(rank[variant, share, "alone"][name] for rank in ddp)
        for name in ddp[0][variant, share, "fused"]
        if name.endswith(".grad")
    }
    assert len(summed) > 10
    for rank in ddp:
        assert_same({name: rank[variant, share, "fused"][name] for name in summed}, summed)
    first, second = (rank[variant, share, "alone"]["classifier.weight.grad"] for rank in ddp)
    assert (first - second).abs().max() > 0.01


def accumulated(as_view: bool) -> dict[str, Found]:
    """Two parts of a step, the first without communication; then a second step."""
    x, weights = images()
    own = SHARES["unequal"][dist.get_rank()]
    found = {}
    for form in ("reference", "fused"):
        model = DistributedDataParallel(net(form, "densenet_bc"), gradient_as_bucket_view=as_view)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for number in range(2):
            with model.no_sync():
                step(model, x[own].flip(0), weights[own])
            found[f"{form} {number}"] = step(model, x[own], weights[own])
            optimizer.step()
            optimizer.zero_grad()
    return found


@pytest.mark.parametrize("as_view", [False, True], ids=["", "gradient_as_bucket_view"])
def test_gradients_add_up_before_they_are_averaged(as_view: bool) -> None:
    first, second = run_ranks(accumulated, 2, as_view)
    for rank in (first, second):
        for number in range(2):
            assert_same(rank[f"fused {number}"], rank[f"reference {number}"], 1e-9)
    name = "features.conv0.weight.grad"
    assert torch.equal(first["fused 1"][name], second["fused 1"][name])
    assert not torch.equal(first["fused 0"][name], first["fused 1"][name])


SYNCHRONISED = [(variant, share) for variant in ("notebook", "densenet_bc") for share in ("equal", "unequal")]


def synchronised_steps() -> dict[str, Any]:
    rank, found = dist.get_rank(), {}
    x, weights = images(mean=3.0)
    for variant, share in SYNCHRONISED:
        own = SHARES[share][rank]
        model = DistributedDataParallel(synchronise_batchnorm(net("fused", variant)))
        found[variant, share] = step(model, x[own], weights[own], 2.0)
        model.eval()
        with torch.no_grad():
            found[variant, share]["judged"] = model(x[own])
    return found


@pytest.fixture(scope="module")
def synchronised() -> list[dict[str, Any]]:
    return run_ranks(synchronised_steps, 2)


@pytest.mark.parametrize(("variant", "share"), SYNCHRONISED)
def test_synchronised_ranks_together_equal_one_process(
    synchronised: list[dict[str, Any]], variant: str, share: str
) -> None:
    x, weights = images(mean=3.0)
    seen = slice(0, SHARES[share][1].stop)
    model = net("fused", variant)
    whole = step(model, x[seen], weights[seen])
    model.eval()
    with torch.no_grad():
        whole["judged"] = model(x[seen])
    ranks = [rank[variant, share] for rank in synchronised]
    for rank in ranks:
        apart = ("logits", "x", "judged")
        assert_same(
            {n: t for n, t in rank.items() if n not in apart}, {n: t for n, t in whole.items() if n not in apart}
        )
    for name in apart:
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), whole[name], rtol=0, atol=1e-10)
    # The test can tell: statistics of a share alone are others.
    alone = step(net("fused", variant), x[SHARES[share][0]], weights[SHARES[share][0]])
    assert (alone["logits"] - whole["logits"][SHARES[share][0]]).abs().max() > 0.01


@contextmanager
def counted(sizes: list[int]) -> Iterator[None]:
    """Note how many numbers each all-reduce sums."""
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = original


def collective_calls(bn_size: int | None) -> dict[str, list[int]]:
    forward: list[int] = []
    backward: list[int] = []
    judged: list[int] = []
    model = synchronise_batchnorm(block(bn_size))
    x = images(CHANNELS)[0][SHARES["unequal"][dist.get_rank()]].requires_grad_()
    with counted(forward):
        y = model(x)
    with counted(backward):
        y.square().sum().backward()
    with counted(judged), torch.no_grad():
        model.eval()(x)
    return {"forward": forward, "backward": backward, "judged": judged}


@pytest.mark.parametrize("bn_size", [None, BN_SIZE], ids=["plain", "bottleneck"])
def test_one_collective_call_a_convolution_and_direction(bn_size: int | None) -> None:
    """Of a mean and a variance for each map that it makes and of the count: not of each map that a layer reads."""
    made = [GROWTH] if bn_size is None else [BN_SIZE * GROWTH, GROWTH]
    expected = [2 * CHANNELS + 1] + [2 * maps + 1 for maps in made] * LAYERS
    for calls in run_ranks(collective_calls, 2, bn_size):
        assert [size for size in calls["forward"] if size > 1] == expected
        assert calls["forward"].count(1) <= 1  # the count, once a block
        assert calls["backward"] == expected[::-1]
        assert calls["judged"] == []


def merged() -> tuple[Tensor, Tensor]:
    """Statistics in float32 of far and of constant channels, as two kernels would have taken them."""
    x = far_from_zero()[SHARES["unequal"][dist.get_rank()]].double()
    mean, var = x.mean((0, 2, 3)).float(), x.var((0, 2, 3), correction=0).float()
    Reduction(True).merge(mean, var, x.numel() // x.shape[1])
    return mean, var


def far_from_zero() -> Tensor:
    x = images(CHANNELS)[0].float()
    x[:, 1] += 1e4
    x[:, 2] = x[:, 2] * 1e-3 + 10
    x[:, 3] = 1 / 3
    return x


def test_merged_statistics_survive_a_mean_far_from_zero() -> None:
    expected = far_from_zero().double()
    for mean, var in run_ranks(merged, 2):
        torch.testing.assert_close(mean.double(), expected.mean((0, 2, 3)), rtol=1e-6, atol=1e-8)
        varies = [0, 1, 2, 4]
        exact = expected.var((0, 2, 3), correction=0)
        # Ranks hand on float32: of a mean of 1e4 no more than 5e-4 is known, of one of 10 no more than 5e-7.
        torch.testing.assert_close(var.double()[varies], exact[varies], rtol=1e-3, atol=0)
        assert 0 <= var[3] < 1e-12


def empty_share(form: str) -> Found:
    x, weights = (tensor.float() for tensor in images())
    own = [slice(0, 0), slice(0, IMAGES)][dist.get_rank()]
    model = DistributedDataParallel(synchronise_batchnorm(net(form, "densenet_bc").float()))
    found = step(model, x[own], weights[own], 2.0)
    return {name: tensor for name, tensor in found.items() if name not in ("logits", "x")}


@pytest.mark.parametrize("form", ["reference", "fused"])
def test_a_rank_without_images_changes_nothing(form: str) -> None:
    whole = step(net("reference", "densenet_bc").float(), *(tensor.float() for tensor in images()))
    for rank in run_ranks(empty_share, 2, form):
        assert_same(rank, {name: whole[name] for name in rank}, 1e-3)


def one_value_each() -> list[str]:
    """One pixel on every rank: one process would refuse, together there are two values a channel."""
    model = synchronise_batchnorm(block(None))
    x = images(CHANNELS)[0][dist.get_rank(), :, :1, :1][None].requires_grad_()
    y = model(x)
    y.sum().backward()
    return [name for name, tensor in {"y": y, "x": x.grad, **state_of(model)}.items() if not tensor.isfinite().all()]


def test_one_value_on_each_rank_is_enough() -> None:
    assert run_ranks(one_value_each, 2) == [[], []]


def half_precision() -> tuple[torch.dtype, torch.dtype, Tensor, Tensor]:
    model = synchronise_batchnorm(net("fused", "densenet_bc").float())
    x, weights = (tensor.float() for tensor in images())
    own = SHARES["unequal"][dist.get_rank()]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x[own])
    loss_of(logits.float(), weights[own]).backward()
    norm = model.features.norm5
    return logits.dtype, norm.running_var.dtype, logits.detach().float(), norm.running_var


def test_half_precision_is_counted_in_float32() -> None:
    first, second = run_ranks(half_precision, 2)
    expected = net("fused", "densenet_bc").float()
    logits = expected(images()[0].float()).detach()
    assert first[:2] == second[:2] == (torch.bfloat16, torch.float32)
    assert torch.equal(first[3], second[3])
    assert (torch.cat([first[2], second[2]]) - logits).norm() < 0.1 * logits.norm()
    torch.testing.assert_close(first[3], expected.features.norm5.running_var, rtol=0.02, atol=0.02)


COMPILED = ["ddp", "ddp, dropout", "synchronised"]


def compiled_steps() -> dict[str, dict[str, Found]]:
    x, weights = images()
    own = SHARES["unequal"][dist.get_rank()]
    found: dict[str, dict[str, Found]] = {}
    for name in COMPILED:
        found[name] = {}
        for way in ("eager", "compiled"):
            torch._dynamo.reset()
            if name == "synchronised":
                model = synchronise_batchnorm(net("fused", "densenet_bc"))
            else:
                model = DistributedDataParallel(net("fused", "notebook", 0.2 if "dropout" in name else 0.0))
            run = torch.compile(model, backend="aot_eager") if way == "compiled" else model
            torch.manual_seed(dist.get_rank())
            for _ in range(2):
                logits = run(x[own])
                loss_of(logits, weights[own]).backward()
            found[name][way] = {"logits": logits.detach(), **state_of(model)}
    return found


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, dict[str, Found]]]:
    return run_ranks(compiled_steps, 2)


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_net_over_ranks_is_the_same(compiled: list[dict[str, dict[str, Found]]], name: str) -> None:
    for rank in compiled:
        assert_same(rank[name]["compiled"], rank[name]["eager"])

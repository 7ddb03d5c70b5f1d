"""DenseNet: its definition, torchvision's weights, names, initialization, memory format and torch.compile."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from densenet_dist.model import DenseNet
from densenet_dist.model.grad_cam import grad_cam, has_heat_maps
from densenet_dist.model.variants import densenet

VARIANTS = ["notebook", "densenet_bc", "densenet121"]


def small(variant: str, **options: Any) -> DenseNet:
    """Build a variant with seeded weights, by default with 2 layers per block and a growth rate of 6."""
    torch.manual_seed(0)
    narrow: dict[str, Any] = {"growth_rate": 6, "num_layers": 2}
    if variant == "notebook":
        narrow["compression"] = 0.5
    return densenet(variant, **{"num_classes": 10, **narrow, **options})


def images(side: int = 32) -> Tensor:
    """Return four seeded images, float32, contiguous."""
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))


def definition(x: Tensor, params: dict[str, Tensor], *, num_layers: int, blocks: int, eps: float, head: str) -> Tensor:
    """Compute a CIFAR network in training mode without dropout, from the definition in the papers.

    Checkpoints depend on the names of its parameters: if they change, the old ones must still load.
    """

    def norm_relu(x: Tensor, name: str) -> Tensor:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        y = (x - mean) * torch.rsqrt(variance + eps)
        return F.relu(y * params[f"{name}.weight"][:, None, None] + params[f"{name}.bias"][:, None, None])

    def conv(x: Tensor, name: str) -> Tensor:
        weight = params[f"{name}.weight"]
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def pool(x: Tensor) -> Tensor:
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4

    x = conv(x, "features.conv0")
    for b in range(1, blocks + 1):
        for i in range(1, num_layers + 1):
            layer, y = f"features.denseblock{b}.denselayer{i}", x
            for j in (1, 2) if f"{layer}.conv2.weight" in params else (1,):
                y = conv(norm_relu(y, f"{layer}.norm{j}"), f"{layer}.conv{j}")
            x = torch.cat([x, y], 1)
        if b < blocks:
            transition = f"features.transition{b}"
            x = pool(conv(norm_relu(x, f"{transition}.norm"), f"{transition}.conv"))
    x = norm_relu(x, "features.norm5")
    x = pool(x).flatten(1) if head == "pool2" else x.mean((2, 3))
    return x @ params["classifier.weight"].T + params["classifier.bias"]


@pytest.mark.parametrize("form", ["reference", "fused"])
@pytest.mark.parametrize(
    ("variant", "blocks", "eps", "head"), [("notebook", 4, 1e-3, "pool2"), ("densenet_bc", 3, 1e-5, "global")]
)
def test_logits_and_gradients_equal_the_definition(variant: str, blocks: int, eps: float, head: str, form: str) -> None:
    net = small(variant, block=form).double().train()
    with torch.no_grad():
        for p in net.parameters():  # Initial values of 1 and 0 would hide errors.
            if p.ndim == 1:
                p.add_(torch.randn_like(p), alpha=0.2)
    params = {name: p.detach().clone().contiguous().requires_grad_() for name, p in net.named_parameters()}
    x, labels = images().double(), torch.tensor([1, 4, 0, 9])

    logits = net(x)
    expected = definition(x, params, num_layers=2, blocks=blocks, eps=eps, head=head)
    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(expected, labels).backward()

    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
    for name, p in net.named_parameters():
        assert params[name].grad.abs().max() > 1e-6, f"{name} has no influence on the loss: nothing is compared"
        torch.testing.assert_close(p.grad, params[name].grad, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def published(net: nn.Module) -> dict[str, Tensor]:
    """Rename weights as in torchvision's published files, written by torch 0.3."""
    weights = {re.sub(r"(denselayer\d+\.(?:norm|conv))", r"\1.", name): w for name, w in net.state_dict().items()}
    return {name: weight for name, weight in weights.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("variant", "written"),
    [
        ("densenet161", nn.Module.state_dict),
        ("densenet121", published),
        ("densenet121", lambda net: nn.DataParallel(net).state_dict()),
        ("densenet121", lambda net: torch.compile(nn.DataParallel(net)).state_dict()),
    ],
    ids=["as is", "published", "DataParallel", "compiled"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # Inductor's own use
def test_torchvision_weights_give_torchvision_logits(variant: str, written: Callable[..., dict[str, Tensor]]) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(variant, weights=None, num_classes=10)
    with torch.no_grad():
        theirs.train()(images(64) * 2 + 1)  # Running statistics other than 0 and 1.
    ours = densenet(variant, num_classes=10, image_size=64)
    weights = written(theirs)
    names = list(weights)
    ours.load_state_dict(weights, strict=True)
    assert list(weights) == names
    theirs.load_state_dict(ours.state_dict(), strict=True)

    x = images(64)
    with torch.no_grad():
        expected, logits = theirs.eval()(x), ours.eval()(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ours.load_state_dict({**weights, "module.classifier.weights": torch.zeros(1)})


def fans(weight: Tensor) -> tuple[int, int]:
    """Return fan_in and fan_out."""
    area = weight[0, 0].numel() if weight.ndim == 4 else 1
    return weight.shape[1] * area, weight.shape[0] * area


def test_glorot_uniform() -> None:
    net = small("notebook", growth_rate=24)
    weights = [module.weight for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weights) == 1 + 4 * 2 + 3 + 1
    for weight in weights:
        bound = (6 / sum(fans(weight))) ** 0.5
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.08)
    assert not net.classifier.bias.any()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.01, 1e-3)}  # Keras' own
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)


@pytest.mark.parametrize(("variant", "fan"), [("densenet_bc", 1), ("densenet121", 0)])
def test_he_normal(variant: str, fan: int) -> None:
    """The paper's Torch code uses fan_out, torchvision fan_in."""
    net = small(variant, growth_rate=24)
    convs = [module.weight for module in net.modules() if isinstance(module, nn.Conv2d)]
    for weight in convs:
        std = (2 / fans(weight)[fan]) ** 0.5
        assert weight.std().item() == pytest.approx(std, rel=0.12)
        assert weight.mean().item() == pytest.approx(0, abs=0.25 * std)
        assert weight.abs().max() > 2.2 * std  # A uniform distribution ends at 1.73 std.
    bound = net.classifier.in_features**-0.5
    assert 0.98 * bound < net.classifier.weight.abs().max() <= bound
    assert not net.classifier.bias.any()


def children(module: nn.Module) -> list[str]:
    """Return the class names of the leaf modules, in order."""
    return [type(m).__name__ for m in module.modules() if not list(m.children())]


def test_dropout_follows_every_convolution_but_the_first() -> None:
    layer = ["BatchNorm2d", "ReLU", "Conv2d", "Dropout"]
    transition = [*layer, "AvgPool2d"]
    notebook = small("notebook", num_layers=[2, 1], drop_rate=0.3)
    assert children(notebook.features) == ["Conv2d", *layer, *layer, *transition, *layer, "BatchNorm2d"]
    bottleneck = small("densenet_bc", num_layers=[1, 1], drop_rate=0.3)
    assert children(bottleneck.features) == ["Conv2d", *layer, *layer, *transition, *layer, *layer, "BatchNorm2d"]
    assert {m.p for m in bottleneck.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert "Dropout" not in children(small("notebook"))
    # It has no state: the checkpoint of a network with dropout loads into one without.
    assert list(small("densenet_bc", drop_rate=0.5).state_dict()) == list(small("densenet_bc").state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_weights_and_gradients_are_in_channels_last(variant: str) -> None:
    """If a gradient had other strides than its weight, DDP would copy it in every step."""
    side = 64 if variant == "densenet121" else 32  # several pixels in the last block: one has no memory format
    net, x = small(variant, drop_rate=0.2).train(), images(side)
    maps = net.features(x)
    maps.square().sum().backward()
    assert maps.is_contiguous(memory_format=torch.channels_last)
    for name, p in net.features.named_parameters():
        assert p.grad.stride() == p.stride(), name
        assert p.ndim != 4 or p.is_contiguous(memory_format=torch.channels_last), name
    net.eval()
    assert torch.equal(net(x), net(x.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(net(x), net(x.transpose(2, 3).contiguous().transpose(2, 3)))


def training_step(net: Callable[[Tensor], Tensor], weights: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return logits and gradients, with seeded dropout."""
    torch.manual_seed(5)
    logits = net(x)
    F.cross_entropy(logits, torch.tensor([1, 4, 0, 9])).backward()
    return logits.detach(), [p.grad for p in weights.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("variant", "form", "drop_rate", "backend"),
    [
        ("notebook", "reference", 0.2, "aot_eager"),
        *(
            pytest.param("notebook", form, 0.0, "inductor", marks=pytest.mark.nightly)
            for form in ("reference", "fused")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # Inductor's own use
def test_compiles_into_one_graph(variant: str, form: str, drop_rate: float, backend: str) -> None:
    compiled, eager = (small(variant, num_layers=[2, 1], block=form, drop_rate=drop_rate).train() for _ in range(2))
    torch.compiler.reset()
    expected = training_step(eager, eager, images())
    actual = training_step(torch.compile(compiled, fullgraph=True, backend=backend), compiled, images())
    assert len(actual[1]) == len(list(eager.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", ["reference", "fused"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_heat_maps_are_those_of_the_gradient_of_the_whole_network(variant, block):
    model, labels = small(variant, block=block).eval(), torch.tensor([6, 0, 2, 9])
    given = images(64 if variant == "densenet121" else 32)
    found = grad_cam(model, given, labels)
    reached: list[Tensor] = []
    model.features.register_forward_hook(lambda _, __, made: made.retain_grad() or reached.append(made))
    model(given).gather(1, labels[:, None]).sum().backward()
    (maps,) = reached
    assert maps.grad is not None
    heat = (maps.grad.mean((2, 3), keepdim=True) * maps).sum(1).clamp_min(0)
    assert found.shape == heat.shape
    assert set(found.amax((1, 2)).tolist()) <= {0, 1}
    torch.testing.assert_close(found * heat.amax((1, 2), keepdim=True), heat, rtol=1e-3, atol=1e-5)


def test_maps_of_one_pixel_are_no_heat_maps():
    assert [has_heat_maps(small("densenet121", image_size=side)) for side in (32, 64)] == [False, True]

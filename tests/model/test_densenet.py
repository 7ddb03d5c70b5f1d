"""The whole net: against its definition and against torchvision, its names, its weights at the start."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from densenet_dist.model import DenseNet, densenet

Nets = Callable[..., DenseNet]
Images = Callable[..., Tensor]
VARIANTS = ["notebook", "densenet", "densenet_bc", "densenet121"]


def definition(x: Tensor, params: dict[str, Tensor], *, num_layers: int, blocks: int, eps: float, head: str) -> Tensor:
    """Compute a CIFAR net in training mode without dropout, on plain NCHW tensors, from the papers' definitions."""

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


@pytest.mark.parametrize(
    ("variant", "blocks", "eps", "head"),
    [("notebook", 4, 1e-3, "pool2"), ("densenet", 3, 1e-5, "global"), ("densenet_bc", 3, 1e-5, "global")],
)
def test_logits_and_gradients_equal_the_definition(
    variant: str, blocks: int, eps: float, head: str, small: Nets, images: Images
) -> None:
    net = small(variant).double().train()
    with torch.no_grad():
        for p in net.parameters():  # Fresh batch norms and biases of 1 and 0 would hide an error in them.
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
        assert params[name].grad.abs().max() > 1e-6, f"{name} has no part in the loss: nothing is compared"
        torch.testing.assert_close(p.grad, params[name].grad, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("variant", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_torchvision_weights_give_torchvision_logits(variant: str, images: Images) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(variant, weights=None, num_classes=10)
    with torch.no_grad():
        theirs.train()(images(64) * 2 + 1)  # Running statistics that are not 0 and 1.
    ours = densenet(variant, num_classes=10, image_size=64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)

    x = images(64)
    with torch.no_grad():
        expected, logits = theirs.eval()(x), ours.eval()(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_names_of_the_state(small: Nets) -> None:
    """Names are a promise to every checkpoint: only with a way to load the old ones may they change."""

    def norm(name: str) -> list[str]:
        return [f"{name}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    assert list(small("notebook", num_layers=[2, 1]).state_dict()) == [
        "features.conv0.weight",
        *norm("features.denseblock1.denselayer1.norm1"),
        "features.denseblock1.denselayer1.conv1.weight",
        *norm("features.denseblock1.denselayer2.norm1"),
        "features.denseblock1.denselayer2.conv1.weight",
        *norm("features.transition1.norm"),
        "features.transition1.conv.weight",
        *norm("features.denseblock2.denselayer1.norm1"),
        "features.denseblock2.denselayer1.conv1.weight",
        *norm("features.norm5"),
        "classifier.weight",
        "classifier.bias",
    ]
    assert list(small("densenet_bc", num_layers=[1]).state_dict()) == [
        "features.conv0.weight",
        *norm("features.denseblock1.denselayer1.norm1"),
        "features.denseblock1.denselayer1.conv1.weight",
        *norm("features.denseblock1.denselayer1.norm2"),
        "features.denseblock1.denselayer1.conv2.weight",
        *norm("features.norm5"),
        "classifier.weight",
        "classifier.bias",
    ]
    # Dropout has no state: a net trained with it loads into one without.
    assert list(small("densenet_bc", drop_rate=0.5).state_dict()) == list(small("densenet_bc").state_dict())


@pytest.mark.parametrize(
    ("variant", "momentum", "eps"),
    [("notebook", 0.01, 1e-3), ("densenet", 0.1, 1e-5), ("densenet_bc", 0.1, 1e-5), ("densenet121", 0.1, 1e-5)],
)
def test_batch_norms_speak_the_sources_dialect(variant: str, momentum: float, eps: float, small: Nets) -> None:
    norms = [module for module in small(variant).modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(momentum, eps)}
    for norm in norms:
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert torch.equal(norm.bias, torch.zeros_like(norm.bias))


def fans(weight: Tensor) -> tuple[int, int]:
    """Count what one output reads and what one input feeds."""
    area = weight[0, 0].numel() if weight.ndim == 4 else 1
    return weight.shape[1] * area, weight.shape[0] * area


def test_glorot_uniform(small: Nets) -> None:
    net = small("notebook", growth_rate=24)
    weights = [module.weight for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weights) == 1 + 4 * 2 + 3 + 1
    for weight in weights:
        bound = (6 / sum(fans(weight))) ** 0.5
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.08)
    assert not net.classifier.bias.any()


@pytest.mark.parametrize(("variant", "fan"), [("densenet", 1), ("densenet_bc", 1), ("densenet121", 0)])
def test_he_normal(variant: str, fan: int, small: Nets) -> None:
    """The paper's Torch code divides by the outputs, torchvision by the inputs."""
    net = small(variant, growth_rate=24)
    convs = [module.weight for module in net.modules() if isinstance(module, nn.Conv2d)]
    for weight in convs:
        std = (2 / fans(weight)[fan]) ** 0.5
        assert weight.std().item() == pytest.approx(std, rel=0.12)
        assert weight.mean().item() == pytest.approx(0, abs=0.25 * std)
        assert weight.abs().max() > 2.2 * std  # A uniform distribution ends at 1.73.
    bound = net.classifier.in_features**-0.5
    assert 0.98 * bound < net.classifier.weight.abs().max() <= bound
    assert not net.classifier.bias.any()


def children(module: nn.Module) -> list[str]:
    """Name the kinds of the modules that compute, in order."""
    return [type(m).__name__ for m in module.modules() if not list(m.children())]


def test_dropout_follows_every_convolution_but_the_first(small: Nets) -> None:
    layer = ["BatchNorm2d", "ReLU", "Conv2d", "Dropout"]
    transition = [*layer, "AvgPool2d"]
    notebook = small("notebook", num_layers=[2, 1], drop_rate=0.3)
    assert children(notebook.features) == ["Conv2d", *layer, *layer, *transition, *layer, "BatchNorm2d"]
    bottleneck = small("densenet_bc", num_layers=[1, 1], drop_rate=0.3)
    assert children(bottleneck.features) == ["Conv2d", *layer, *layer, *transition, *layer, *layer, "BatchNorm2d"]
    assert {m.p for m in bottleneck.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert "Dropout" not in children(small("notebook"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_acts_in_training_only(variant: str, small: Nets, images: Images) -> None:
    net, x = small(variant, drop_rate=0.5), images()
    net.train()
    assert not torch.equal(net(x), net(x))
    net.eval()
    undropped = small(variant, drop_rate=0.0).eval()
    undropped.load_state_dict(net.state_dict())
    assert torch.equal(net(x), undropped(x))

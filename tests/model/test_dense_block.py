"""The dense block: every form against the definition written out by hand, under one set of names."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densenet_dist.errors import ConfigError
from densenet_dist.model.forms import BLOCK_FORMS, FORM_NAMES, dense_block

NORM = partial(nn.BatchNorm2d, momentum=0.01, eps=1e-3)
LAYERS, IN_CHANNELS, GROWTH = 3, 5, 4


def make_block(form: str, *, bn_size: int | None = None, drop_rate: float = 0.0) -> nn.Module:
    """Make a small block with seeded weights in channels_last memory and batch norms that do something."""
    torch.manual_seed(0)
    block = dense_block(
        form,
        num_layers=LAYERS,
        in_channels=IN_CHANNELS,
        growth_rate=GROWTH,
        bn_size=bn_size,
        drop_rate=drop_rate,
        norm=NORM,
    )
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    return block.to(memory_format=torch.channels_last)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw four 6x5 inputs in channels_last memory."""
    x = torch.randn(4, IN_CHANNELS, 6, 5, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def norm_relu_conv(x: Tensor, params: dict[str, Tensor], layer: str, i: int) -> Tensor:
    """Compute BN with batch statistics, ReLU and convolution from their definitions."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    gamma, beta = params[f"{layer}.norm{i}.weight"], params[f"{layer}.norm{i}.bias"]
    y = (x - mean) / (variance + 1e-3).sqrt() * gamma[:, None, None] + beta[:, None, None]
    weight = params[f"{layer}.conv{i}.weight"]
    return F.conv2d(y.clamp(min=0), weight, padding=weight.shape[-1] // 2)


def definition(x: Tensor, params: dict[str, Tensor], *, bottleneck: bool) -> Tensor:
    """Compute the block in training mode without dropout."""
    maps = [x]
    for i in range(LAYERS):
        y = torch.cat(maps, 1)
        for j in (1, 2) if bottleneck else (1,):
            y = norm_relu_conv(y, params, f"denselayer{i + 1}", j)
        maps.append(y)
    return torch.cat(maps, 1)


@pytest.mark.parametrize("form", BLOCK_FORMS)
@pytest.mark.parametrize("bn_size", [None, 2])
def test_training_step_equals_the_definition(form: str, bn_size: int | None) -> None:
    block = make_block(form, bn_size=bn_size).double().train()
    x = images(torch.float64).requires_grad_()
    x_ref = x.detach().contiguous().requires_grad_()
    params = {name: p.detach().clone().contiguous().requires_grad_() for name, p in block.named_parameters()}

    y = block(x)
    y_ref = definition(x_ref, params, bottleneck=bn_size is not None)
    cotangent = torch.randn(y_ref.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y.backward(cotangent)
    y_ref.backward(cotangent)

    torch.testing.assert_close(y, y_ref, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, x_ref.grad, rtol=0, atol=1e-11)
    for name, p in block.named_parameters():
        torch.testing.assert_close(p.grad, params[name].grad, rtol=0, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("form", BLOCK_FORMS)
def test_running_statistics_follow_the_maps_each_layer_reads(form: str) -> None:
    block = make_block(form).double().train()
    y = block(images(torch.float64)).detach()

    buffers = dict(block.named_buffers())
    for i in range(LAYERS):
        read = y[:, : IN_CHANNELS + i * GROWTH].transpose(0, 1).flatten(1)
        norm = f"denselayer{i + 1}.norm1"
        torch.testing.assert_close(buffers[f"{norm}.running_mean"], 0.01 * read.mean(1), rtol=0, atol=1e-13)
        torch.testing.assert_close(buffers[f"{norm}.running_var"], 0.99 + 0.01 * read.var(1), rtol=0, atol=1e-13)
        assert buffers[f"{norm}.num_batches_tracked"] == 1


@pytest.mark.parametrize("form", BLOCK_FORMS)
def test_names_and_shapes_of_the_state(form: str) -> None:
    plain = {name: tuple(t.shape) for name, t in make_block(form).state_dict().items() if "tracked" not in name}
    width = {1: 5, 2: 9, 3: 13}
    expected: dict[str, tuple[int, ...]] = {}
    for i, channels in width.items():
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            expected[f"denselayer{i}.norm1.{leaf}"] = (channels,)
        expected[f"denselayer{i}.conv1.weight"] = (4, channels, 3, 3)
    assert plain == expected

    bottleneck = make_block(form, bn_size=2).state_dict()
    assert [name for name in bottleneck if name.startswith("denselayer2.")] == [
        "denselayer2.norm1.weight",
        "denselayer2.norm1.bias",
        "denselayer2.norm1.running_mean",
        "denselayer2.norm1.running_var",
        "denselayer2.norm1.num_batches_tracked",
        "denselayer2.conv1.weight",
        "denselayer2.norm2.weight",
        "denselayer2.norm2.bias",
        "denselayer2.norm2.running_mean",
        "denselayer2.norm2.running_var",
        "denselayer2.norm2.num_batches_tracked",
        "denselayer2.conv2.weight",
    ]
    assert bottleneck["denselayer2.conv1.weight"].shape == (8, 9, 1, 1)
    assert bottleneck["denselayer2.conv2.weight"].shape == (4, 8, 3, 3)


@pytest.mark.parametrize("form", BLOCK_FORMS)
def test_output_begins_with_the_input_and_keeps_channels_last(form: str) -> None:
    x = images()
    y = make_block(form, drop_rate=0.3).train()(x)
    assert y.shape == (4, IN_CHANNELS + LAYERS * GROWTH, 6, 5)
    assert torch.equal(y[:, :IN_CHANNELS], x)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("form", BLOCK_FORMS)
def test_dropout_zeroes_new_maps_in_training_only(form: str) -> None:
    block = make_block(form, drop_rate=0.4)
    new = block.train()(images())[:, IN_CHANNELS:]
    assert (new == 0).float().mean().item() == pytest.approx(0.4, abs=0.06)

    undropped = make_block(form, drop_rate=0.0)
    undropped.load_state_dict(block.state_dict())
    x = images()
    assert torch.equal(block.eval()(x), undropped.eval()(x))
    assert not (block(x)[:, IN_CHANNELS:] == 0).any()


def test_kept_activations_are_scaled_by_dropout() -> None:
    """What dropout keeps it divides by 1 - p, so that evaluation needs no scaling."""
    dropped = make_block("reference", drop_rate=0.4).train()(images())
    plain = make_block("reference", drop_rate=0.0).train()(images())
    # The first layer's maps only: later layers read dropped maps.
    first = slice(IN_CHANNELS, IN_CHANNELS + GROWTH)
    kept = dropped[:, first] != 0
    torch.testing.assert_close(dropped[:, first][kept], plain[:, first][kept] / 0.6)


def test_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        make_block("fussed")
    assert str(caught.value) == "model.block: there is no form 'fussed'; choose from " + ", ".join(FORM_NAMES)

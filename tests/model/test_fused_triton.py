"""The whole fused block on Triton's kernels, with PyTorch's convolutions padded as on a GPU.

The cases run in Triton's interpreter, and on a GPU where there is one: see tests/support/triton_cases.py.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from triton_cases import DEVICES, INTERPRETED, run_interpreted

from densenet_dist.model.forms import dense_block
from densenet_dist.model.fused import backward, convolutions, forward, operator
from densenet_dist.model.fused.structure import Unit
from densenet_dist.model.kernels.interface import Kernels

# Where wrong formulas cannot hide behind rounding; but Triton multiplies float64 matrices in the interpreter only.
DTYPE, TOLERANCE = (torch.float64, 1e-10) if INTERPRETED else (torch.float32, 1e-4)
NORM = partial(nn.BatchNorm2d, momentum=0.1, eps=1e-5)


class Padded(convolutions.Convolutions):
    """Those of a GPU, on any device: channels in multiples of eight."""

    def __init__(self, kernels: Kernels, like: Tensor, units: Sequence[Unit]) -> None:
        super().__init__(kernels, like, units)
        self._multiple = convolutions.TENSOR_CORE_CHANNELS
        n, _, height, width = like.shape
        self._scratch = like.new_empty(n * height * width * self.padded(max(unit.reads for unit in units)))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from densenet_dist.model.kernels.triton_pointwise import TritonPointwise

    monkeypatch.setattr(operator, "choose_kernels", lambda *_: TritonPointwise())
    for module in (forward, backward):
        monkeypatch.setattr(module, "choose_convolutions", Padded)


def make(form: str, bn_size: int | None, drop_rate: float, device: str) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_layers": 3, "in_channels": 7, "growth_rate": 5, "bn_size": bn_size}
    block = dense_block(form, **options, drop_rate=drop_rate, norm=NORM).to(DTYPE)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    return block.to(device, memory_format=torch.channels_last)


def run(block: nn.Module, tail: tuple[nn.Module, ...], images: Tensor) -> dict[str, Tensor]:
    x = images.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(7)
    if isinstance(block, operator_form()):
        y = block(x, *tail)
    else:
        y = block(x)
        for number, module in enumerate(tail):
            y = module(y) if number else torch.relu(module(y))
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y.backward(weights.to(y.device, y.dtype))
    both = nn.ModuleList([block, *tail])
    found = {"y": y.detach(), "x": x.grad, **dict(both.named_buffers())}
    return found | {name: p.grad for name, p in both.named_parameters()}  # type: ignore[dict-item]


def operator_form() -> type[nn.Module]:
    from densenet_dist.model.fused_block import FusedDenseBlock

    return FusedDenseBlock


def tail_of(kind: str, channels: int, device: str) -> tuple[nn.Module, ...]:
    torch.manual_seed(1)
    modules = (NORM(channels), nn.Conv2d(channels, 6, 1, bias=False))[: ("none", "norm", "conv").index(kind)]
    return tuple(module.to(DTYPE).to(device, memory_format=torch.channels_last) for module in modules)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("bn_size", "drop_rate", "tail"),
    [(None, 0.0, "none"), (None, 0.3, "conv"), (2, 0.0, "norm"), (2, 0.3, "conv")],
)
def test_block_in_training(kernels: None, device: str, bn_size: int | None, drop_rate: float, tail: str) -> None:
    x = torch.randn(2, 7, 5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = x.to(device, DTYPE, memory_format=torch.channels_last)
    expected = run(make("reference", bn_size, drop_rate, device), tail_of(tail, 22, device), x)
    found = run(make("fused", bn_size, drop_rate, device), tail_of(tail, 22, device), x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")

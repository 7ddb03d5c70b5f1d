"""What the tests of the dense block's two forms share: small seeded blocks, a training step, and comparisons."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densenet_dist.model import DenseNet
from densenet_dist.model.dense_block import DenseBlock
from densenet_dist.model.fused_block import FusedDenseBlock
from densenet_dist.model.variants import densenet

TAILS = ["no tail", "norm", "norm and conv"]
KERAS, TORCH = (0.01, 1e-3), (0.1, 1e-5)
"""Momentum and epsilon."""

Found = Mapping[str, Tensor | None]

both_kinds = pytest.mark.parametrize("bn_size", [None, 2], ids=["plain", "bottleneck"])
each_tail = pytest.mark.parametrize("tail", TAILS)


def seeded(model: Any) -> Any:
    """The model in float64 and channels_last memory, its batch norms made to do something."""
    for module in norms_of(model):
        nn.init.uniform_(module.weight, 0.5, 1.5)
        nn.init.normal_(module.bias, std=0.5)
        module.running_mean.normal_(std=0.5)
        module.running_var.uniform_(0.5, 2)
    return model.double().to(memory_format=torch.channels_last)


class Block(nn.Module):
    """A dense block and what follows it, in either form."""

    def __init__(
        self,
        form: str,
        *,
        layers: int = 3,
        channels: int = 5,
        growth: int = 4,
        bn_size: int | None = None,
        drop_rate: float = 0.0,
        tail: str = "no tail",
        dialect: tuple[float, float] = KERAS,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = partial(nn.BatchNorm2d, momentum=dialect[0], eps=dialect[1])
        sizes = {"num_layers": layers, "in_channels": channels, "growth_rate": growth, "bn_size": bn_size}
        kind = DenseBlock if form == "reference" else FusedDenseBlock
        self.form, self.block = form, kind(**sizes, drop_rate=drop_rate, norm=norm)
        width = channels + layers * growth
        self.norm = norm(width) if tail != "no tail" else None
        self.conv = nn.Conv2d(width, 3, 1, bias=False) if tail == "norm and conv" else None
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "fused":
            return self.block(x, self.norm, self.conv)
        x = self.block(x)
        x = x if self.norm is None else F.relu(self.norm(x))
        return x if self.conv is None else self.conv(x)


def small_net(form: str, variant: str, **options: Any) -> DenseNet:
    """A net of two blocks for images of 8x8."""
    torch.manual_seed(0)
    compression = {"compression": 0.5} if variant == "notebook" else {}
    sizes: dict[str, Any] = {"growth_rate": 4, "num_layers": (3, 2), "image_size": 8, **compression}
    return seeded(densenet(variant, **{"num_classes": 3, "block": form, **sizes, **options}))


def maps(shape: tuple[int, ...] = (4, 5, 6, 5), seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def take_step(
    model: nn.Module,
    x: Tensor,
    *,
    call: Callable[[Tensor], Tensor] | None = None,
    seed: int = 7,
    needs_x: bool = True,
    autocast: torch.dtype | None = None,
) -> dict[str, Tensor | None]:
    """Run forward (through `call` where given) and backward; everything that comes of it by name."""
    x = x.detach().clone().requires_grad_(needs_x)
    torch.manual_seed(seed)  # for dropout
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = model(x) if call is None else call(x)
    if y.requires_grad:
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        y.backward(cotangent.to(y.device, y.dtype))
    return {"y": y.detach(), "x.grad": x.grad, **state_of(model)}


def state_of(model: nn.Module) -> dict[str, Tensor | None]:
    """Copies of parameters, their gradients and buffers."""
    parameters = dict(model.named_parameters())
    gradients = {f"{name}.grad": parameter.grad for name, parameter in parameters.items()}
    state = gradients | parameters | dict(model.named_buffers())
    return {name: None if tensor is None else tensor.detach().clone() for name, tensor in state.items()}


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def assert_same(found: Found, expected: Found, atol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    one, other = ({name: tensor for name, tensor in each.items() if tensor is not None} for each in (found, expected))
    torch.testing.assert_close(one, other, rtol=0, atol=atol, equal_nan=True)  # None where the other is

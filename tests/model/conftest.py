"""What the model's tests share: one thread, narrow nets and seeded images."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_thread import one_thread
from torch import Tensor

from densenet_dist.model import DenseNet, densenet

__all__ = ["one_thread"]


@pytest.fixture
def small() -> Callable[..., DenseNet]:
    """Make a variant with 2 layers a block and 6 maps a layer unless told otherwise, from seeded weights."""

    def make(variant: str, **options: Any) -> DenseNet:
        torch.manual_seed(0)
        narrow: dict[str, Any] = {"growth_rate": 6, "num_layers": 2}
        if variant == "notebook":
            narrow["compression"] = 0.5
        return densenet(variant, **{"num_classes": 10, **narrow, **options})

    return make


@pytest.fixture
def images() -> Callable[..., Tensor]:
    """Draw four seeded images, float32, in the default memory format."""

    def make(side: int = 32) -> Tensor:
        return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))

    return make

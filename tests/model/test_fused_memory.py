"""The memory of the fused dense block is a fraction of the reference form's and linear in depth."""

from functools import partial
from typing import Any

import pytest
import torch
from fused import Block, maps
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from densenet_dist.model.variants import densenet


def bytes_saved(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that a forward pass saves for the backward pass, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # keeps them alive, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    return sum(storage.nbytes() for storage in kept.values())


def most_bytes_alive(model: nn.Module, x: Tensor) -> int:
    """Return the peak memory of the tensors that a step allocates, also inside operators."""
    model(x).sum().backward()  # allocates the gradients of parameters
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        model(x).sum().backward()
    alive = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


@pytest.mark.parametrize(
    ("variant", "options", "most"), [("notebook", {}, 0.11), ("densenet_bc", {"depth": 100, "drop_rate": 0.2}, 0.24)]
)
def test_saved_bytes_are_a_fraction_of_the_reference(variant: str, options: dict[str, Any], most: float) -> None:
    """The docs promise a third; the limits are slightly above the measured values."""
    x, saved = torch.randn(1, 3, 32, 32), {}
    for form in ("reference", "fused"):
        model = densenet(variant, num_classes=10, block=form, **options)
        saved[form] = bytes_saved(model, x)
        with torch.no_grad():
            assert bytes_saved(model, x) == 0
    assert saved["fused"] <= most * saved["reference"]
    assert most < 1 / 3


small_maps = partial(maps, (2, 8, 24, 24), dtype=torch.float32)
both_kinds = pytest.mark.parametrize("bn_size", [None, 4], ids=["plain", "bottleneck"])


@both_kinds
def test_the_most_alive_in_a_step_is_linear_in_depth(bn_size: int | None) -> None:
    """Gradients of parameters do not count, except for the fused form's second copy in the layout of the weights."""
    most = {}
    for form in ("reference", "fused"):
        for layers in (12, 24):
            model = Block(form, layers=layers, channels=8, growth=8, bn_size=bn_size).float()
            gradients = sum(parameter.nbytes for parameter in model.parameters())
            most[form, layers] = most_bytes_alive(model, small_maps()) - gradients
    assert most["fused", 24] <= 2.2 * most["fused", 12]
    assert most["reference", 24] >= 2.5 * most["reference", 12]
    assert most["fused", 24] <= 0.3 * most["reference", 24]

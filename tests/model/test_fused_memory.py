"""Memory of the fused dense block: a fraction of the reference form's, and linear in depth."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from densenet_dist.model import densenet
from densenet_dist.model.forms import dense_block
from densenet_dist.model.fused import convolutions


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine more of them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bytes_saved(model: nn.Module, x: Tensor) -> int:
    """What a forward pass keeps for the backward pass beside parameters and buffers; each piece of memory once."""
    own = {_identity(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

    def keep(tensor: Tensor) -> Tensor:
        if _identity(tensor) not in own:
            kept[_identity(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    return sum(storage.nbytes() for storage in kept.values())


def _identity(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return storage._cdata if tensor.is_meta else storage.data_ptr()  # without content there is no address


def most_bytes_alive(run: Callable[[], object]) -> int:
    """The most memory for tensors that `run` has at any time, beside what it found and inside operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    alive = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        model(x).sum().backward()

    step()  # gradients of parameters are there from now on
    return step


def test_the_measure_sees_what_is_alive_inside_an_operator() -> None:
    def run() -> None:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(250)
        del second, third

    assert most_bytes_alive(run) == 6000
    x = torch.rand(1000, 3)
    assert most_bytes_alive(lambda: x.softmax(0).sum()) >= 12_000


NETS: dict[str, tuple[str, dict[str, Any], float]] = {
    "notebook": ("notebook", {}, 0.11),
    "notebook, dropout": ("notebook", {"drop_rate": 0.2}, 0.13),
    "BC 100/12": ("densenet_bc", {"depth": 100, "growth_rate": 12}, 0.22),
    "BC 100/12, dropout": ("densenet_bc", {"depth": 100, "growth_rate": 12, "drop_rate": 0.2}, 0.24),
}


@pytest.mark.parametrize("name", NETS)
def test_a_net_keeps_a_fraction(name: str) -> None:
    """A third is promised; what is asked for is little more than measured."""
    variant, options, most = NETS[name]
    x, saved = torch.randn(1, 3, 32, 32), {}
    for form in ("reference", "fused"):
        model = densenet(variant, num_classes=10, block=form, **options)
        saved[form] = bytes_saved(model, x)
    print(f"{name}: kept: fused / reference: {saved['fused'] / saved['reference']:.3f}")
    assert saved["fused"] <= most * saved["reference"]
    assert most < 1 / 3


@pytest.mark.parametrize(("depth", "growth_rate"), [(250, 24), (190, 40)])
def test_the_papers_largest_nets_fit_where_the_reference_form_does_not(depth: int, growth_rate: int) -> None:
    """On a GPU of 80 GB, 256 images in float32; counted on tensors without content."""
    kept = {}
    for form in ("reference", "fused"):
        model = densenet("densenet_bc", num_classes=10, block=form, depth=depth, growth_rate=growth_rate).to("meta")
        kept[form] = bytes_saved(model, torch.randn(256, 3, 32, 32, device="meta")) / 2**30
    print(f"BC ({depth}, {growth_rate}): kept: {kept['fused']:.1f} GiB, reference {kept['reference']:.1f} GiB")
    assert kept["reference"] > 80
    assert kept["fused"] < 10


def test_without_a_gradient_nothing_is_kept() -> None:
    model, x = (
        densenet("densenet_bc", num_classes=10, growth_rate=6, num_layers=2, block="fused"),
        torch.randn(1, 3, 32, 32),
    )
    with torch.no_grad():
        assert bytes_saved(model, x) == 0


def block(form: str, layers: int, bn_size: int | None, drop_rate: float = 0.0) -> nn.Module:
    made = dense_block(
        form,
        num_layers=layers,
        in_channels=8,
        growth_rate=8,
        bn_size=bn_size,
        drop_rate=drop_rate,
        norm=nn.BatchNorm2d,
    )
    return made.to(memory_format=torch.channels_last)


def maps() -> Tensor:
    return torch.randn(2, 8, 24, 24).contiguous(memory_format=torch.channels_last)


both_kinds = pytest.mark.parametrize("bn_size", [None, 4], ids=["plain", "bottleneck"])


@both_kinds
@pytest.mark.parametrize("drop_rate", [0.0, 0.2], ids=["", "dropout"])
def test_what_is_kept_is_linear_in_depth(bn_size: int | None, drop_rate: float) -> None:
    saved = {
        (form, layers): bytes_saved(block(form, layers, bn_size, drop_rate), maps())
        for form in ("reference", "fused")
        for layers in (12, 24)
    }
    assert saved["fused", 24] <= 2.05 * saved["fused", 12]
    assert saved["reference", 24] >= 2.5 * saved["reference", 12]


@both_kinds
@pytest.mark.parametrize("pieces", [False, True], ids=["", "one image at a time"])
def test_the_most_alive_in_a_step_is_linear_in_depth(
    monkeypatch: pytest.MonkeyPatch, bn_size: int | None, pieces: bool
) -> None:
    """Gradients of parameters apart: of these there are as many as parameters, in either form."""
    if pieces:
        monkeypatch.setattr(convolutions, "PIECE_BYTES", 1)
    most = {}
    for form in ("reference", "fused"):
        for layers in (12, 24):
            model = block(form, layers, bn_size)
            gradients = sum(4 * parameter.numel() for parameter in model.parameters())
            most[form, layers] = most_bytes_alive(step_of(model, maps())) - gradients
    print(most)
    assert most["fused", 24] <= 2.1 * most["fused", 12]
    assert most["reference", 24] >= 2.5 * most["reference", 12]
    assert most["fused", 24] <= 0.3 * most["reference", 24]


@both_kinds
def test_eval_mode_without_gradients_holds_little_more_than_the_maps(bn_size: int | None) -> None:
    model, x = block("fused", 24, bn_size).eval(), maps()
    with torch.no_grad():
        made = model(x)
        most = most_bytes_alive(lambda: model(x))
    print(most / made.nbytes)
    assert most <= {None: 2.5, 4: 1.6}[bn_size] * made.nbytes

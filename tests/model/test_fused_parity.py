"""The fused dense block has the outputs, gradients and running statistics of the reference form."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from fused import (
    KERAS,
    TAILS,
    TORCH,
    Block,
    Found,
    assert_same,
    both_kinds,
    each_tail,
    maps,
    norms_of,
    small_net,
    state_of,
    take_step,
)
from torch import Tensor

from densenet_dist.model.fused import convolutions, operator
from densenet_dist.model.kernels.interface import Kernels
from densenet_dist.model.kernels.native import NativeKernels


@pytest.fixture(autouse=True)
def new_memory_is_nan() -> Iterator[None]:
    """Deterministic mode fills new memory with NaN, which reveals reads of uninitialized memory."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_same_step(
    prepare: Callable[[Block], object] = lambda _: None,
    x: Tensor | None = None,
    *,
    needs_x: bool = True,
    atol: float = 1e-10,
    **options: Any,
) -> Found:
    """Compare a step of both forms; return the results of the fused one."""
    x = maps() if x is None else x
    found = []
    for form in ("reference", "fused"):
        model = Block(form, **options)
        prepare(model)
        found.append(take_step(model, x, needs_x=needs_x))
    assert_same(found[1], found[0], atol)
    return found[1]


def freeze(which: str, model: Block) -> None:
    """Put some batch norms into evaluation mode."""
    norms = norms_of(model)
    for number, norm in enumerate(norms):
        chosen = {
            "none": False,
            "all": True,
            "first": number == 0,
            "last": number == len(norms) - 1,
            "odd": number % 2 == 1,
            "all but one": number != 2,
        }[which]
        norm.train(not chosen)


@both_kinds
@each_tail
def test_a_step_is_the_same(bn_size: int | None, tail: str) -> None:
    for training, dialect in ((True, KERAS), (False, TORCH)):
        found = assert_same_step(lambda m, t=training: m.train(t), bn_size=bn_size, tail=tail, dialect=dialect)
        assert all(tensor is not None for tensor in found.values())
        tracked = {int(tensor) for name, tensor in found.items() if name.endswith("num_batches_tracked")}
        assert tracked == {int(training)}
    made = [Block(form, bn_size=bn_size, tail=tail)(maps()) for form in ("reference", "fused")]
    assert ["dense_block" in y.grad_fn.name() for y in made] == [False, True]


@both_kinds
def test_odd_shapes(bn_size: int | None) -> None:
    """Also without images: a rank's share of a batch may be empty."""
    for shape in ((4, 5, 7, 5), (3, 5, 1, 9), (1, 5, 1, 2), (2, 5, 40, 33), (0, 5, 6, 5)):
        for training in (True, False):
            # The variance of a few values may be tiny, and a quotient of it large.
            assert_same_step(lambda m, t=training: m.train(t), maps(shape), bn_size=bn_size, tail=TAILS[2], atol=1e-9)
    # With nine layers, gradients that wait are flushed more than once.
    for channels, growth, layers in ((1, 1, 1), (3, 1, 9), (35, 35, 2)):
        x = maps((2, channels, 4, 3))
        assert_same_step(x=x, channels=channels, growth=growth, layers=layers, bn_size=bn_size, tail=TAILS[2])


@both_kinds
@pytest.mark.parametrize("kind", [NativeKernels, Kernels])
@pytest.mark.parametrize("images", [1, 3])
def test_some_images_at_a_time(
    monkeypatch: pytest.MonkeyPatch, bn_size: int | None, kind: type[Kernels], images: int
) -> None:
    """oneDNN convolves large batches in pieces; here the batch is four images of 6x5."""
    monkeypatch.setattr(convolutions, "PIECE_BYTES", images * 6 * 5 * 8 * 17 + 1)
    monkeypatch.setattr(operator, "choose_kernels", lambda *_: kind())
    monkeypatch.setattr(convolutions, "KERNEL_SIZES", ())  # none for C++
    cut, pieces = convolutions.CpuConvolutions._split, []

    def spy(self: convolutions.CpuConvolutions, whole: Tensor) -> tuple[Tensor, ...]:
        pieces.append([len(piece) for piece in cut(self, whole)])
        return cut(self, whole)

    monkeypatch.setattr(convolutions.CpuConvolutions, "_split", spy)
    for which, drop_rate, tail in (("none", 0.0, "no tail"), ("odd", 0.3, "norm and conv")):
        pieces.clear()
        assert_same_step(partial(freeze, which), bn_size=bn_size, tail=tail, drop_rate=drop_rate)
    assert set(map(tuple, pieces)) == {(1, 1, 1, 1) if images == 1 else (3, 1)}
    fixed = partial(fix, ["denselayer2."])
    assert_same_step(fixed, maps().contiguous(), needs_x=False, bn_size=bn_size, tail="norm and conv")


@both_kinds
@pytest.mark.parametrize("which", ["all", "first", "last", "odd", "all but one"])
def test_frozen_norms_in_a_block_that_trains(bn_size: int | None, which: str) -> None:
    found = assert_same_step(partial(freeze, which), bn_size=bn_size, tail="norm and conv", drop_rate=0.3)
    tracked = [int(tensor) for name, tensor in found.items() if name.endswith("num_batches_tracked")]
    assert 0 in tracked
    assert (1 in tracked) == (which != "all")


def fix(names: list[str], model: Block) -> None:
    fixed = [p for name, p in model.named_parameters() if any(part in name for part in names)]
    assert fixed
    for parameter in fixed:
        parameter.requires_grad_(False)


@both_kinds
@pytest.mark.parametrize(
    "names",
    [["conv"], ["bias"], ["denselayer1.", "denselayer2."], ["denselayer1.conv1", "denselayer3.norm1.bias"], [""]],
    ids=" ".join,
)
def test_fixed_parameters(bn_size: int | None, names: list[str]) -> None:
    for tail, needs_x in (("no tail", False), ("norm", True), ("norm and conv", False)):
        assert_same_step(partial(fix, names), needs_x=needs_x, bn_size=bn_size, tail=tail)


@both_kinds
@each_tail
def test_inputs_gradients_and_weights_in_other_layouts(bn_size: int | None, tail: str) -> None:
    contiguous, base = maps((4, 5, 6, 5)).contiguous(), maps((4, 12, 12, 5))
    for x in (contiguous, base[:, 2:7, ::2], maps((1, 5, 1, 1)).expand(4, 5, 6, 5), maps((4, 5, 5, 6)).transpose(2, 3)):
        results = []
        for form in ("reference", "fused"):
            model = Block(form, bn_size=bn_size, tail=tail).to(memory_format=torch.contiguous_format)
            leaf = x.detach().requires_grad_()
            model(leaf * 1.5).sum().backward()  # the gradient is an expanded scalar
            model(leaf).mul(maps((4, 1, 6, 1)).contiguous()).sum().backward()
            results.append({"x": leaf.grad, **state_of(model)})
            assert all(parameter.grad.stride() == parameter.stride() for parameter in model.parameters())
        assert_same(results[1], results[0], 1e-9)
    assert Block("fused", bn_size=bn_size, tail=tail)(contiguous).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("which", ["none", "all but one"])
def test_one_value_a_channel_is_refused_in_training(which: str) -> None:
    for form in ("reference", "fused"):
        model = Block(form)
        freeze(which, model)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            model(maps((1, 5, 1, 1)))
    assert norms_of(model)[0].num_batches_tracked == 0


@both_kinds
@pytest.mark.parametrize("number", [1, None], ids=["one", "all"])
def test_unsupported_norms_use_the_reference_form(bn_size: int | None, number: int | None) -> None:
    def average_all_batches(model: Block) -> None:
        for norm in norms_of(model)[:number]:
            norm.momentum = None

    assert_same_step(average_all_batches, bn_size=bn_size, tail="norm and conv")


@both_kinds
@pytest.mark.parametrize("where", ["x", "block.denselayer2.conv1.weight"])
def test_nan_propagates_as_in_the_reference_form(bn_size: int | None, where: str) -> None:
    """Training must detect NaN, and channels that do not depend on it must stay correct."""
    x = maps()

    def spoil(model: Block) -> None:
        tensor = x if where == "x" else model.get_parameter(where).detach()
        tensor[1, 2] = torch.nan

    found = assert_same_step(spoil, x, bn_size=bn_size, tail="norm and conv", drop_rate=0.3)
    assert found["y"].isnan().any()


@both_kinds
def test_a_step_gives_the_same_bits_again(bn_size: int | None) -> None:
    x = maps((3, 5, 33, 31), dtype=torch.float32)  # enough pixels for several threads
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        model = Block("fused", bn_size=bn_size, tail="norm and conv", drop_rate=0.3).float()
        assert_same(*(take_step(copy.deepcopy(model), x) for _ in range(2)), 0)


def error(found: Found, exact: Found) -> float:
    """Return the relative error of outputs, gradients and statistics, averaged over tensors."""
    names = [name for name in exact if name == "y" or name.endswith(("grad", "running_mean", "running_var"))]
    assert len(names) > 20
    parts = [(found[name].double() - exact[name]).norm() / exact[name].norm() for name in names]
    return float(torch.stack(parts).mean())


@pytest.mark.parametrize(
    ("dtype", "most", "bn_size", "drop_rate"),
    [(torch.float32, 1.5, None, 0.3), (torch.bfloat16, 1.1, 2, 0.0), (torch.float16, 1.25, None, 0.0)],
    ids=["fp32", "bf16", "fp16"],
)
def test_errors_of_rounding_are_no_larger(
    dtype: torch.dtype, most: float, bn_size: int | None, drop_rate: float
) -> None:
    """On average over many draws: in half precision, one flipped sign outweighs all rounding errors."""
    options: dict[str, Any] = {"bn_size": bn_size, "tail": "norm and conv", "layers": 5, "drop_rate": drop_rate}
    totals = {"reference": 0.0, "fused": 0.0}
    for seed in range(12):
        x = maps((8, 5, 8, 8), seed, dtype)
        exact = take_step(Block("reference", **options).float().double(), x.double())
        for form in totals:
            step = take_step(Block(form, **options).float(), x, autocast=None if dtype == torch.float32 else dtype)
            assert step["y"].dtype == step["x.grad"].dtype == dtype
            of_model = {tensor.dtype for name, tensor in step.items() if name not in ("y", "x.grad")}
            assert of_model == {torch.float32, torch.int64}
            totals[form] += error(step, exact) / 12
    assert 0 < totals["fused"] <= most * totals["reference"]
    assert totals["reference"] < {torch.float32: 1e-5, torch.bfloat16: 0.5, torch.float16: 0.2}[dtype]


NETS: dict[str, dict[str, Any]] = {
    "notebook": {"drop_rate": 0.2},
    "densenet_bc": {},
    "densenet121": {"num_layers": (1, 2, 3, 1), "image_size": 64},
}


@pytest.mark.parametrize("variant", NETS)
def test_networks_train_alike(variant: str) -> None:
    side, results = NETS[variant].get("image_size", 8), []
    x = maps((4, 3, side, side)).contiguous()
    for form in ("reference", "fused"):
        net = small_net(form, variant, **NETS[variant])
        if variant == "densenet_bc":
            net.to(memory_format=torch.contiguous_format)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        first = take_step(net.train(), x)
        optimizer.step()
        net.eval()
        with torch.no_grad():
            judged = net(x)
        optimizer.zero_grad()
        second = take_step(net, x)
        results.append([first, second, {"judged": judged}])
        for name, parameter in net.named_parameters():
            assert parameter.grad.stride() == parameter.stride(), name
    for reference, fused in zip(*results, strict=True):
        assert_same(fused, reference, 1e-9)
    assert torch.equal(results[1][2]["judged"], results[1][1]["y"])
    assert (results[1][1]["y"] - results[1][0]["y"]).abs().max() > 1e-3

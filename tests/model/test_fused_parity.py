"""The fused dense block computes what the reference form computes: outputs, gradients, running statistics."""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import zip_longest
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densenet_dist.model import DenseNet, densenet
from densenet_dist.model.forms import dense_block
from densenet_dist.model.fused import backward, convolutions, operator
from densenet_dist.model.fused.structure import Unit
from densenet_dist.model.kernels.eager import EagerKernels
from densenet_dist.model.kernels.interface import Kernels
from densenet_dist.model.kernels.native import NativeKernels

TAILS = ["no tail", "norm", "norm and conv"]
KERAS, TORCH = (0.01, 1e-3), (0.1, 1e-5)
Found = Mapping[str, Tensor | None]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine more of them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    """A dense block and what follows it, in either form, from seeded weights and norms that do something."""

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
        self.form = form
        self.block = dense_block(
            form,
            num_layers=layers,
            in_channels=channels,
            growth_rate=growth,
            bn_size=bn_size,
            drop_rate=drop_rate,
            norm=norm,
        )
        width = channels + layers * growth
        self.norm = norm(width) if tail != "no tail" else None
        self.conv = nn.Conv2d(width, 3, 1, bias=False) if tail == "norm and conv" else None
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.5)
                module.running_mean.normal_(std=0.5)
                module.running_var.uniform_(0.5, 2)
        self.double().to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "fused":
            return self.block(x, self.norm, self.conv)
        x = self.block(x)
        x = x if self.norm is None else F.relu(self.norm(x))
        return x if self.conv is None else self.conv(x)


def maps(shape: tuple[int, ...] = (4, 5, 6, 5), seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def take_step(
    model: nn.Module, x: Tensor, *, seed: int = 7, needs_x: bool = True, autocast: torch.dtype | None = None
) -> dict[str, Tensor | None]:
    """Run forward and backward; everything that comes of it by name. Dropout starts from `seed`."""
    x = x.detach().clone().requires_grad_(needs_x)
    torch.manual_seed(seed)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = model(x)
    if y.requires_grad:
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        y.backward(cotangent.to(y.dtype))
    return {"y": y.detach(), "x.grad": x.grad, **state_of(model)}


def state_of(model: nn.Module) -> dict[str, Tensor | None]:
    parameters = dict(model.named_parameters())
    gradients = {f"{name}.grad": parameter.grad for name, parameter in parameters.items()}
    return (
        gradients | {name: parameter.detach() for name, parameter in parameters.items()} | dict(model.named_buffers())
    )


def assert_same(found: Found, expected: Found, atol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        assert (tensor is None) == (other is None), name
        if tensor is not None and other is not None:
            torch.testing.assert_close(
                other, tensor, rtol=0, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


def assert_same_step(
    prepare: Callable[[Block], object] = lambda _: None,
    x: Tensor | None = None,
    *,
    needs_x: bool = True,
    atol: float = 1e-10,
    **options: Any,
) -> tuple[dict[str, Tensor | None], Block]:
    """Compare a step of both forms; returns what came of the fused one's, and it."""
    x = maps() if x is None else x
    reference, fused = Block("reference", **options), Block("fused", **options)
    found = []
    for model in (reference, fused):
        prepare(model)
        found.append(take_step(model, x, needs_x=needs_x))
    assert_same(found[1], found[0], atol)
    return found[1], fused


both_kinds = pytest.mark.parametrize("bn_size", [None, 2], ids=["plain", "bottleneck"])
each_tail = pytest.mark.parametrize("tail", TAILS)


@pytest.mark.parametrize("dialect", [KERAS, TORCH], ids=["keras", "torch"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@both_kinds
@each_tail
def test_a_step_is_the_same(bn_size: int | None, tail: str, dialect: tuple[float, float], training: bool) -> None:
    found, _ = assert_same_step(lambda m: m.train(training), bn_size=bn_size, tail=tail, dialect=dialect)
    assert all(tensor is not None for tensor in found.values())
    tracked = [int(tensor) for name, tensor in found.items() if name.endswith("num_batches_tracked")]
    assert set(tracked) == {int(training)}


@both_kinds
@each_tail
def test_it_is_the_operator_that_runs(bn_size: int | None, tail: str) -> None:
    """Or all that is compared here would be the reference form with itself."""
    y = Block("fused", bn_size=bn_size, tail=tail)(maps())
    assert "dense_block" in y.grad_fn.name()
    assert "dense_block" not in Block("reference", bn_size=bn_size, tail=tail)(maps()).grad_fn.name()


@pytest.mark.parametrize(
    "shape",
    [(4, 5, 7, 5), (3, 5, 1, 9), (2, 5, 9, 1), (3, 5, 1, 1), (1, 5, 6, 5), (1, 5, 1, 2), (2, 5, 40, 33)],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@both_kinds
def test_odd_sizes(shape: tuple[int, ...], training: bool, bn_size: int | None) -> None:
    # Of a handful of values a variance may be tiny, and what is divided by it large.
    assert_same_step(lambda m: m.train(training), maps(shape), bn_size=bn_size, tail="norm and conv", atol=1e-9)


@both_kinds
def test_one_image_of_one_pixel_in_eval_mode(bn_size: int | None) -> None:
    assert_same_step(lambda m: m.eval(), maps((1, 5, 1, 1)), bn_size=bn_size, tail="norm and conv")


@both_kinds
@each_tail
@pytest.mark.parametrize(("channels", "growth"), [(1, 1), (1, 3), (3, 1), (35, 35), (130, 12)])
def test_odd_numbers_of_channels(bn_size: int | None, tail: str, channels: int, growth: int) -> None:
    x = maps((2, channels, 4, 3))
    assert_same_step(x=x, channels=channels, growth=growth, layers=2, bn_size=bn_size, tail=tail)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@both_kinds
def test_no_images_at_all(training: bool, bn_size: int | None) -> None:
    """A rank's share of a batch may be empty."""
    assert_same_step(lambda m: m.train(training), maps((0, 5, 6, 5)), bn_size=bn_size, tail="norm and conv")


@both_kinds
@each_tail
@pytest.mark.parametrize("layers", [1, 2, 4, 9])
@pytest.mark.parametrize("waiting", [1, 2, 3, 4])
def test_any_number_of_layers_may_wait(
    monkeypatch: pytest.MonkeyPatch, bn_size: int | None, tail: str, layers: int, waiting: int
) -> None:
    monkeypatch.setattr(backward, "WAITING", {"cpu": waiting})
    assert_same_step(x=maps((2, 5, 4, 3)), layers=layers, bn_size=bn_size, tail=tail)


def units_of(model: Block) -> list[Unit]:
    parts = model.block._parts(model.norm, model.conv)
    weights = [conv.weight for conv in parts.convs]
    return [Unit(bn.weight, bn.bias, weight, bn.eps) for bn, weight in zip_longest(parts.norms, weights)]


@pytest.fixture(params=[NativeKernels, EagerKernels])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Those that a block gets: with the native ones convolutions of their own, which take 1x1 ones whole."""
    made = request.param()
    monkeypatch.setattr(operator, "choose_kernels", lambda *_: made)
    return made


@pytest.fixture(params=[1, 3], ids=["one image at a time", "three images at a time"])
def in_pieces(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kernels: Kernels, bn_size: int | None, tail: str
) -> None:
    """A CPU convolves large batches in pieces; here four images of 6x5 already."""
    units, native = units_of(Block("fused", bn_size=bn_size, tail=tail)), isinstance(kernels, NativeKernels)
    cut = [unit for unit in units if not (native and unit.weight is not None and unit.weight.shape[2:] == (1, 1))]
    image = 6 * 5 * 8 * max(unit.reads for unit in cut)  # bytes, of the most maps that one of them reads
    monkeypatch.setattr(convolutions, "PIECE_BYTES", request.param * image + 1)
    chosen = convolutions.choose_convolutions(kernels, maps(), units)
    assert [len(piece) for piece in chosen._cut(maps())] == {1: [1, 1, 1, 1], 3: [3, 1]}[request.param]
    assert all(chosen.accumulates(unit) for unit in units)


@both_kinds
@each_tail
@pytest.mark.parametrize("which", ["none", "all", "even", "odd"])
@pytest.mark.parametrize("drop_rate", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.usefixtures("in_pieces")
def test_some_images_at_a_time(bn_size: int | None, tail: str, which: str, drop_rate: float) -> None:
    prepare = (lambda _: None) if which == "none" else partial(freeze, which)
    assert_same_step(prepare, bn_size=bn_size, tail=tail, drop_rate=drop_rate)


@both_kinds
@each_tail
@pytest.mark.usefixtures("in_pieces")
def test_some_images_at_a_time_with_fixed_parameters_and_other_layouts(bn_size: int | None, tail: str) -> None:
    for names in (["conv"], ["denselayer2."], ["bias"]):
        assert_same_step(partial(fix, names), maps().contiguous(), needs_x=False, bn_size=bn_size, tail=tail)
    assert_same_step(lambda m: m.to(memory_format=torch.contiguous_format), bn_size=bn_size, tail=tail)
    model = Block("fused", bn_size=bn_size, tail=tail).to(memory_format=torch.contiguous_format)
    take_step(model, maps())
    assert all(parameter.grad.stride() == parameter.stride() for parameter in model.parameters())


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def freeze(which: str, model: Block) -> None:
    for number, norm in enumerate(norms_of(model)):
        chosen = {
            "all": True,
            "first": number == 0,
            "last": number == len(norms_of(model)) - 1,
            "even": number % 2 == 0,
            "odd": number % 2 == 1,
            "all but one": number != 2,
        }[which]
        norm.train(not chosen)


@pytest.mark.parametrize("drop_rate", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("which", ["all", "first", "last", "even", "odd", "all but one"])
@both_kinds
@each_tail
def test_frozen_norms_in_a_block_that_trains(bn_size: int | None, tail: str, which: str, drop_rate: float) -> None:
    found, fused = assert_same_step(partial(freeze, which), bn_size=bn_size, tail=tail, drop_rate=drop_rate)
    assert fused.block.training
    tracked = [int(tensor) for name, tensor in found.items() if name.endswith("num_batches_tracked")]
    assert 0 in tracked
    assert (1 in tracked) == (which != "all")


@both_kinds
@each_tail
@pytest.mark.parametrize("which", ["none", "odd"])
def test_no_memory_is_read_before_it_is_written(bn_size: int | None, tail: str, which: str) -> None:
    """With deterministic algorithms PyTorch fills new memory with NaN."""

    def prepare(model: Block) -> None:
        if which != "none":
            freeze(which, model)

    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found, _ = assert_same_step(prepare, bn_size=bn_size, tail=tail, drop_rate=0.3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in found.values())


def fix(names: list[str], model: Block) -> None:
    fixed = [p for name, p in model.named_parameters() if any(part in name for part in names)]
    assert fixed
    for parameter in fixed:
        parameter.requires_grad_(False)


@pytest.mark.parametrize(
    "names",
    [
        ["conv"],
        ["norm1.weight", "norm.weight"],
        ["bias"],
        ["denselayer2."],
        ["denselayer1.", "denselayer2."],
        ["denselayer3.", "norm.", "conv."],
        ["denselayer1.conv1", "denselayer3.norm1.bias"],
        ["norm1", "norm2", "norm."],
        ["denselayer"],
        [""],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("needs_x", [True, False], ids=["", "input fixed"])
@both_kinds
def test_fixed_parameters(bn_size: int | None, names: list[str], needs_x: bool) -> None:
    for tail in TAILS:
        if tail != "no tail" or "norm." not in names:
            assert_same_step(partial(fix, names), needs_x=needs_x, bn_size=bn_size, tail=tail)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@both_kinds
@each_tail
def test_dropout_draws_the_same_masks(bn_size: int | None, tail: str, dtype: torch.dtype) -> None:
    """From the same state of the generator, which is left in the same state."""
    outputs, states = [], []
    for form in ("reference", "fused"):
        model = Block(form, bn_size=bn_size, tail="no tail", drop_rate=0.3, layers=5).to(dtype)
        torch.manual_seed(7)
        outputs.append(model(maps(dtype=dtype))[:, 5:])
        states.append(torch.get_rng_state())
    assert torch.equal(outputs[0] == 0, outputs[1] == 0)
    assert 0.2 < (outputs[0] == 0).double().mean() < 0.4
    assert torch.equal(*states)
    if dtype == torch.float64:
        assert_same_step(bn_size=bn_size, tail=tail, drop_rate=0.3, layers=5)


@both_kinds
def test_dropout_alone_in_eval_mode(bn_size: int | None) -> None:
    def only_dropout_trains(model: Block) -> None:
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()

    found, _ = assert_same_step(only_dropout_trains, bn_size=bn_size, drop_rate=0.3)
    assert (found["y"][:, 5:] == 0).any()


@both_kinds
def test_gradients_add_up_over_backward_passes(bn_size: int | None) -> None:
    def step_before(model: Block) -> None:
        take_step(model, maps(seed=5), seed=3)

    found, _ = assert_same_step(step_before, bn_size=bn_size, tail="norm and conv", drop_rate=0.3)
    alone, _ = assert_same_step(bn_size=bn_size, tail="norm and conv", drop_rate=0.3)
    name = "block.denselayer1.conv1.weight.grad"
    assert (found[name] - alone[name]).abs().max() > 0.1


@both_kinds
def test_two_forward_passes_before_the_backward_ones(bn_size: int | None) -> None:
    results = []
    for form in ("reference", "fused"):
        model = Block(form, bn_size=bn_size, tail="norm and conv")
        xs = [maps(seed=seed).requires_grad_() for seed in (1, 2)]
        first, second = (model(x) for x in xs)
        (first.square().sum() + second.sin().sum()).backward()
        results.append({"x0": xs[0].grad, "x1": xs[1].grad, **state_of(model)})
    assert_same(results[1], results[0])


@both_kinds
@each_tail
def test_inputs_and_gradients_in_other_layouts(bn_size: int | None, tail: str) -> None:
    contiguous, base = maps((4, 5, 6, 5)).contiguous(), maps((4, 12, 12, 5))
    for x in (contiguous, base[:, 2:7, ::2], maps((1, 5, 1, 1)).expand(4, 5, 6, 5), maps((4, 5, 5, 6)).transpose(2, 3)):
        results = []
        for form in ("reference", "fused"):
            model = Block(form, bn_size=bn_size, tail=tail)
            leaf = x.detach().requires_grad_()
            model(leaf * 1.5).sum().backward()  # whose gradient is one number, expanded
            model(leaf).mul(maps((4, 1, 6, 1)).contiguous()).sum().backward()
            results.append({"x": leaf.grad, **state_of(model)})
        assert_same(results[1], results[0], 1e-9)
    y = Block("fused", bn_size=bn_size, tail=tail)(contiguous)
    assert y.is_contiguous(memory_format=torch.channels_last)


@both_kinds
def test_what_a_convolution_made_may_be_changed_in_place(bn_size: int | None) -> None:
    results = []
    for form in ("reference", "fused"):
        model = Block(form, bn_size=bn_size, tail="norm and conv")
        y = model(maps())
        F.relu(y.mul_(2).sub_(0.5), inplace=True).square().sum().backward()
        results.append(state_of(model))
    assert_same(results[1], results[0])


@both_kinds
@pytest.mark.parametrize("drop_rate", [0.0, 0.3], ids=["", "dropout"])
def test_training_takes_the_same_course(bn_size: int | None, drop_rate: float) -> None:
    results = []
    for form in ("reference", "fused"):
        model = Block(form, bn_size=bn_size, tail="norm and conv", drop_rate=drop_rate)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
        for step in range(3):
            torch.manual_seed(step)
            model(maps(seed=step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(state_of(model))
    assert_same(results[1], results[0], 1e-9)
    started = state_of(Block("fused", bn_size=bn_size, tail="norm and conv"))
    assert (results[1]["block.denselayer1.conv1.weight"] - started["block.denselayer1.conv1.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("which", ["none", "all", "even"])
@both_kinds
@each_tail
def test_gradients_are_those_of_finite_differences(bn_size: int | None, tail: str, which: str) -> None:
    model = Block("fused", layers=2, channels=2, growth=2, bn_size=bn_size, tail=tail, dialect=KERAS)
    if which != "none":
        freeze(which, model)
    names = [name for name, _ in model.named_parameters()]

    def compute(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    x = maps((2, 2, 3, 2)).requires_grad_()
    assert torch.autograd.gradcheck(compute, (x, *model.parameters()), fast_mode=True, eps=1e-7, atol=1e-5, rtol=1e-4)


@both_kinds
@each_tail
@pytest.mark.parametrize("drop_rate", [0.0, 0.3], ids=["", "dropout"])
def test_nan_goes_wherever_it_goes_in_the_reference_form(bn_size: int | None, tail: str, drop_rate: float) -> None:
    x = maps()
    x[1, 3, 2, 2] = torch.nan
    options = {"bn_size": bn_size, "tail": tail, "drop_rate": drop_rate}
    reference, fused = (take_step(Block(form, **options), x) for form in ("reference", "fused"))
    for name, tensor in reference.items():
        if "grad" in name:  # of a gradient more may be NaN
            assert bool((fused[name].isnan() >= tensor.isnan()).all()), name
        else:
            torch.testing.assert_close(fused[name], tensor, rtol=0, atol=1e-10, equal_nan=True)
    assert fused["y"].isnan().any()
    assert fused["x.grad"].isnan().any()
    assert fused["block.denselayer1.norm1.running_mean"].isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("frozen", [False, True], ids=["", "all but one frozen"])
def test_one_value_a_channel_is_refused_in_training(frozen: bool) -> None:
    for form in ("reference", "fused"):
        model = Block(form)
        if frozen:
            freeze("all but one", model)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            model(maps((1, 5, 1, 1)))
        assert all(norm.num_batches_tracked == 0 for norm in norms_of(model)[:1]) or form == "reference"


def no_momentum(model: Block) -> None:
    for norm in norms_of(model):
        norm.momentum = None


def no_statistics(model: Block) -> None:
    for norm in norms_of(model):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def not_affine(model: Block) -> None:
    for norm in norms_of(model):
        norm.affine = False
        norm.weight = norm.bias = None


def mixed_momentum(model: Block) -> None:
    norms_of(model)[1].momentum = 0.3


def mixed_statistics(model: Block) -> None:
    norm = norms_of(model)[1]
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def mixed_eps(model: Block) -> None:
    for number, norm in enumerate(norms_of(model)):
        norm.eps = 10.0 ** -(number + 1)


def mixed_dropout(model: Block) -> None:
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    drops[0].p = 0.6


def dropout_in_part(model: Block) -> None:
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    drops[1].eval()


@pytest.mark.parametrize(
    "change",
    [
        no_momentum,
        no_statistics,
        not_affine,
        mixed_momentum,
        mixed_statistics,
        mixed_eps,
        mixed_dropout,
        dropout_in_part,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@both_kinds
def test_unusual_parts(change: Callable[[Block], None], training: bool, bn_size: int | None) -> None:
    def prepare(model: Block) -> None:
        model.train(training)
        change(model)
        take_step(model, maps(seed=3))  # a second step sees what the first left

    assert_same_step(prepare, bn_size=bn_size, tail="norm and conv", drop_rate=0.3)


@pytest.mark.parametrize("which", ["none", "all", "even"])
@pytest.mark.parametrize("drop_rate", [0.0, 0.3], ids=["", "dropout"])
@both_kinds
@each_tail
def test_without_fast_kernels_for_the_type(
    monkeypatch: pytest.MonkeyPatch, bn_size: int | None, tail: str, drop_rate: float, which: str
) -> None:
    monkeypatch.setattr(operator, "choose_kernels", lambda *_: EagerKernels())

    def prepare(model: Block) -> None:
        if which != "none":
            freeze(which, model)

    assert_same_step(prepare, bn_size=bn_size, tail=tail, drop_rate=drop_rate, layers=4)


def error(found: Found, exact: Found) -> float:
    """Mean over outputs, gradients and statistics of a tensor's distance to the exact one, in units of its norm."""
    names = [name for name in exact if name == "y" or name.endswith(("grad", "running_mean", "running_var"))]
    assert len(names) > 20
    parts = [(found[name].double() - exact[name]).norm() / exact[name].norm() for name in names]
    return float(torch.stack(parts).mean())


def errors(dtype: torch.dtype, **options: Any) -> tuple[float, float]:
    """How far steps in `dtype` are from the same in float64: of the reference form, and of the fused one."""
    totals = {"reference": 0.0, "fused": 0.0}
    for seed in range(12):
        x = maps((8, 5, 8, 8), seed, dtype)
        exact = take_step(Block("reference", **options).float().double(), x.double())
        for form in totals:
            step = take_step(Block(form, **options).float(), x, autocast=None if dtype == torch.float32 else dtype)
            assert step["y"].dtype == dtype
            totals[form] += error(step, exact) / 12
    return totals["reference"], totals["fused"]


@both_kinds
@pytest.mark.parametrize("drop_rate", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.float32, 1.5), (torch.bfloat16, 1.1), (torch.float16, 1.25)],
    ids=["fp32", "bf16", "fp16"],
)
@pytest.mark.parametrize("pieces", [False, True], ids=["", "one image at a time"])
def test_errors_of_rounding_are_no_larger(
    monkeypatch: pytest.MonkeyPatch,
    bn_size: int | None,
    dtype: torch.dtype,
    most: float,
    drop_rate: float,
    pieces: bool,
) -> None:
    """In half precision on the average of many draws: a sign that flips weighs more than all roundings."""
    if pieces:
        monkeypatch.setattr(convolutions, "PIECE_BYTES", 1)
    reference, fused = errors(dtype, bn_size=bn_size, tail="norm and conv", layers=5, drop_rate=drop_rate)
    print(f"{dtype}: fused / reference: {fused / reference:.3f}")
    assert 0 < fused <= most * reference
    assert reference < {torch.float32: 1e-5, torch.bfloat16: 0.5, torch.float16: 0.2}[dtype]


@both_kinds
@each_tail
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_maps_are_of_its_type(bn_size: int | None, tail: str, dtype: torch.dtype) -> None:
    model = Block("fused", bn_size=bn_size, tail=tail).float()
    found = take_step(model, maps(dtype=torch.float32), autocast=dtype)
    assert found["y"].dtype == dtype
    del found["y"]
    assert {tensor.dtype for tensor in found.values()} == {torch.float32, torch.int64}


@both_kinds
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_block_whose_parameters_are_in_half_precision(
    bn_size: int | None, training: bool, dtype: torch.dtype
) -> None:
    x, tolerance = maps((8, 5, 8, 8)), {torch.bfloat16: 0.3, torch.float16: 0.1}[dtype]
    results = []
    for form in ("reference", "fused"):
        model = Block(form, bn_size=bn_size, tail="norm and conv", dialect=TORCH).to(dtype).train(training)
        results.append(take_step(model, x.to(dtype)))
    for name, tensor in results[0].items():
        assert results[1][name].dtype == tensor.dtype, name
    exact = {name: tensor.double() for name, tensor in results[0].items()}
    assert error(results[1], exact) < tolerance


NETS: dict[str, dict[str, Any]] = {
    "notebook": {"growth_rate": 6, "num_layers": 2, "compression": 0.5},
    "densenet": {"growth_rate": 6, "num_layers": 3},
    "densenet_bc": {"growth_rate": 6, "num_layers": 2},
    "densenet121": {"growth_rate": 4, "num_layers": (1, 2, 3, 1), "image_size": 64},
}


def both_nets(variant: str, **options: Any) -> tuple[DenseNet, DenseNet]:
    made = []
    for form in ("reference", "fused"):
        torch.manual_seed(0)
        net = densenet(variant, num_classes=10, block=form, **NETS[variant], **options).double()
        for norm in norms_of(net):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.5)
        made.append(net)
    return made[0], made[1]


def images(variant: str) -> Tensor:
    side = NETS[variant].get("image_size", 32)
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("drop_rate", [0.0, 0.2], ids=["", "dropout"])
@pytest.mark.parametrize("variant", NETS)
def test_nets_are_the_same(variant: str, drop_rate: float) -> None:
    x, results = images(variant), []
    for net in both_nets(variant, drop_rate=drop_rate):
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


@pytest.mark.parametrize("variant", NETS)
def test_state_dicts_load_both_ways(variant: str) -> None:
    reference, fused = both_nets(variant)
    assert list(reference.state_dict()) == list(fused.state_dict())
    for source, target in ((reference, fused), (fused, reference)):
        with torch.no_grad():
            for tensor in (*source.parameters(), *source.buffers()):
                tensor.add_(1)
        target.load_state_dict(copy.deepcopy(source.state_dict()), strict=True)
        for name, tensor in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], tensor), name
            assert target.state_dict()[name].stride() == tensor.stride(), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nan_in_an_image_is_a_nan_loss(training: bool) -> None:
    x = images("notebook")
    x[2, 1, 5, 5] = torch.nan
    found = []
    for net in both_nets("notebook"):
        logits = net.train(training)(x)
        F.cross_entropy(logits, torch.arange(4)).backward()
        found.append(logits.isnan().any(1).tolist())
        assert net.features.conv0.weight.grad.isnan().any()
    assert found[0] == found[1] == ([True] * 4 if training else [False, False, True, False])


def test_a_net_in_channels_first_memory_is_the_same() -> None:
    results = []
    for net in both_nets("densenet_bc"):
        net.to(memory_format=torch.contiguous_format)
        results.append(take_step(net, images("densenet_bc")))
        for name, parameter in net.named_parameters():
            assert parameter.grad.stride() == parameter.stride(), name
    assert_same(results[1], results[0], 1e-9)


def test_gradients_of_a_block_in_channels_first_memory_have_its_strides() -> None:
    for bn_size in (None, 2):
        model = Block("fused", bn_size=bn_size, tail="norm and conv").to(memory_format=torch.contiguous_format)
        take_step(model, maps())
        for name, parameter in model.named_parameters():
            assert parameter.grad.stride() == parameter.stride(), name

"""The fused dense block under what PyTorch does to modules: compiling, exporting, checkpointing, copying."""

import copy
import io
import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from densenet_dist.model import DenseNet, densenet, fused_block
from densenet_dist.model.forms import dense_block
from densenet_dist.model.fused import operator

Found = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine more of them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def block(form: str = "fused", *, layers: int = 2, bn_size: int | None = None, drop_rate: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    made = dense_block(
        form,
        num_layers=layers,
        in_channels=3,
        growth_rate=2,
        bn_size=bn_size,
        drop_rate=drop_rate,
        norm=partial(nn.BatchNorm2d, momentum=0.1, eps=1e-3),
    )
    return seeded(made)


def net(form: str = "fused", variant: str = "notebook", **options: Any) -> DenseNet:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"growth_rate": 4, "num_layers": (2, 1), "image_size": 8}
    compression = {"compression": 0.5} if variant == "notebook" else {}
    return seeded(densenet(variant, num_classes=3, block=form, **sizes, **compression, **options))


def seeded(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            module.running_mean.normal_(std=0.5)
            module.running_var.uniform_(0.5, 2)
    return model.double().to(memory_format=torch.channels_last)


def maps(number: int = 2, *, channels: int = 3, side: int = 4) -> Tensor:
    shape = (number, channels, side, side)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


def take_step(model: nn.Module, x: Tensor, call: Any = None) -> Found:
    """Gradients and buffers after a step through `call`, or `model` itself; gradients start from nothing."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    y = model(x) if call is None else call(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    gradients = {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}
    return {"y": y.detach(), "x.grad": x.grad, **gradients, **{n: b.clone() for n, b in model.named_buffers()}}


def assert_same(found: Found, expected: Found, atol: float = 1e-11) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


both_kinds = pytest.mark.parametrize("bn_size", [None, 2], ids=["plain", "bottleneck"])


def arguments(bn_size: int | None, tail: str, which: str, dropped: bool, *, needs_gradients: bool = True) -> list[Any]:
    """Arguments of the forward operator: two layers, of 3 and 5 maps, and what follows them."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, low: float = -1.0) -> Tensor:
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64) * (1 - low) + low
        drawn = drawn.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn
        return drawn.requires_grad_(needs_gradients)

    weights, reads = [], []
    for width in (3, 5):
        weights += [draw(2, width, 3, 3)] if bn_size is None else [draw(4, width, 1, 1), draw(2, 4, 3, 3)]
        reads += [width] if bn_size is None else [width, 4]
    masks = [torch.rand(2, len(weight), 3, 4, generator=generator) < 0.7 for weight in weights] if dropped else []
    if tail != "no tail":
        reads += [7]
    if tail == "norm and conv":
        weights += [draw(3, 7, 1, 1)]
    training = {
        "all": [True] * len(reads),
        "none": [False] * len(reads),
        "some": [number % 2 == 0 for number in range(len(reads))],
    }[which]
    frozen = [
        statistic.detach()
        for width, trains in zip(reads, training, strict=True)
        if not trains
        for statistic in (draw(width), draw(width, low=0.5))
    ]
    return [
        draw(2, 3, 3, 4), [draw(width, low=0.5) for width in reads], [draw(width) for width in reads], weights, frozen,
        [mask.contiguous(memory_format=torch.channels_last) for mask in masks], training, [1e-3] * len(reads),
        bn_size is not None, tail != "no tail", 0.7 if dropped else 1.0, False, True,
    ]  # fmt: skip


each_tail = pytest.mark.parametrize("tail", ["no tail", "norm", "norm and conv"])


@both_kinds
@each_tail
@pytest.mark.parametrize("which", ["all", "none", "some"])
@pytest.mark.parametrize("dropped", [False, True], ids=["", "masks"])
def test_the_operator_keeps_the_rules(bn_size: int | None, tail: str, which: str, dropped: bool) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dropped == (which == "some"):  # it traces, which takes ten times as long
        tests += ["test_aot_dispatch_dynamic"]
    torch.library.opcheck(operator.dense_block, arguments(bn_size, tail, which, dropped), test_utils=tests)


@both_kinds
@each_tail
@pytest.mark.parametrize("which", ["all", "none", "some"])
@pytest.mark.parametrize("need_x", [True, False])
def test_the_gradient_operator_keeps_the_rules(bn_size: int | None, tail: str, which: str, need_x: bool) -> None:
    given = arguments(bn_size, tail, which, True, needs_gradients=False)
    _, gammas, betas, weights, frozen, masks, *settings, _ = given
    made, out, mean, var, inner, inner_mean, inner_var, _ = operator.dense_block(*given)
    gradient = torch.randn_like(made if tail == "no tail" else out)
    needs = [number != 1 for number in range(len(weights))]
    torch.library.opcheck(
        operator.dense_block_backward,
        (gradient, made, mean, var, inner, inner_mean, inner_var, gammas, betas, weights, frozen, masks, *settings,
         need_x, needs),
        test_utils=["test_schema", "test_faketensor"],
    )  # fmt: skip


def layouts(value: Any) -> Any:
    """Shapes, strides and types of what an operator returns."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return [layouts(part) for part in value]


@both_kinds
@each_tail
@pytest.mark.parametrize("which", ["all", "none", "some"])
def test_a_compiler_is_told_the_true_layouts(bn_size: int | None, tail: str, which: str) -> None:
    """Strides, too, of which `opcheck` says nothing."""
    *given, keeps = arguments(bn_size, tail, which, True, needs_gradients=False)

    def compute(given: list[Any]) -> tuple[Any, Any]:
        made, out, mean, var, inner, inner_mean, inner_var, count = operator.dense_block(*given, keeps)
        gradient = torch.empty_like(made if tail == "no tail" else out).zero_()
        _, gammas, betas, weights, frozen, masks, *settings = given
        gradients = operator.dense_block_backward(
            gradient, made, mean, var, inner, inner_mean, inner_var, gammas, betas, weights, frozen, masks, *settings,
            True, [number != 1 for number in range(len(weights))],
        )  # fmt: skip
        return layouts((made, out, mean, var, inner, inner_mean, inner_var, count)), layouts(gradients)

    real = compute(given)
    with FakeTensorMode() as mode:
        fake = compute(torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, given))
    assert fake == real


def compiled(model: nn.Module, backend: str) -> tuple[Any, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize(("variant", "drop_rate"), [("notebook", 0.0), ("densenet_bc", 0.2)])
def test_a_compiled_net_is_the_same(variant: str, drop_rate: float) -> None:
    eager = net(variant=variant, drop_rate=drop_rate)
    model = copy.deepcopy(eager)
    run, counter = compiled(model, "aot_eager")
    graphs = []
    for number in (4, 4, 6, 7):
        x = maps(number, side=8)
        assert_same(take_step(model, x, run), take_step(eager, x))
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2]  # the second size makes it dynamic, and no other needs a third
    for mode in (eager, model):
        mode.eval()
    for number in (4, 5):
        with torch.no_grad():
            torch.testing.assert_close(run(maps(number, side=8)), eager(maps(number, side=8)), rtol=0, atol=1e-12)
    assert counter.frame_count == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_net_compiled_by_inductor_is_the_same() -> None:
    eager = net()
    model = copy.deepcopy(eager)
    run, counter = compiled(model, "inductor")
    for _ in range(2):
        assert_same(take_step(model, maps(4, side=8), run), take_step(eager, maps(4, side=8)))
    assert counter.frame_count == 1


@both_kinds
def test_a_compiled_block_drops_as_an_eager_one(bn_size: int | None) -> None:
    eager = block(bn_size=bn_size, drop_rate=0.3, layers=3)
    model = copy.deepcopy(eager)
    run, _ = compiled(model, "aot_eager")
    found = take_step(model, maps(4), run)
    assert_same(found, take_step(eager, maps(4)))
    assert (found["y"][:, 3:] == 0).any()


def test_a_compiled_and_checkpointed_block_drops_the_same_twice() -> None:
    """What is dropped shows in the output; the gradient must be of that."""
    model = block(drop_rate=0.3, layers=3)
    torch._dynamo.reset()
    run = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    found = take_step(model, maps(4), run)
    masks = iter([(found["y"][:, 3 + 2 * layer : 5 + 2 * layer] != 0).clone() for layer in range(3)])
    eager = block(drop_rate=0.3, layers=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_block, "_dropout_mask", lambda *_: next(masks))
        expected = take_step(eager, maps(4))
    assert 0 < (found["y"][:, 3:] == 0).double().mean() < 1
    gradients = {name for name in expected if name == "y" or name.endswith("grad")}
    assert_same({name: found[name] for name in gradients}, {name: expected[name] for name in gradients})


@pytest.mark.parametrize("variant", ["notebook", "densenet_bc"])
def test_an_exported_net_is_the_same(variant: str) -> None:
    model = net(variant=variant, drop_rate=0.2).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (maps(4, side=8),), dynamic_shapes={"x": {0: batch}})
    assert sum("densenet_dist.dense_block" in str(node.target) for node in program.graph.nodes) == 2
    for number in (4, 7):
        x = maps(number, side=8)
        torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=1e-12)


@both_kinds
@pytest.mark.parametrize("drop_rate", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpointed_block_is_the_same(bn_size: int | None, drop_rate: float, reentrant: bool) -> None:
    results = []
    for form in ("reference", "fused"):
        model = block(form, bn_size=bn_size, drop_rate=drop_rate, layers=3)
        found = take_step(model, maps(), lambda x, m=model: checkpoint(m, x, use_reentrant=reentrant))
        if not reentrant:  # as soon as all is back that the gradient needs PyTorch stops: where, is its own affair
            found = {name: tensor for name, tensor in found.items() if "running" not in name and "num_" not in name}
        results.append(found)
    assert_same(results[1], results[0])


@both_kinds
def test_a_second_derivative_is_refused(bn_size: int | None) -> None:
    model, x = block(bn_size=bn_size), maps().requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"dense_block_backward.*no autograd formula"):
        first.sum().backward()


@both_kinds
def test_a_functional_call_takes_parameters_and_buffers_from_outside(bn_size: int | None) -> None:
    model, other = block(bn_size=bn_size), block(bn_size=bn_size)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3).add_(0.1)
    before = copy.deepcopy(model.state_dict())
    state = {**dict(other.named_parameters()), **{name: b.clone() for name, b in other.named_buffers()}}
    y = torch.func.functional_call(model, state, (maps(),))
    y.sum().backward()
    expected = take_step(other, maps())
    torch.testing.assert_close(y.detach(), expected["y"], rtol=0, atol=1e-12)
    for name, tensor in state.items():
        if "running" in name or "num_" in name:
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@both_kinds
def test_copies_and_pickles_are_the_same_and_apart(bn_size: int | None) -> None:
    original = block(bn_size=bn_size)
    take_step(original, maps())
    buffer = io.BytesIO()
    torch.save(original, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(original),
        pickle.loads(pickle.dumps(original)),
        torch.load(buffer, weights_only=False),
    ]
    loaded = block(bn_size=bn_size)
    loaded.load_state_dict(pickle.loads(pickle.dumps(original.state_dict())))
    before = copy.deepcopy(original.state_dict())
    results = [take_step(model, maps(3)) for model in (*copies, loaded)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())
    expected = take_step(original, maps(3))
    for found in results:
        assert_same(found, expected, 1e-13)


def test_an_average_of_weights_follows() -> None:
    model = net()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    reference = net("reference")
    reference.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    average.update_parameters(model)
    average.update_parameters(model)
    reference.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(average.eval()(maps(side=8)), reference.eval()(maps(side=8)), rtol=0, atol=1e-11)


@both_kinds
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_same(bn_size: int | None, training: bool, context: Any) -> None:
    results = []
    for form in ("reference", "fused"):
        model = block(form, bn_size=bn_size).train(training)
        with context():
            y = model(maps())
        assert not y.requires_grad
        results.append({"y": y.clone(), **{n: b.clone() for n, b in model.named_buffers()}})
    assert_same(results[1], results[0])


@both_kinds
def test_the_output_of_a_frozen_net_needs_no_gradient(bn_size: int | None) -> None:
    model = block(bn_size=bn_size).requires_grad_(False)
    assert not model(maps()).requires_grad
    assert model(maps().requires_grad_()).requires_grad


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@both_kinds
def test_anomaly_detection_and_hooks_on_tensors_work(bn_size: int | None) -> None:
    model, seen = block(bn_size=bn_size), []
    x = maps().requires_grad_()
    x.register_hook(seen.append)
    model["denselayer2"].conv1.weight.register_hook(seen.append)
    with torch.autograd.detect_anomaly(check_nan=True):
        model(x).sum().backward()
    assert sorted(gradient.shape[1] for gradient in seen) == [3, 5]

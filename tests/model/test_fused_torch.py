"""The fused dense block under what PyTorch does to modules: compiling, exporting, checkpointing, copying."""

import copy
from typing import Any

import pytest
import torch
from fused import Block, Found, assert_same, both_kinds, each_tail, maps, norms_of, small_net, take_step
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from densenet_dist.model import fused_block
from densenet_dist.model.fused import operator


def block(form: str = "fused", *, layers: int = 2, bn_size: int | None = None, drop_rate: float = 0.0) -> nn.Module:
    return Block(form, layers=layers, channels=3, growth=2, bn_size=bn_size, drop_rate=drop_rate).block


def small_maps(number: int = 2, side: int = 4) -> Tensor:
    return maps((number, 3, side, side), seed=number)


def arguments(bn_size: int | None, tail: str, which: str, dropped: bool, *, needs_gradients: bool = True) -> list[Any]:
    """What a block of two layers calls the forward operator with."""
    model = Block("fused", layers=2, channels=3, growth=2, bn_size=bn_size, tail=tail, drop_rate=0.3 * dropped)
    for number, norm in enumerate(norms_of(model)):
        norm.train(which == "all" or (which == "some" and number % 2 == 0))
    calls: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_block, "dense_block", lambda *given: calls.append(given) or operator.dense_block(*given))
        model(maps((2, 3, 3, 4)))
    return [
        torch.utils._pytree.tree_map_only(
            Tensor, lambda t, n=n: t.detach().requires_grad_(needs_gradients and n < 4), part
        )
        for n, part in enumerate(calls[0])
    ]


def backward_arguments(given: list[Any], gradient: Tensor, made: tuple[Any, ...]) -> tuple[Any, ...]:
    """Those of the gradient operator, from what the forward operator was given and made."""
    maps, _, *saved, _ = made
    _, gammas, betas, weights, frozen, masks, *settings, _ = given
    needs = [number != 1 for number in range(len(weights))]
    return (gradient, maps, *saved, gammas, betas, weights, frozen, masks, *settings, True, needs)


@both_kinds
@pytest.mark.parametrize(
    ("tail", "which", "dropped"), [("no tail", "all", False), ("norm", "none", True), ("norm and conv", "some", True)]
)
def test_the_operators_keep_the_rules(bn_size: int | None, tail: str, which: str, dropped: bool) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if which == "some":  # it traces, which takes ten times as long
        tests += ["test_aot_dispatch_dynamic"]
    torch.library.opcheck(operator.dense_block, arguments(bn_size, tail, which, dropped), test_utils=tests)

    given = arguments(bn_size, tail, which, dropped, needs_gradients=False)
    made = operator.dense_block(*given)
    gradient = torch.randn_like(made[0] if tail == "no tail" else made[1])
    torch.library.opcheck(
        operator.dense_block_backward,
        backward_arguments(given, gradient, made),
        test_utils=["test_schema", "test_faketensor"],
    )


def layouts(value: Any) -> Any:
    """Shapes, strides and types of what an operator returns."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return [layouts(part) for part in value]


@both_kinds
@each_tail
def test_a_compiler_is_told_the_true_layouts(bn_size: int | None, tail: str) -> None:
    """Strides, too, of which `opcheck` says nothing."""

    def compute(given: list[Any]) -> tuple[Any, Any]:
        made = operator.dense_block(*given)
        gradient = torch.empty_like(made[0] if tail == "no tail" else made[1]).zero_()
        return layouts(made), layouts(operator.dense_block_backward(*backward_arguments(given, gradient, made)))

    for which in ("all", "none", "some"):
        given = arguments(bn_size, tail, which, True, needs_gradients=False)
        real = compute(given)
        with FakeTensorMode() as mode:
            fake = compute(torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, given))
        assert fake == real


def test_a_compiled_net_is_the_same() -> None:
    eager = small_net("fused", "densenet_bc", drop_rate=0.2)
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    graphs = []
    for number in (4, 4, 6, 7):
        model.zero_grad()
        eager.zero_grad()
        x = small_maps(number, side=8)
        assert_same(take_step(model, x, call=run), take_step(eager, x))
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2]  # the second size makes it dynamic, and no other needs a third
    for mode in (eager, model):
        mode.eval()
    for number in (4, 5):
        with torch.no_grad():
            x = small_maps(number, side=8)
            torch.testing.assert_close(run(x), eager(x), rtol=0, atol=1e-12)
    assert counter.frame_count == 3


def without_statistics(found: Found) -> Found:
    return {name: tensor for name, tensor in found.items() if "running" not in name and "num_" not in name}


def test_an_exported_net_is_the_same() -> None:
    model = small_net("fused", "densenet_bc", drop_rate=0.2).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (small_maps(4, side=8),), dynamic_shapes={"x": {0: batch}})
    assert sum("densenet_dist.dense_block" in str(node.target) for node in program.graph.nodes) == 2
    for number in (4, 7):
        x = small_maps(number, side=8)
        torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=1e-12)


@both_kinds
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpointed_block_is_the_same(bn_size: int | None, reentrant: bool) -> None:
    results = []
    for form in ("reference", "fused"):
        model = block(form, bn_size=bn_size, drop_rate=0.3, layers=3)
        found = take_step(model, small_maps(), call=lambda x, m=model: checkpoint(m, x, use_reentrant=reentrant))
        # As soon as all is back that the gradient needs PyTorch stops: where, is its own affair.
        results.append(found if reentrant else without_statistics(found))
    assert_same(results[1], results[0])


def test_a_second_derivative_is_refused() -> None:
    model, x = block(), small_maps().requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"dense_block_backward.*no autograd formula"):
        first.sum().backward()


def test_the_output_of_a_frozen_net_needs_no_gradient() -> None:
    model = block().requires_grad_(False)
    assert not model(small_maps()).requires_grad
    assert model(small_maps().requires_grad_()).requires_grad

"""The fused dense block with torch.compile, torch.export, activation checkpointing and opcheck."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused import Block, Found, assert_same, both_kinds, maps, norms_of, small_net, take_step
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from densenet_dist.model import fused_block
from densenet_dist.model.fused import operator


def block(form: str = "fused", *, layers: int = 2, bn_size: int | None = None, drop_rate: float = 0.0) -> nn.Module:
    return Block(form, layers=layers, channels=3, growth=2, bn_size=bn_size, drop_rate=drop_rate).block


def small_maps(number: int = 2, side: int = 4) -> Tensor:
    return maps((number, 3, side, side), seed=number)


@both_kinds
@pytest.mark.parametrize(
    ("tail", "which", "dropped"), [("no tail", "all", False), ("norm", "none", True), ("norm and conv", "some", True)]
)
def test_opcheck(monkeypatch: pytest.MonkeyPatch, bn_size: int | None, tail: str, which: str, dropped: bool) -> None:
    calls: dict[str, tuple[Any, ...]] = {}

    def record(name: str) -> Callable[..., Any]:
        genuine = getattr(operator, name)
        return lambda *given: calls.setdefault(name, given) and genuine(*given)

    forward, backward = operator.dense_block, operator.dense_block_backward
    monkeypatch.setattr(fused_block, "dense_block", record("dense_block"))
    monkeypatch.setattr(operator, "dense_block_backward", record("dense_block_backward"))
    model = Block("fused", layers=2, channels=3, growth=2, bn_size=bn_size, tail=tail, drop_rate=0.3 * dropped)
    for number, norm in enumerate(norms_of(model)):
        norm.train(which == "all" or (which == "some" and number % 2 == 0))
    take_step(model, maps((2, 3, 3, 4)))

    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if which == "some":  # tracing takes ten times as long
        tests += ["test_aot_dispatch_dynamic"]
    torch.library.opcheck(forward, calls["dense_block"], test_utils=tests)
    torch.library.opcheck(backward, calls["dense_block_backward"], test_utils=["test_schema", "test_faketensor"])
    for function, given in ((forward, calls["dense_block"]), (backward, calls["dense_block_backward"])):
        detached = tree_map_only(Tensor, Tensor.detach, given)
        with FakeTensorMode() as mode:
            fake = function(*tree_map_only(Tensor, mode.from_tensor, detached))
        strides, expected = (tree_map_only(Tensor, Tensor.stride, made) for made in (fake, function(*detached)))
        assert strides == expected  # `opcheck` does not compare strides


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
    assert graphs == [1, 1, 2, 2]  # the second batch size makes the graph dynamic; no other size recompiles it
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
        results.append(found if reentrant else without_statistics(found))
    assert_same(results[1], results[0])

"""The fused dense block with torch.compile, torch.export and activation checkpointing."""

import copy

import pytest
import torch
from fused import Block, assert_same, both_kinds, maps, small_net, take_step
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint


def small_maps(number: int = 2, side: int = 4) -> Tensor:
    return maps((number, 3, side, side), seed=number)


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
        model = Block(form, channels=3, growth=2, bn_size=bn_size, drop_rate=0.3).block
        found = take_step(model, small_maps(), call=lambda x, m=model: checkpoint(m, x, use_reentrant=reentrant))
        if not reentrant:
            found = {name: tensor for name, tensor in found.items() if "running" not in name and "num_" not in name}
        results.append(found)
    assert_same(results[1], results[0])

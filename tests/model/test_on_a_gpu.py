"""GPU launches, simulated without a GPU: see tests/support/launches.py."""

import pytest
import torch
from launches import launches_of_a_step, pretended_gpu
from torch import nn

from densenet_dist.model.variants import densenet
from densenet_dist.train.step_graph import StepGraph

pytest.importorskip("triton")


@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize(
    ("net", "most", "wide"),
    [
        ({"variant": "notebook"}, 400, 102 / 103),
        ({"variant": "densenet_bc", "depth": 100, "growth_rate": 12}, 700, 0.98),
    ],
    ids=["notebook", "bc100"],
)
def test_launches_of_a_step(net, most, wide, synchronized, monkeypatch):
    """A launch costs 10 to 40 us of Python. Nearly all BN-ReLU passes read 16 bytes at once."""
    model = densenet(**net, num_classes=10, block="fused")
    if synchronized:
        model, most = nn.SyncBatchNorm.convert_sync_batchnorm(model), 10 * most
        monkeypatch.setattr("densenet_dist.model.fused_block._is_synchronized", lambda _: True)
        monkeypatch.setattr("torch.distributed.all_reduce", lambda _: None)
    launches = launches_of_a_step(model, batch_size=256)
    assert sum(launches.counts.values()) <= most
    assert launches.read[8] >= wide * launches.read.total()
    assert launches.waits == []


def test_a_captured_learning_rate_stays_where_it_is():
    with pretended_gpu():
        device = torch.device("cuda")  # without an index, as in RunContext
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1, device=device))], lr=0.0, fused=True)
        graph = StepGraph(lambda *batch: batch, optimizer, device)
        graph.set_learning_rate(0.1)
        learning_rate = optimizer.param_groups[0]["lr"]
        graph.set_learning_rate(0.2)
        assert optimizer.param_groups[0]["lr"] is learning_rate

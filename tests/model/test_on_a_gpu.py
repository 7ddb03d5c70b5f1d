"""What would happen on a GPU, told without one: on FakeTensors."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from densenet_dist.train.step_graph import StepGraph


def test_a_captured_learning_rate_stays_where_it_is() -> None:
    with FakeTensorMode():
        device = torch.device("cuda")  # without an index, as contexts name it
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, device=device))], lr=0.0, fused=True)
        graph = StepGraph(lambda *batch: batch, optimizer, device)
        graph.set_learning_rate(0.1)
        learning_rate = optimizer.param_groups[0]["lr"]
        graph.set_learning_rate(0.2)
        assert optimizer.param_groups[0]["lr"] is learning_rate

"""The model for TensorBoard's Graphs tab: nested modules with the shapes of their outputs.

It is built on the meta device, so that nothing is computed and no random number is drawn, and traced by torch.fx.
`SummaryWriter.add_graph` would run the model, and show every weight and every constant of its trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from densenet_dist.schema import ModelConfig
from densenet_dist.train.network import build_model

if TYPE_CHECKING:
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.compat.proto.node_def_pb2 import NodeDef


def model_graph(config: ModelConfig, num_classes: int, image_size: int) -> GraphDef:
    """The graph of the configured model, with reference dense blocks: the definition, layer by layer."""
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.compat.proto.versions_pb2 import VersionDef

    with torch.device("meta"):
        model = build_model(replace(config, block="reference"), num_classes, image_size).eval()
        traced = fx.symbolic_trace(model)
        maps = torch.empty(1, 3, image_size, image_size)
    shapes = _Shapes(traced)
    shapes.run(maps)
    return GraphDef(node=list(_nodes(traced, shapes.found)), versions=VersionDef(producer=22))


class _Shapes(fx.Interpreter):
    """Runs a traced model on a batch of one, and records the shape of each node's value."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.found[n] = tuple(value.shape)
        return value


def _nodes(traced: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]]) -> Iterator[NodeDef]:
    from torch.utils.tensorboard._proto_graph import node_proto

    names: dict[fx.Node, str] = {}
    for node in traced.graph.nodes:
        if node.target == "contiguous":  # no part of the definition
            names[node] = names[node.all_input_nodes[0]]
            continue
        names[node] = _name(node)
        size: list[Any] = list(shapes[node])
        size[0] = -1  # any number of images
        yield node_proto(
            names[node],
            op=_operation(traced, node),
            input=[names[other] for other in node.all_input_nodes],
            outputsize=size,
            attributes=_settings(traced, node),
        )


def _name(node: fx.Node) -> str:
    """``features/denseblock1/denselayer1/conv1``: TensorBoard makes boxes of the parts of names."""
    if node.op == "call_module":
        return str(node.target).replace(".", "/")
    if node.op in ("placeholder", "output"):
        return {"placeholder": "images", "output": "logits"}[node.op]
    within = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
    own = node.name.removeprefix("adaptive_")  # the whole of adaptive_avg_pool2d finds no room there
    return "/".join([*within[-1:], own]).replace(".", "/")


def _operation(traced: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))).__name__
    return {"placeholder": "Input", "output": "Output"}.get(node.op) or node.name.rstrip("_0123456789")


def _settings(traced: fx.GraphModule, node: fx.Node) -> str:
    """What a module says of itself, such as its channels and its kernel's size, and how many parameters it has."""
    if node.op != "call_module":
        return ""
    module: nn.Module = traced.get_submodule(str(node.target))
    count = sum(parameter.numel() for parameter in module.parameters())
    return ", ".join([*filter(None, [module.extra_repr()]), *([f"{count:,} parameters"] if count else [])])

"""The layers of a model with their output shapes and parameters, as Keras' ``model.summary()`` shows them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from densenet_dist.model import ParameterCount, count_parameters
from densenet_dist.schema import ModelConfig
from densenet_dist.train.job import build_model


class Layer(NamedTuple):
    """A module.

    Attributes:
        name: where it is in the model.
        kind: its class.
        depth: modules that it is inside of.
        shape: of what it gives for one image, without the batch's dimension: (C, H, W), or (classes,).
        parameters: trainable ones and running statistics, of all modules inside as well.
        is_whole: whether no other module is inside.
    """

    name: str
    kind: str
    depth: int
    shape: tuple[int, ...]
    parameters: int
    is_whole: bool


@dataclass(frozen=True)
class ModelSummary:
    """The modules in the order in which they are defined, and the parameters of all together."""

    layers: tuple[Layer, ...]
    parameters: ParameterCount


def summarise(config: ModelConfig, num_classes: int, image_size: int) -> ModelSummary:
    """Build the model without memory for its weights, and show it an image without pixels.

    It is the reference form of the dense block that is shown: the fused form holds the same modules but calls none.

    Raises:
        ConfigError: naming every setting that cannot work.
    """
    with torch.device("meta"):
        model = build_model(replace(config, block="reference"), num_classes, image_size).eval()
    shapes: dict[str, tuple[int, ...]] = {}

    def watch(name: str, module: nn.Module) -> None:
        def note(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            shapes[name] = tuple(output.shape[1:])

        module.register_forward_hook(note)

    modules = {name: module for name, module in model.named_modules() if name}
    for name, module in modules.items():
        watch(name, module)
    with torch.no_grad():
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    layers = tuple(
        Layer(
            name=name,
            kind=type(module).__name__,
            depth=name.count("."),
            shape=shapes[name],
            parameters=count_parameters(module).total,
            is_whole=not list(module.children()),
        )
        for name, module in modules.items()
    )
    return ModelSummary(layers, count_parameters(model))

"""The layers of a model with their output shapes and parameters, as Keras' ``model.summary()`` shows them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from densenet_dist.data.cifar import SPECS
from densenet_dist.data.shapes import CLASS_NAMES
from densenet_dist.errors import ConfigError
from densenet_dist.model import ParameterCount, count_parameters
from densenet_dist.schema import Config, ModelConfig
from densenet_dist.train.network import build_model

_CLASSES: Final = {"shapes": len(CLASS_NAMES), **{name: spec.num_classes for name, spec in SPECS.items()}}


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


@dataclass(frozen=True, repr=False)
class ModelSummary:
    """The modules in the order in which they are defined, and the parameters of all together; printed, a table."""

    layers: tuple[Layer, ...]
    parameters: ParameterCount

    def __repr__(self) -> str:
        lines = [("layer (type)", "output shape", "parameters")]
        for layer in self.layers:
            name = "  " * layer.depth + layer.name.rpartition(".")[2]
            shape = ", ".join(["N", *map(str, layer.shape)])
            lines.append((f"{name} ({layer.kind})", f"({shape})", f"{layer.parameters:,}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {count:>{widths[2]}}" for name, shape, count in lines]
        rule = "-" * (sum(widths) + 4)
        count = self.parameters
        totals = {"total": count.total, "trainable": count.trainable, "non-trainable": count.statistics}
        text = [text[0], rule, *text[1:], rule, *(f"{name} parameters: {number:,}" for name, number in totals.items())]
        return "\n".join(text)


def summary(config: Config, num_classes: int | None = None) -> ModelSummary:
    """The configured model's layers, as Keras' ``model.summary()`` shows them; neither trained nor even allocated.

    A module that others are inside of has their parameters too. N is the number of images.

    Args:
        config: from `densenet_dist.load_config`.
        num_classes: of pictures of one's own (``data.name=folder``); of the other data sets it is known.

    Raises:
        ConfigError: where the model cannot be built, or `num_classes` is missing.

    Examples:
        >>> from densenet_dist import load_config
        >>> config = load_config({"model.growth_rate": 35, "model.num_layers": 12, "data.name": "cifar10"})
        >>> summary(config).parameters
        ParameterCount(trainable=3532210, statistics=25480)
    """
    classes = _CLASSES.get(config.data.name, num_classes) if num_classes is None else num_classes
    if classes is None:
        raise ConfigError(
            f"num_classes: the number of classes of data.name={config.data.name} is that of its folders\n"
            "  give it: summary(config, num_classes=...)"
        )
    return summarise(config.model, classes, config.data.side)


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

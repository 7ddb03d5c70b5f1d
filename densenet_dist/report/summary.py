"""Summarize a model's layers with output shapes and parameters, like Keras' ``model.summary()``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from densenet_dist.custom import is_custom
from densenet_dist.data.cifar import SPECS
from densenet_dist.data.shapes import CLASS_NAMES
from densenet_dist.errors import ConfigError
from densenet_dist.model import ParameterCount, count_parameters
from densenet_dist.schema import Config
from densenet_dist.train.network import build_model

_CLASSES: Final = {"shapes": len(CLASS_NAMES), **{name: spec.num_classes for name, spec in SPECS.items()}}


class Layer(NamedTuple):
    """A module.

    Attributes:
        name: its qualified name in the model.
        kind: its class.
        depth: number of modules that contain it.
        shape: of its output without the batch dimension: (C, H, W), or (classes,).
        parameters: trainable parameters and running statistics, including those of its submodules.
        is_leaf: whether it has no submodules.
    """

    name: str
    kind: str
    depth: int
    shape: tuple[int, ...]
    parameters: int
    is_leaf: bool


@dataclass(frozen=True, repr=False)
class ModelSummary:
    """The modules in definition order, and the total parameters; printed as a table."""

    layers: tuple[Layer, ...]
    parameters: ParameterCount

    def __repr__(self) -> str:
        lines = [("layer (type)", "output shape", "parameters")]
        for layer in self.layers:
            name = "  " * layer.depth + layer.name.rpartition(".")[2]
            shape = f"({', '.join(['N', *map(str, layer.shape)])})" if layer.shape else ""
            lines.append((f"{name} ({layer.kind})", shape, f"{layer.parameters:,}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {count:>{widths[2]}}" for name, shape, count in lines]
        rule = "-" * (sum(widths) + 4)
        count = self.parameters
        totals = {"total": count.total, "trainable": count.trainable, "non-trainable": count.statistics}
        text = [text[0], rule, *text[1:], rule, *(f"{name} parameters: {number:,}" for name, number in totals.items())]
        return "\n".join(text)


def summary(config: Config, num_classes: int | None = None) -> ModelSummary:
    """Summarize the layers of the configured model without allocating it.

    The parameters of a module include those of its submodules. N is the number of images.

    Args:
        config: from `densenet_dist.load_config`.
        num_classes: needed for your own images only (``data.name=folder``, or a custom data set).

    Raises:
        ConfigError: the model cannot be built, or `num_classes` is missing.

    Examples:
        >>> from densenet_dist import load_config
        >>> config = load_config({"model.growth_rate": 35, "model.num_layers": 12, "data.name": "cifar10"})
        >>> summary(config).parameters
        ParameterCount(trainable=3532210, statistics=25480)
    """
    classes = _CLASSES.get(config.data.name, num_classes) if num_classes is None else num_classes
    if classes is None:
        raise ConfigError(
            f"num_classes: unknown for data.name={config.data.name}, because its images are not read\n"
            "  set it: summary(config, num_classes=...)"
        )
    return summarize(config, classes, config.data.resolved_image_size)


def summarize(config: Config, num_classes: int, image_size: int) -> ModelSummary:
    """Summarize a model: a DenseNet on the meta device, with the reference form of its blocks, or a custom model.

    The fused form has the same modules but does not call them, so hooks would not see their outputs. Of a custom model,
    modules that are not called, or return something else than a tensor, have no shape.

    Raises:
        ConfigError: naming every setting that cannot work.
    """
    with torch.device("cpu" if is_custom(config.model.variant) else "meta") as device, torch.random.fork_rng([]):
        settings = replace(config.model, block="reference")
        model = build_model(settings, num_classes, image_size, options=config.options.model).eval()
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, _: nn.Module, __: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            shapes[name] = tuple(output.shape[1:])

    modules = {name: module for name, module in model.named_modules() if name}
    for name, module in modules.items():
        module.register_forward_hook(partial(record, name))
    with torch.no_grad():
        model(torch.empty(1, 3, image_size, image_size, device=device))
    layers = tuple(
        Layer(
            name=name,
            kind=type(module).__name__,
            depth=name.count("."),
            shape=shapes.get(name, ()),
            parameters=count_parameters(module).total,
            is_leaf=not list(module.children()),
        )
        for name, module in modules.items()
    )
    return ModelSummary(layers, count_parameters(model))

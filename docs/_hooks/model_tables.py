"""What each net costs, counted from the nets themselves; nothing is computed, and no weight has memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from densenet_dist.config import load_config
from densenet_dist.data.cifar import SPECS
from densenet_dist.model import DenseNet, count_parameters
from densenet_dist.model.variants import VARIANTS
from densenet_dist.schema import ModelConfig
from densenet_dist.train.network import build_model

ROOT = Path(__file__).parents[2]


def variants() -> str:
    """A row for each variant as it is without any further setting."""
    rows = []
    for name in VARIANTS:
        side, classes = (224, 1000) if name[-1].isdigit() else (32, 10)
        model = _built(ModelConfig(variant=name, block="reference"), classes, side)
        net = model.architecture
        layers = ", ".join(map(str, net.num_layers))
        rows.append(f"| `{name}` | {net.growth_rate} | {layers} | {side} | {classes} | {_cost(model)} |")
    head = "| `model.variant` | growth rate | layers | pixels | classes | parameters | multiply-adds |"
    return "\n".join([head, "| --- | ---: | --- | ---: | ---: | ---: | ---: |", *rows])


def configurations() -> str:
    """A row for each configuration that trains on images of a known number of classes."""
    rows = []
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        if path.name.startswith("sweep_") or path.name == "folder.yaml":
            continue
        config = load_config(path)
        classes = SPECS[config.data.name].num_classes if config.data.name in SPECS else 10
        model = _built(config.model, classes, config.data.resolved_image_size)
        rows.append(f"| `configs/{path.name}` | `{config.model.variant}` | {config.data.name} | {_cost(model)} |")
    head = "| configuration | variant | data | parameters | multiply-adds |"
    return "\n".join([head, "| --- | --- | --- | ---: | ---: |", *rows])


def _built(config: ModelConfig, classes: int, side: int) -> DenseNet:
    with torch.device("meta"):
        return build_model(ModelConfig(**{**vars(config), "block": "reference"}), classes, side).eval()


def _cost(model: DenseNet) -> str:
    """Trainable parameters, and millions of multiply-adds of the forward pass of one image."""
    side = model.architecture.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, side, side, device="meta"))
    return f"{count_parameters(model).trainable:,} | {counter.get_total_flops() / 2e6:,.0f} M"

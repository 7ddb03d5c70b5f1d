"""The net that a configuration means, and the precision it is trained in."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from densenet_dist.model import DenseNet, densenet, variant_architecture
from densenet_dist.model.kernels.choice import unavailable
from densenet_dist.schema import Config, ModelConfig
from densenet_dist.train.context import RunContext

AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(config: ModelConfig, num_classes: int, image_size: int = 32, seed: int | None = None) -> DenseNet:
    """The configured DenseNet on the CPU, its weights drawn from `seed` where one is given.

    Raises:
        ConfigError: naming every setting that cannot work.
    """
    if seed is not None:
        torch.manual_seed(seed)
    return densenet(**asdict(config), num_classes=num_classes, image_size=image_size)


def check_model(config: Config) -> None:
    """Whether the model can be built for the images of the data set, without building it.

    Raises:
        ConfigError: naming every setting that cannot work.
    """
    variant_architecture(**asdict(config.model), num_classes=10, image_size=config.data.side)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision on `device`; a context that does nothing for fp32."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype=None if precision == "fp32" else dtype, enabled=precision != "fp32")


def usable(config: ModelConfig, context: RunContext) -> ModelConfig:
    """The form of the dense block that this device has kernels for; says so where it is another than configured."""
    reason = None if config.block == "reference" else unavailable(context.device.type)
    if reason is None:
        return config
    context.report({"kind": "note", "text": f"dense blocks are computed in the reference form: {reason}"})
    return replace(config, block="reference")

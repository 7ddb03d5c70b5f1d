"""Build the model of a configuration; memory limits, weights and precision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from densenet_dist.errors import CheckpointError, ConfigError
from densenet_dist.model import DenseNet
from densenet_dist.model.variants import densenet, variant_architecture
from densenet_dist.schema import Config, ModelConfig

TensorSpec: TypeAlias = tuple[torch.dtype, tuple[int, ...]]
"""A tensor's dtype and shape."""

AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(config: ModelConfig, num_classes: int, image_size: int = 32, seed: int | None = None) -> DenseNet:
    """Build the configured DenseNet on the CPU, initialised from `seed` if one is given.

    Raises:
        ConfigError: naming every setting that cannot work.
    """
    if seed is not None:
        torch.manual_seed(seed)
    return densenet(**config.network, num_classes=num_classes, image_size=image_size)


def require_memory(config: Config, num_classes: int, device: torch.device, trained: int, evaluated: int) -> None:
    """Check, before anything is built, that the configuration does not need more memory than `device` has.

    The lower bound counts weights, gradients, the optimizer's state, and the feature maps of `trained` images in all
    dense blocks or of `evaluated` images in the largest block.

    Raises:
        ConfigError: it needs more; the message states parameters, images and memory.
    """
    train, side = config.train, config.data.side
    net = variant_architecture(**config.model.network, num_classes=num_classes, image_size=side)
    state = 2 if train.optimizer.name != "sgd" else int(train.optimizer.momentum > 0)
    values = max(trained * sum(net.block_values()), evaluated * max(net.block_values()))
    needed = net.parameters() * 4 * (2 + state if trained else 1) + values * (4 if train.precision == "fp32" else 2)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no cgroup, or no limit ("max")
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    if device.type == "cuda":
        memory = int(torch.cuda.get_device_properties(device).total_memory)
    if needed > memory:
        raise ConfigError(
            f"{net.parameters():,} parameters and {max(trained, evaluated):,} images of {side}x{side} at a time need "
            f"{needed / 2**30:,.1f} GiB of memory or more, {device} has {memory / 2**30:,.1f} GiB\n"
            "  lower model.num_layers or growth_rate, data.image_size, train.global_batch_size or eval_batch_size"
        )


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context for a precision; it is disabled for fp32."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype=None if precision == "fp32" else dtype, enabled=precision != "fp32")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load a state dict.

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape or dtype, or counts are negative.
    """
    own = model.state_dict()
    require_same_tensors(tensor_specs(weights), tensor_specs(own), f"{origin} does not fit this model")
    for name, tensor in weights.items():
        if not tensor.is_floating_point() and (tensor < 0).any():
            raise CheckpointError(f"{origin} is damaged: {name} is negative")
    model.load_state_dict(dict(weights))


def tensor_specs(weights: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Return the dtype and shape of each tensor, for `require_same_tensors`."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}


def require_same_tensors(found: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec], problem: str) -> None:
    """Check that a file contains exactly the tensors of a model.

    Raises:
        CheckpointError: `problem`, and the tensors that are missing, unexpected, or of another shape or dtype.
    """
    lines = [f"missing: {name}" for name in wanted if name not in found]
    lines += [f"not in this model: {ascii(name)[1:-1][:200]}" for name in found if name not in wanted]
    lines += [
        f"{name}: {_describe(found[name])} there, {_describe(kind)} in this model"
        for name, kind in wanted.items()
        if name in found and found[name] != kind
    ]
    if lines:
        shown = lines[:8] + ([f"... and {len(lines) - 8} more"] if len(lines) > 8 else [])
        raise CheckpointError(f"{problem}:\n  " + "\n  ".join(shown))


def _describe(kind: TensorSpec) -> str:
    return f"{str(kind[0]).removeprefix('torch.')} {list(kind[1])}"

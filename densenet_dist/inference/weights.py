"""Tensors of a file, checked against the net that its header names before a byte of them is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from densenet_dist.errors import CheckpointError
from densenet_dist.model import DenseNet

_SHOWN = 8

Kind = tuple[torch.dtype, tuple[int, ...]]
"""A tensor's dtype and shape."""


def kinds(weights: Mapping[str, Tensor]) -> dict[str, Kind]:
    """Dtype and shape of each."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}


def require_same(found: Mapping[str, Kind], wanted: Mapping[str, Kind], origin: str) -> None:
    """Make sure that a file holds these tensors and no others.

    Raises:
        CheckpointError: naming those that are missing, superfluous or of another kind.
    """
    problems = [f"missing: {name}" for name in wanted if name not in found]
    problems += [f"not in this net: {ascii(name)[1:-1][:200]}" for name in found if name not in wanted]
    problems += [
        f"{name}: {_said(found[name])} there, {_said(kind)} in this net"
        for name, kind in wanted.items()
        if name in found and found[name] != kind
    ]
    if problems:
        shown = problems[:_SHOWN] + ([f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
        raise CheckpointError(f"{origin} does not hold the net that its metadata names:\n  " + "\n  ".join(shown))


def filled(model: DenseNet, weights: Mapping[str, Tensor]) -> DenseNet:
    """An `empty_net` with these weights, which have been made sure to fit, ready to classify."""
    weights = {name: weights.get(name, tensor) for name, tensor in model.state_dict().items()}
    counters = {name: torch.zeros((), dtype=torch.int64) for name, each in weights.items() if each.is_meta}
    model.load_state_dict(dict(weights) | counters, assign=True)
    model.requires_grad_(False)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack the keyword
    return model.eval()


def matrices(model: nn.Module) -> list[str]:
    """The names of the weights of all convolutions and linear layers: nearly all of a net's bytes."""
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def without_counters(names: Iterable[str]) -> list[str]:
    """Names without the counters of training steps, which no prediction needs."""
    return [name for name in names if not name.endswith(".num_batches_tracked")]


def _said(kind: Kind) -> str:
    dtype, shape = kind
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"

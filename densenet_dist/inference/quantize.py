"""Weights as 8-bit whole numbers, a scale for each output channel: a quarter of the bytes, float32 to compute with."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

SCALE = ".scale"
"""Follows a weight's name to make that of its scales."""

_MOST = 127.0


def quantized(weights: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The same weights, those named as int8 (out, ...) beside their scales, float32 (out,).

    Symmetric, by the largest weight of each output channel: w is about scale * q, q in [-127, 127].
    """
    made: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name not in names:
            made[name] = weight
            continue
        rows = weight.float().flatten(1)
        scale = (rows.abs().amax(dim=1) / _MOST).clamp_min(torch.finfo(torch.float32).tiny)
        made[name] = (rows / scale[:, None]).round().to(torch.int8).view(weight.shape)
        made[name + SCALE] = scale
    return made


def dequantized(weights: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The reverse of `quantized`: float32 weights that are scale * q."""
    made = {name: tensor for name, tensor in weights.items() if not name.endswith(SCALE)}
    for name in names:
        scale = weights[name + SCALE].view(-1, *[1] * (weights[name].ndim - 1))
        made[name] = weights[name].float() * scale
    return made

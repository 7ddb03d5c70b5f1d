"""The format safetensors: weights, and the header in the file's own metadata. Nothing in it can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from densenet_dist.errors import CheckpointError
from densenet_dist.inference.header import HEADER_KEY, Header, header_of
from densenet_dist.inference.network import Network, empty_net, to_bfloat16
from densenet_dist.inference.quantize import SCALE, dequantized, quantized
from densenet_dist.inference.weights import Kind, filled, kinds, matrices, require_same, without_counters
from densenet_dist.model import DenseNet

_DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8}


def write(model: DenseNet, header: Header, path: Path) -> None:
    """Write a trained net in float32, in the precision that the header says. `model` is changed."""
    names = matrices(model)
    if header.precision == "bf16":
        to_bfloat16(model)
    weights: dict[str, Tensor] = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    weights = {name: weights[name] for name in without_counters(weights)}
    if header.precision == "int8":
        weights = quantized(weights, names)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, path, metadata={"format": "pt", HEADER_KEY: header.to_json()})


def read(path: Path) -> tuple[Header, Network]:
    """Read a file that anybody may have written.

    Raises:
        CheckpointError: it is damaged, or not what `write` makes.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = header_of((file.metadata() or {}).get(HEADER_KEY), str(path))
            model = empty_net(header)
            require_same(_found(file), _wanted(model, header), str(path))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if header.precision == "int8":
        weights = dequantized(weights, matrices(model))
    return header, Network(filled(model, weights), header.mean, header.std).eval()


def _found(file: Any) -> dict[str, Kind]:
    found = {}
    for name in file.keys():  # noqa: SIM118
        tensor = file.get_slice(name)
        dtype = tensor.get_dtype()
        if dtype not in _DTYPES:
            raise ValueError(f"{name!a} is of type {dtype}")
        found[name] = _DTYPES[dtype], tuple(tensor.get_shape())
    return found


def _wanted(model: DenseNet, header: Header) -> dict[str, Kind]:
    weights = model.state_dict()
    wanted = kinds({name: weights[name] for name in without_counters(weights)})
    if header.precision == "int8":
        for name in matrices(model):
            shape = wanted[name][1]
            wanted |= {name: (torch.int8, shape), name + SCALE: (torch.float32, shape[:1])}
    return wanted

"""The format safetensors: weights, and the header in the file's own metadata. Nothing in it can run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from densenet_dist.errors import CheckpointError
from densenet_dist.inference.header import HEADER_KEY, Header, header_of
from densenet_dist.inference.network import Network, empty_net, to_bfloat16
from densenet_dist.model import DenseNet
from densenet_dist.train.checkpoint import Kind, kinds_of, require_same_tensors

_DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16}


def to_bytes(network: Network, header: Header) -> bytes:
    """A file of a trained network in float32, in the header's precision. `network` is changed."""
    model = network.model
    if header.precision == "bf16":
        to_bfloat16(model)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _weights(model).items()}
    return save(weights, metadata={"format": "pt", HEADER_KEY: header.to_json()})


def read(path: Path) -> tuple[Header, Network]:
    """Read a file that anybody may have written.

    Raises:
        CheckpointError: it is damaged, or not what `to_bytes` makes.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = header_of((file.metadata() or {}).get(HEADER_KEY), str(path))
            model = empty_net(header)
            problem = f"{path} does not hold the model that its metadata names"
            require_same_tensors(_found(file), kinds_of(_weights(model)), problem)  # before any is read
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return header, Network(_filled(model, weights), header.mean, header.std).eval()


def _weights(model: DenseNet) -> dict[str, Tensor]:
    """A net's tensors without the counters of training steps, which no prediction needs."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith(".num_batches_tracked")}


def _found(file: Any) -> dict[str, Kind]:
    found = {}
    for name in file.keys():  # noqa: SIM118
        tensor = file.get_slice(name)
        dtype = tensor.get_dtype()
        if dtype not in _DTYPES:
            raise ValueError(f"{name!a} is of type {dtype}")
        found[name] = _DTYPES[dtype], tuple(tensor.get_shape())
    return found


def _filled(model: DenseNet, weights: Mapping[str, Tensor]) -> DenseNet:
    """An `empty_net` with these weights, which have been made sure to fit, ready to classify."""
    counters = {name: torch.zeros((), dtype=torch.int64) for name in model.state_dict() if name not in weights}
    model.load_state_dict(dict(weights) | counters, assign=True)
    model.requires_grad_(False)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack the keyword
    return model.eval()

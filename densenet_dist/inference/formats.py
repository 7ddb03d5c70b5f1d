"""The formats of exported files: safetensors for this package, torch-export for PyTorch alone, ONNX for other engines.

Every format holds a `Network` and its `Header`. Only safetensors files are read back; nothing in them can run.
`torch.export.load` is not safe for untrusted files: it unpickles what an archive declares as a pickle and evaluates its
size expressions as Python.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from densenet_dist.custom import allow
from densenet_dist.errors import CheckpointError, EnvironmentProblem
from densenet_dist.inference.header import HEADER_KEY, Header, header_of
from densenet_dist.model import DenseNet
from densenet_dist.train.custom_parts import custom_model
from densenet_dist.train.snapshot import TensorSpec, require_same_tensors, tensor_specs

Format = Literal["safetensors", "torch-export", "onnx"]
SUFFIXES: Final = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}
"""The suffix of each format's files."""

_DTYPES: Final = {
    "F32": torch.float32,
    # Of custom models:
    **{"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}
INPUT, OUTPUT = "pixels", "logits"
"""Names in ONNX graphs."""
_MAX_BATCH: Final = 1 << 16


class Network(nn.Module):
    """Normalizes and classifies images.

    Input: (N, 3, H, W) float32 pixel values from 0 to 255, RGB. Output: (N, classes) float32 logits.

    Args:
        model: the trained model.
        mean, std: normalization of images in [0, 1].
    """

    model: nn.Module
    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        # Bit for bit the normalization of data.torch_loader.TorchEngine, including its two roundings.
        levels = 255.0 * np.asarray(std, dtype=np.float64)
        for name, values in (("scale", 1.0 / levels), ("shift", -255.0 * np.asarray(mean, dtype=np.float64) / levels)):
            self.register_buffer(name, torch.from_numpy(values.astype(np.float32)).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute logits; see the class."""
        logits: Tensor = self.model(self.normalize(pixels))
        return logits.float()

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalize pixel values."""
        return pixels * self.scale + self.shift


def safetensors_bytes(network: Network, header: Header) -> bytes:
    """Serialize the weights, with the header in the file's own metadata."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _weights(network.model).items()}
    return save(weights, metadata={"format": "pt", HEADER_KEY: header.to_json()})


def read_safetensors(path: Path, *, trust: bool = False) -> tuple[Header, Network]:
    """Read an untrusted file; with `trust`, its custom model may be imported.

    Raises:
        CheckpointError: it is damaged, or not what `safetensors_bytes` writes.
        ConfigError: its custom model may not be imported (see `densenet_dist.custom`), or cannot be built.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = header_of((file.metadata() or {}).get(HEADER_KEY), str(path))
            if trust and header.custom is not None:
                allow([header.custom.name])
            model = _untrained(header)
            problem = f"{path} does not contain the model that its metadata describes"
            require_same_tensors(_specs_in(file), tensor_specs(_weights(model)), problem)  # before any is read
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dictionary
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    counters = {name: torch.zeros((), dtype=torch.int64) for name in model.state_dict() if name not in weights}
    model.load_state_dict(weights | counters, assign=True)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack the keyword
    return header, Network(model, header.mean, header.std)


def _untrained(header: Header) -> nn.Module:
    """Build the model of a header, without memory if it is a DenseNet."""
    if header.custom is not None:
        found = header.custom
        return custom_model(found.name, found.options, len(header.class_names), found.image_size)
    assert header.architecture is not None
    with torch.device("meta"):
        return DenseNet(replace(header.architecture, block="reference", init="torchvision"))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's tensors without the counters of training steps, which no prediction needs."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith(".num_batches_tracked")}


def _specs_in(file: Any) -> dict[str, TensorSpec]:
    kinds = {}
    for name in file.keys():  # noqa: SIM118
        tensor = file.get_slice(name)
        dtype = tensor.get_dtype()
        if dtype not in _DTYPES:
            raise ValueError(f"{name!a} is of type {dtype}")
        kinds[name] = _DTYPES[dtype], tuple(tensor.get_shape())
    return kinds


def torch_export_bytes(network: Network, header: Header) -> bytes:
    """Serialize a ``.pt2`` archive. The network's weights become contiguous."""
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # PyTorch's, about its own internals
        torch.export.save(_traced(network, header), file, extra_files={f"{HEADER_KEY}.json": header.to_json()})
    return file.getvalue()


def onnx_bytes(network: Network, header: Header) -> bytes:
    """Serialize an ONNX graph. The network's weights become contiguous.

    Raises:
        EnvironmentProblem: a package is missing.
    """
    onnx = _imported("onnx")
    _imported("onnxscript")
    _imported("onnxruntime")  # the file is compared with the run
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            _traced(network, header), (), dynamo=True, opset_version=20, input_names=[INPUT], output_names=[OUTPUT],
            external_data=False, verbose=False, dynamic_shapes=({0: "batch"},),
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    # The exporter records where its code lies: paths of this machine, and many bytes.
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    model.producer_name, model.producer_version = "densenet-dist", header.version
    onnx.helper.set_model_props(model, {HEADER_KEY: header.to_json()})
    return bytes(model.SerializeToString())


def _traced(network: Network, header: Header) -> torch.export.ExportedProgram:
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch's stubs lack the keyword
    # Two images: with one, the tracer would take the batch size for a constant.
    example = torch.zeros(2, 3, header.image_size, header.image_size)
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    with torch.no_grad():
        return torch.export.export(network, (example,), dynamic_shapes=({0: batch},))


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise EnvironmentProblem(
            f"ONNX files need the package {name}, which is not installed ({error})\n"
            "  install it: pip install 'densenet-dist[onnx]'"
        ) from error


WRITERS: Final[dict[Format, Callable[[Network, Header], bytes]]] = {
    "safetensors": safetensors_bytes,
    "torch-export": torch_export_bytes,
    "onnx": onnx_bytes,
}

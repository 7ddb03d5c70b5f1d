"""The format ONNX, which onnxruntime and most other engines run: a graph of a fixed set of operators."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from densenet_dist.errors import CheckpointError, EnvironmentProblem
from densenet_dist.inference.header import HEADER_KEY, Header, header_of
from densenet_dist.inference.network import Network
from densenet_dist.inference.torch_export_format import quiet, traced

INPUT, OUTPUT = "pixels", "logits"
OPSET: Final = 20
_MOST_BYTES: Final = (1 << 31) - 1  # of any protobuf


def to_bytes(network: Network, header: Header) -> bytes:
    """A file of a trained network in float32. Its weights become contiguous.

    Raises:
        EnvironmentProblem: a package is missing.
    """
    onnx = imported("onnx")
    imported("onnxscript")
    imported("onnxruntime")  # the file is compared with the run
    with quiet(), _no_log():
        program = torch.onnx.export(
            traced(network, header), (), dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT],
            external_data=False, verbose=False, dynamic_shapes=({0: "batch"},),
        )  # fmt: skip
    assert program is not None
    graph = program.model_proto
    _strip(graph)
    graph.producer_name, graph.producer_version = "densenet-dist", header.version
    onnx.helper.set_model_props(graph, {HEADER_KEY: header.to_json()})
    return bytes(graph.SerializeToString())


def read(path: Path) -> tuple[Header, Callable[[Tensor], Tensor]]:
    """Read a file that anybody may have written.

    Returns:
        Its header, and its program, run on the CPU: (n, 3, H, W) float32 grey levels to (n, classes) float32.

    Raises:
        CheckpointError: it is damaged, or not what `to_bytes` makes; the program raises it, too.
        EnvironmentProblem: onnxruntime is missing.
    """
    runtime = imported("onnxruntime")
    if path.stat().st_size > _MOST_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, more than an ONNX file can have")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        # From memory, so that it cannot name other files of this machine as its weights.
        session = runtime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CheckpointError(f"{path} is damaged, or no ONNX file: {_first_line(error)}") from error
    header = header_of(session.get_modelmeta().custom_metadata_map.get(HEADER_KEY), str(path))
    takes = [(each.name, each.type, each.shape[1:]) for each in session.get_inputs()]
    size = header.image_size
    if takes != [(INPUT, "tensor(float)", [3, size, size])] or OUTPUT not in {o.name for o in session.get_outputs()}:
        raise CheckpointError(f"{path} does not take the images that its metadata names")

    def run(pixels: Tensor) -> Tensor:
        try:
            (logits,) = session.run([OUTPUT], {INPUT: pixels.numpy()})
        except Exception as error:  # onnxruntime has a dozen kinds, all of them RuntimeErrors or Exceptions of its own
            raise CheckpointError(f"the exported program fails: {_first_line(error)}") from error
        if not isinstance(logits, np.ndarray) or logits.shape != (len(pixels), len(header.class_names)):
            raise CheckpointError("the exported program does not give a logit for each class of its metadata")
        return torch.from_numpy(logits.astype(np.float32, copy=False))

    return header, run


def imported(name: str) -> ModuleType:
    """An optional package.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise EnvironmentProblem(
            f"ONNX files need the package {name}, which is not installed ({error})\n"
            "  install it: pip install 'densenet-dist[onnx]'"
        ) from error


def _strip(graph: Any) -> None:
    """Take out what the exporter notes of the code it came from: paths of this machine, and many bytes."""
    inner = graph.graph
    del graph.metadata_props[:]
    del inner.metadata_props[:]
    for item in (*inner.node, *inner.input, *inner.output, *inner.value_info, *inner.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    inner.doc_string = ""


@contextmanager
def _no_log() -> Iterator[None]:
    """Without what the exporter logs of its own workings."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]

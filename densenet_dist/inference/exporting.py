"""Export a run's network to one file, and compare the file with the run before it is kept."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from densenet_dist.data.datasets import Dataset
from densenet_dist.data.engine import engine_class
from densenet_dist.data.loader import EvalLoader
from densenet_dist.errors import CheckpointError, ConfigError, StorageError, storage_errors
from densenet_dist.inference.classifier import SUFFIXES, open_exported
from densenet_dist.inference.formats import WRITERS
from densenet_dist.inference.header import Header, Precision
from densenet_dist.inference.network import Trained, open_trained, to_bfloat16
from densenet_dist.run_folder import open_run
from densenet_dist.train.inputs import load_run_data

Format = Literal["safetensors", "torch-export", "onnx"]

LARGEST_DIFFERENCE: Final = 1e-4
"""Of logits between a file in float32 and the run's own net in float32."""

_COMPARED = 256  # test images for fp32 files; bf16 files are compared on all of them
_BATCH = 100


@dataclass(frozen=True)
class Check:
    """How a file compares with the run's net in float32 on test images.

    Attributes:
        images: compared.
        largest: difference of a logit.
        agreeing: share of images of the same top-1 class.
        top1: of the run's net, by the labels.
        exported_top1: of the file.
    """

    images: int
    largest: float
    agreeing: float
    top1: float
    exported_top1: float


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        bytes: its size.
        check: None where none was wanted.
    """

    path: Path
    format: Format
    header: Header
    bytes: int
    check: Check | None


def export(
    run: str | Path,
    *,
    format: Format = "safetensors",
    out: str | Path | None = None,
    checkpoint: Literal["best", "last"] = "best",
    precision: Precision = "fp32",
    check: bool = True,
    overrides: tuple[str, ...] = (),
) -> Exported:
    """Write a run's net with everything that it takes to use it into one file.

    The weights are those that the run is evaluated with: averaged ones, where it averages.

    Args:
        run: its folder (path or URI), or its name under ``runs/``.
        format: safetensors, for this package; torch-export (.pt2), for PyTorch alone; onnx, for onnxruntime.
        out: the file; by default the run's name in the working directory.
        checkpoint: best (by ``checkpoint.monitor``) or last.
        precision: fp32, or bf16 for safetensors and torch-export.
        check: whether to load the file again and compare it on test images; needs the data set.
        overrides: changes to the run's configuration, such as ``data.root=...``.

    Raises:
        ConfigError: the format does not go with the precision.
        CheckpointError: a float32 file differs from the run's net by more than `LARGEST_DIFFERENCE`; it is not kept.
        StorageError, DataError, EnvironmentProblem: as their names say.
    """
    if precision == "bf16" and format == "onnx":
        raise ConfigError("onnxruntime has no bf16 convolutions for CPUs: use fp32 with onnx, or another format")
    trained = open_trained(run, checkpoint=checkpoint, device="cpu", block="reference", overrides=overrides)
    path = _path(out, trained.config.name, format, precision)
    header = dataclasses.replace(trained.header, precision=precision)
    dataset = load_run_data(trained.config, open_run(run)) if check else None
    beside = path.with_name(f".{os.getpid()}-{path.name}")  # with its ending, which PyTorch asks for
    if precision == "bf16":
        to_bfloat16(trained.network.model)
    contents = WRITERS[format](trained.network, header)
    try:
        with storage_errors(path):
            beside.write_bytes(contents)
        found = None
        if dataset is not None:
            # Opened once more, in its own form: writing changes it.
            original = open_trained(run, checkpoint=checkpoint, device="cpu", overrides=overrides)
            found = compare(beside, header, format, original, dataset)
            # A NaN is no small difference either.
            if precision == "fp32" and not found.largest <= LARGEST_DIFFERENCE:
                raise CheckpointError(
                    f"{path} is not kept: its logits differ from those of the run by up to {found.largest:.2g}, more "
                    f"than {LARGEST_DIFFERENCE:g}\n  write it all the same with --no-check"
                )
        with storage_errors(path):
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return Exported(path, format, header, path.stat().st_size, found)


def compare(file: Path, header: Header, format: Format, trained: Trained, dataset: Dataset) -> Check:
    """Load a file that this process wrote, and compare it with the run's own net in float32 on test images."""
    run: Callable[[Tensor], Tensor]
    if format == "torch-export":
        with warnings.catch_warnings(action="ignore"):  # PyTorch's, about its own internals
            run = torch.export.load(file).module()
    else:
        run = open_exported(file).logits
    test = dataset.test
    count = len(test.labels) if header.precision == "bf16" else min(len(test.labels), _COMPARED)
    indices = np.arange(count) * len(test.labels) // count
    # Images as evaluation shows them, but not normalised: grey levels, 0 to 255.
    engine = engine_class("torch")(
        test, mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3, threads=torch.get_num_threads(),
        on_bad_image=trained.config.data.on_bad_image,
    )  # fmt: skip
    loader = EvalLoader(engine, indices, batch_size=_BATCH, geometry=trained.config.data.augment)
    with torch.no_grad():
        batches = [(trained.network(batch.images), run(batch.images), batch.targets) for batch in loader]
    wanted, found, labels = map(torch.cat, zip(*batches, strict=True))
    first, exported_first = wanted.argmax(1), found.argmax(1)

    def share(matches: Tensor) -> float:
        return float(matches.double().mean())

    largest = float((wanted - found).abs().max())  # NaN where one is
    return Check(
        count, largest, share(first == exported_first), share(first == labels), share(exported_first == labels)
    )


def _path(out: str | Path | None, name: str, format: Format, precision: Precision) -> Path:
    (ending,) = [suffix for suffix, known in SUFFIXES.items() if known == format]
    path = Path(os.path.expanduser(out or name + ("" if precision == "fp32" else f"-{precision}") + ending))
    if path.suffix != ending:
        raise ConfigError(f"--out {path}: a file in the format {format} must end in {ending}")
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        problem = "it is a folder" if path.is_dir() else "read-only folder" if folder.is_dir() else "no such folder"
        raise StorageError(f"{path} cannot be written: {problem}")
    return path

"""Export a trained model to one file, and compare the file with the run."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from densenet_dist.custom import errors
from densenet_dist.data.datasets import Dataset
from densenet_dist.data.engine import engine_class
from densenet_dist.data.loader import EvalLoader
from densenet_dist.errors import CheckpointError, ConfigError, StorageError, storage_errors
from densenet_dist.inference.classifier import Checkpoint, open_exported, open_trained
from densenet_dist.inference.formats import SUFFIXES, WRITERS, Format, Network, to_bfloat16
from densenet_dist.inference.header import Header, Precision
from densenet_dist.run_folder import open_run
from densenet_dist.schema import DataConfig
from densenet_dist.train.inputs import load_run_data

LARGEST_DIFFERENCE: Final = 1e-4
"""Tolerance for the logits of a float32 file, compared with those of the run."""

_COMPARED = 256  # test images for fp32 files; bf16 files are compared on all
_BATCH = 100


@dataclass(frozen=True)
class Check:
    """A comparison of a file with the run's model in float32.

    Attributes:
        images: number of test images.
        largest: largest difference of a logit.
        agreeing: share of images with the same top-1 class.
        top1: test accuracy of the run's model.
        exported_top1: test accuracy of the file.
    """

    images: int
    largest: float
    agreeing: float
    top1: float
    exported_top1: float


@dataclass(frozen=True)
class Exported:
    """An exported file.

    Attributes:
        bytes: its size.
        check: the comparison with the run; None if it was skipped.
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
    checkpoint: Checkpoint = "best",
    precision: Precision = "fp32",
    check: bool = True,
    overrides: tuple[str, ...] = (),
    trust: bool = False,
) -> Exported:
    """Write a trained model to one file, with everything needed to use it.

    The weights are those of the run's evaluation: averaged ones if ``train.ema_decay`` is set.

    Args:
        run: its folder (path or URI), or its name under ``runs/``.
        format: safetensors for this package, torch-export (.pt2) for PyTorch, onnx for ONNX runtimes.
        out: the file; by default the name of the run, in the working directory.
        checkpoint: best (by ``checkpoint.monitor``) or last.
        precision: fp32, or bf16 for safetensors and torch-export.
        check: load the file again and compare it on test images; needs the data set.
        overrides: changes to the run's configuration, such as ``data.root=...``.
        trust: import the custom model and data set that the run names, which runs their code.

    Raises:
        ConfigError: the format does not support the precision.
        CheckpointError: a float32 file differs from the run by more than `LARGEST_DIFFERENCE`; it is deleted.
        StorageError, DataError, EnvironmentProblem: as their names say.
    """
    if precision == "bf16" and format == "onnx":
        raise ConfigError("onnxruntime has no bf16 convolutions for CPUs: use fp32 with onnx, or another format")
    config, header, network = open_trained(
        run, checkpoint=checkpoint, block="reference", overrides=overrides, trust=trust
    )
    ending = SUFFIXES[format] if precision == "fp32" else f"-{precision}{SUFFIXES[format]}"
    path = Path(os.path.expanduser(out or config.name + ending))
    _require_writable(path, format)
    header = dataclasses.replace(header, precision=precision)
    dataset = load_run_data(config, open_run(run)) if check else None
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # PyTorch requires the suffix
    if precision == "bf16":
        to_bfloat16(network.model)
    with errors("model.variant", config.model.variant) if header.custom else nullcontext():
        if header.custom:  # which may not work in bf16, for example
            network(torch.zeros(2, 3, header.image_size, header.image_size))
        contents = WRITERS[format](network, header)
    try:
        with storage_errors(path):
            temporary.write_bytes(contents)
        found = None
        if dataset is not None:
            # Loaded again with the run's own blocks: writing a file changes the model.
            _, _, original = open_trained(run, checkpoint=checkpoint, overrides=overrides)
            found = _compare(temporary, header, format, original, dataset, config.data)
            # `not <=` also catches NaN.
            if precision == "fp32" and not found.largest <= LARGEST_DIFFERENCE:
                raise CheckpointError(
                    f"{path} was deleted: its logits differ from those of the run by up to {found.largest:.2g}, more "
                    f"than {LARGEST_DIFFERENCE:g}\n  keep it with --no-check"
                )
        with storage_errors(path):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(path, format, header, path.stat().st_size, found)


def _require_writable(path: Path, format: Format) -> None:
    if path.suffix != SUFFIXES[format]:
        raise ConfigError(f"--out {path}: a file in the format {format} must end in {SUFFIXES[format]}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise StorageError(f"{path} cannot be written: not a regular file")
    if not os.access(path.absolute().parent, os.W_OK):
        raise StorageError(f"{path} cannot be written: no such folder, or it is read-only")


def _compare(
    file: Path, header: Header, format: Format, network: Network, dataset: Dataset, settings: DataConfig
) -> Check:
    """Load a file that this process wrote, and compare it with the run's model in float32 on test images."""
    run: Callable[[Tensor], Tensor]
    if format == "torch-export":
        with warnings.catch_warnings(action="ignore"):  # PyTorch's, about its own internals
            run = torch.export.load(file).module()
    else:
        run = open_exported(file, "cpu").logits
    test = dataset.test
    count = len(test.labels) if header.precision == "bf16" else min(len(test.labels), _COMPARED)
    indices = np.arange(count) * len(test.labels) // count
    # Images as evaluation shows them, but not normalized: pixel values, 0 to 255.
    engine = engine_class("torch")(test, mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3, threads=torch.get_num_threads())
    loader = EvalLoader(engine, indices, batch_size=_BATCH, geometry=settings.augment)
    with torch.no_grad():
        batches = [(network(batch.images), run(batch.images), batch.targets) for batch in loader]
    expected, found, labels = map(torch.cat, zip(*batches, strict=True))
    top1, exported_top1 = expected.argmax(1), found.argmax(1)

    def share(matches: Tensor) -> float:
        return float(matches.double().mean())

    largest = float((expected - found).abs().max())  # NaN if any is NaN
    return Check(count, largest, share(top1 == exported_top1), share(top1 == labels), share(exported_top1 == labels))

"""Export a trained model to one file, and compare the file with the run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from densenet_dist.custom import user_code_errors
from densenet_dist.data.datasets import Dataset
from densenet_dist.data.engine import engine_class
from densenet_dist.data.loader import EvalLoader
from densenet_dist.environment import unique_suffix
from densenet_dist.errors import CheckpointError, ConfigError, StorageError, storage_errors
from densenet_dist.inference.classifier import Checkpoint, open_trained
from densenet_dist.inference.formats import INPUT, OUTPUT, SUFFIXES, WRITERS, Format, Network, read_safetensors
from densenet_dist.inference.header import Header
from densenet_dist.run_folder import open_run
from densenet_dist.schema import DataConfig
from densenet_dist.train.inputs import load_run_data

LARGEST_DIFFERENCE: Final = 1e-4
"""Tolerance for the logits of a file, compared with those of the run."""

_COMPARED = 256
_BATCH = 100


@dataclass(frozen=True)
class Check:
    """A comparison of a file with the run's model.

    Attributes:
        images: number of test images.
        largest: largest difference of a logit.
        agreeing: share of images with the same top-1 class.
    """

    images: int
    largest: float
    agreeing: float


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
        check: compare the file with the run on test images; needs the data set.
        overrides: changes to the run's configuration, such as ``data.root=...``.
        trust: import the custom model and data set that the run names, which runs their code.

    Raises:
        ConfigError: the name of the file does not end in the suffix of the format.
        CheckpointError: the file differs from the run by more than `LARGEST_DIFFERENCE`; it is deleted.
        StorageError, DataError, EnvironmentProblem: as their names say.
    """
    config, header, network = open_trained(
        run, checkpoint=checkpoint, block="reference", overrides=overrides, trust=trust
    )
    path = Path(os.path.expanduser(out or config.name + SUFFIXES[format]))
    if path.suffix != SUFFIXES[format]:
        raise ConfigError(f"--out {path}: a file in the format {format} must end in {SUFFIXES[format]}")
    if path.exists() and not path.is_file():  # a device would be replaced by the file
        raise StorageError(f"{path} cannot be written: not a regular file")
    dataset = load_run_data(config, open_run(run)) if check else None
    with user_code_errors("model.variant", config.model.variant) if header.custom else nullcontext():
        contents = WRITERS[format](network, header)
    temporary = path.with_name(f".{unique_suffix()}.{path.name}")  # PyTorch requires the suffix
    try:
        with storage_errors(path):
            temporary.write_bytes(contents)
        found = None
        if dataset is not None:
            # Loaded again with the run's own blocks: writing a file changes the model.
            _, _, original = open_trained(run, checkpoint=checkpoint, overrides=overrides)
            found = _compare(_open(temporary, format), original, dataset, config.data)
            if not found.largest <= LARGEST_DIFFERENCE:  # unlike >, also for NaN
                raise CheckpointError(
                    f"{path} was deleted: its logits differ from those of the run by up to {found.largest:.2g}, more "
                    f"than {LARGEST_DIFFERENCE:g}\n  keep it with --no-check"
                )
        with storage_errors(path):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(path, format, header, path.stat().st_size, found)


def _open(file: Path, format: Format) -> Callable[[Tensor], Tensor]:
    """Open a file that this process wrote: return a function from pixels to logits."""
    if format == "safetensors":
        return read_safetensors(file)[1]
    if format == "torch-export":
        with warnings.catch_warnings(action="ignore"):  # PyTorch's, about its own internals
            program: Callable[[Tensor], Tensor] = torch.export.load(file).module()
        return program
    session = import_module("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run([OUTPUT], {INPUT: pixels.numpy()})[0])


def _compare(run: Callable[[Tensor], Tensor], network: Network, dataset: Dataset, settings: DataConfig) -> Check:
    """Compare an exported program with the run's network on test images."""
    test = dataset.test
    count = min(len(test.labels), _COMPARED)
    indices = np.arange(count) * len(test.labels) // count
    # Images as evaluation shows them, but not normalized: pixel values, 0 to 255.
    engine = engine_class("torch")(test, mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3, threads=torch.get_num_threads())
    loader = EvalLoader(engine, indices, batch_size=_BATCH, geometry=settings.augment)
    with torch.no_grad():
        batches = [(network(batch.images), run(batch.images)) for batch in loader]
    expected, found = map(torch.cat, zip(*batches, strict=True))
    largest = float((expected - found).abs().max())  # NaN if any is NaN
    return Check(count, largest, float((expected.argmax(1) == found.argmax(1)).double().mean()))

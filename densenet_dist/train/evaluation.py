"""Judge a finished run again: its best or last checkpoint on any split."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from densenet_dist.config import load_config
from densenet_dist.data.datasets import Dataset, Split
from densenet_dist.data.loader import Batch, EvalLoader
from densenet_dist.data.requests import Engine
from densenet_dist.errors import CheckpointError, StorageError
from densenet_dist.run_folder import CONFIG_FILE, RunFolder, split_location
from densenet_dist.schema import Config
from densenet_dist.train.checkpoint import CheckpointStore, load_weights
from densenet_dist.train.context import LocalContext, choose_device
from densenet_dist.train.engine import evaluate_model
from densenet_dist.train.inputs import Indices, engine_of, eval_loader, load_dataset_of, train_and_val
from densenet_dist.train.judging import pictures_of
from densenet_dist.train.network import build_model


def open_run(run: str | Path) -> RunFolder:
    """The folder of an existing run.

    Args:
        run: its path or URI, or its name under ``runs/``.

    Raises:
        StorageError: where there is no run.
    """
    text = str(run)
    if "://" in text:
        folder = RunFolder(*split_location(text))
    else:
        path = Path(text).expanduser()
        if not (path / CONFIG_FILE).exists() and (Path("runs") / path / CONFIG_FILE).exists():
            path = Path("runs") / path
        path = path.absolute()
        folder = RunFolder(str(path.parent), path.name)
    if not folder.exists():
        raise StorageError(f"there is no run at {folder.uri}: it has no {CONFIG_FILE}")
    return folder


def evaluate(
    run: str | Path,
    *,
    split: Literal["test", "val", "train"] = "test",
    checkpoint: Literal["best", "last"] = "best",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    overrides: tuple[str, ...] = (),
) -> dict[str, float]:
    """Loss, top-1 and top-5 of a run's checkpoint, every image seen once, unaugmented.

    Args:
        run: its folder (path or URI), or its name under ``runs/``.
        split: which images; val and train are the parts that the run itself used.
        checkpoint: best (by ``checkpoint.monitor``) or last.
        device: auto takes a GPU if there is one.
        overrides: changes to the run's configuration, such as ``data.root=...``.

    Returns:
        ``loss``, ``top1``, ``top5`` (shares in [0, 1]) and ``images``.

    Raises:
        StorageError, CheckpointError, DataError, EnvironmentProblem: as their names say.
    """
    evaluation = prepare_evaluation(run, split=split, checkpoint=checkpoint, device=device, overrides=overrides)
    return evaluate_model(
        evaluation.model, evaluation.loader(), evaluation.context.device, evaluation.config.train.precision
    )


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A checkpoint, and the images it is to be judged by.

    Attributes:
        model: with the checkpoint's weights, on the device.
        split: of the data set.
        indices: the places in `split` of the images, in the order in which they are shown.
    """

    config: Config
    context: LocalContext
    dataset: Dataset
    model: nn.Module
    split: Split
    indices: Indices
    engine: Engine

    def loader(self, indices: Indices | None = None) -> EvalLoader:
        """Batches of all images, or of those at some places in the split, unaugmented."""
        places = self.indices if indices is None else indices
        return eval_loader(self.config, self.context, self.split, self.engine, places)

    def figures(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Loss, top-1, top-5 and number of images."""
        return evaluate_model(self.model, batches, self.context.device, self.config.train.precision)


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a checkpoint says of each image that can be read.

    Attributes:
        logits: (n, classes) float32 on the CPU.
        labels: (n,) int64, the true classes.
        indices: (n,) int64, the images' places in the split.
        figures: ``loss``, ``top1``, ``top5``, ``images``, as `evaluate` gives them.
    """

    logits: Tensor
    labels: Tensor
    indices: Indices
    figures: dict[str, float]


def prepare_evaluation(
    run: str | Path | RunFolder,
    *,
    split: Literal["test", "val", "train"] = "test",
    checkpoint: Literal["best", "last"] = "best",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    overrides: tuple[str, ...] = (),
) -> Evaluation:
    """Load a run's checkpoint and images; arguments and errors are those of `evaluate`."""
    folder = run if isinstance(run, RunFolder) else open_run(run)
    config: Config = load_config(folder.fetch(CONFIG_FILE), *overrides)
    store = CheckpointStore(folder)
    snapshot = store.load_best() if checkpoint == "best" else store.load_latest()
    if snapshot is None:
        raise CheckpointError(f"the run {folder.uri} has no checkpoint yet")
    context = LocalContext(folder, choose_device(device))
    dataset = load_dataset_of(config)
    model = build_model(config.model, dataset.num_classes, dataset.image_size)
    load_weights(model, snapshot.average or snapshot.model, f"the checkpoint of {folder.uri}")
    train, val = train_and_val(config, dataset)
    parts = {
        "test": (dataset.test, np.arange(len(dataset.test.labels))),
        "val": (dataset.train, val),
        "train": (dataset.train, train),
    }
    images, indices = parts[split]
    # One pass is not worth a measurement: torch needs none of DALI's imports.
    engine = engine_of(config, context.device, dataset, images, "dali" if config.data.loader == "dali" else "torch")
    return Evaluation(config, context, dataset, model.to(context.device), images, indices, engine)


def predict(evaluation: Evaluation, limit_s: float | None = None) -> Predictions | None:
    """Judge as `evaluate` does, in one pass too, and keep what is said of every image.

    Args:
        evaluation: model and images.
        limit_s: seconds that the pass may take.

    Returns:
        None where the batches so far tell that the pass would take longer than that.
    """
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    places: list[Indices] = []
    loader, started = evaluation.loader(), time.perf_counter()

    def noted() -> Iterator[Batch]:
        for batch in loader:
            spent = time.perf_counter() - started
            if labels and limit_s is not None and spent / len(labels) * len(loader) > limit_s:
                raise _TooSlow
            labels.append(batch.labels.cpu())
            places.append(loader.places)
            yield batch

    hook = evaluation.model.register_forward_hook(lambda _, __, output: logits.append(output.float().cpu()))
    try:
        figures = evaluation.figures(noted())
    except _TooSlow:
        return None
    finally:
        hook.remove()
    return Predictions(torch.cat(logits), torch.cat(labels), np.concatenate(places), figures)


class _TooSlow(Exception):
    """A pass would take longer than it may."""


def pictures_at(evaluation: Evaluation, indices: Indices) -> dict[int, Tensor]:
    """Images as the model sees them, but not normalised.

    Args:
        evaluation: whose images.
        indices: (n,) int64, places in the split.

    Returns:
        (H, W, 3) uint8 on the CPU, by place; those that can no longer be read are left out.
    """
    return pictures_of(evaluation.config, evaluation.dataset, evaluation.loader(indices))

"""Evaluate a model: while training, or a run's best or last checkpoint on any split."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenet_dist.config import load_run_config
from densenet_dist.data.datasets import Dataset
from densenet_dist.data.engine import Engine
from densenet_dist.data.loader import Batch, EvalLoader
from densenet_dist.errors import (
    CheckpointError,
    ConfigError,
    DenseNetDistError,
    OutOfMemory,
    StorageError,
)
from densenet_dist.run_folder import CONFIG_FILE, SUMMARY_FILE, TEST_RESULTS_FILE, RunFolder, open_run
from densenet_dist.schema import Config, ModelConfig
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.context import RunContext, StopRequest, choose_device
from densenet_dist.train.inputs import (
    Indices,
    digest_of_files,
    engine_of,
    eval_loader,
    load_run_data,
    report_lines,
    train_and_val,
)
from densenet_dist.train.network import autocast, build_model, free_memory, suppress_out_of_memory
from densenet_dist.train.preflight import check_device
from densenet_dist.train.ranks import gather_objects, sync_from_rank0
from densenet_dist.train.results import (
    ClassCounts,
    Metrics,
    ResultsAccumulator,
    TestResults,
    add_images,
    write_test_results,
)
from densenet_dist.train.snapshot import Snapshot, load_weights, require_same


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    batches: Iterable[Batch],
    context: RunContext,
    precision: str,
    on_batch: Callable[[Tensor, Batch], None] | None = None,
    on_stop: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Compute the metrics and the number of images over the batches of all ranks; every rank calls it with its own.

    `on_batch` is called with each batch's logits, (n, classes), and the batch.

    A rank that is requested to stop calls `on_stop` and skips the rest of its batches. It does not leave: the others
    would wait for it, and ranks may have different numbers of batches, so that they cannot exchange requests between
    them. In a run, `sync_requests` must follow, and tells whether the evaluation is complete.

    Raises:
        DataError: an image file cannot be read. If a rank has an error of this package, every rank raises it.
        OutOfMemory: not even one image fits into memory.
    """
    model.eval()
    sync_from_rank0(list(model.buffers()))
    num_classes = cast(int, model.num_classes)
    metrics, classes = Metrics(context.device, num_classes), ClassCounts(num_classes, context.device)
    problem: DenseNetDistError | None = None
    try:
        for batch in batches:
            logits = _logits(model, batch.images, context, precision)
            loss = F.cross_entropy(logits.float(), batch.targets, reduction="sum")
            classes.update(metrics.update(loss, logits, batch.targets), batch.targets)
            if on_batch is not None:
                on_batch(logits, batch)
            context.status.advance()
            if context.status.requested >= StopRequest.STOP:
                on_stop()
                break
    except DenseNetDistError as error:  # the others would wait for this rank
        problem = error
    if problem := next(filter(None, gather_objects(problem)), None):
        raise problem
    return metrics.compute() | classes.compute()


def _logits(model: nn.Module, images: Tensor, context: RunContext, precision: str) -> Tensor:
    """Return the logits of a batch, computed in as many micro-batches as memory requires.

    Raises:
        OutOfMemory: not even one image fits.
    """
    status = context.status
    while True:
        count = min(status.eval_micro_batches, len(images))
        with suppress_out_of_memory(), autocast(context.device, precision):
            return torch.cat([model(each) for each in images.tensor_split(count)])
        if count == len(images):
            raise OutOfMemory(f"rank {context.rank} is out of memory in the evaluation of one image")
        status.eval_micro_batches = 2 * count
        context.warn(f"out of memory in an evaluation: each batch is computed in {2 * count} micro-batches")
        free_memory()


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model, on the device of `context`, and the images to evaluate it on.

    Attributes:
        engine: produces the images of a split.
        indices: (n,) int64, indices into that split, in the order of evaluation; None for all images.
    """

    config: Config
    context: RunContext
    dataset: Dataset
    model: nn.Module
    engine: Engine
    indices: Indices | None = None

    def loader(self) -> EvalLoader:
        """Return a loader of this rank's share of the images, without augmentation."""
        return eval_loader(self.config, self.context, self.engine, self.indices)


def evaluate_test_set(found: Evaluation) -> TestResults:
    """Evaluate a model on the test set, each rank on its share of the images. Every rank calls it.

    The results are the same on every rank, except that only rank 0 has the images of the mistakes.
    """
    context, loader = found.context, found.loader()
    accumulator = ResultsAccumulator()

    def add(logits: Tensor, batch: Batch) -> None:
        accumulator.update(logits, batch.targets, loader.batch_indices)

    metrics = evaluate_model(found.model, loader, context, found.config.train.precision, add)
    results = accumulator.compute(metrics, found.dataset.class_names, context.device)
    if context.rank == 0:
        try:
            results = add_images(results, found.config, found.engine, found.model)
        except Exception as error:  # missing images must not lose the results
            context.note(f"the images of the worst mistakes could not be read: {error}")
    return results


def evaluate(
    run: str | Path,
    *,
    split: Literal["test", "val", "train"] = "test",
    checkpoint: Literal["best", "last"] = "best",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    overrides: tuple[str, ...] = (),
    notify: Callable[[str], object] = warnings.warn,
    trust: bool = False,
) -> dict[str, float]:
    """Evaluate a run's checkpoint on every image of a split once, without augmentation.

    Results of the best checkpoint on the test set are stored in the run's folder for its report, unless a setting other
    than data.root is changed, or the run is finished and has results.

    Args:
        run: its folder (path or URI), or its name under ``runs/``.
        split: which images; val and train are the ones that the run used.
        checkpoint: best (by ``checkpoint.monitor``) or last.
        device: auto selects a GPU if there is one.
        overrides: changes to the run's configuration, such as ``data.root=...``.
        notify: called with a message if images are skipped or differ from those of the run, or if results cannot be
            stored.
        trust: import the custom model and data set that the run names, which runs their code.

    Returns:
        ``loss``, ``top1``, ``top5`` (from 6 classes on), ``balanced_accuracy``, ``worst_class_accuracy``, ``macro_f1``
        (from 0 to 1) and ``images``.

    Raises:
        StorageError, CheckpointError, ConfigError, DataError, EnvironmentProblem: as their names say.
    """
    found = prepare_evaluation(run, split, checkpoint, device, overrides, notify, trust)
    folder = found.context.run
    changed = [change for change in overrides if not change.startswith("data.root=")]
    finished = folder.exists(SUMMARY_FILE)
    stored = finished and folder.exists(TEST_RESULTS_FILE)
    if (split, checkpoint) != ("test", "best") or changed or stored:
        return evaluate_model(found.model, found.loader(), found.context, found.config.train.precision)
    results = evaluate_test_set(found)
    try:
        if folder.exists(SUMMARY_FILE) == finished:  # else the run has ended meanwhile, and has later results
            write_test_results(folder, results)
    except StorageError as error:
        notify(f"the results are not stored: {error}")
    return results.metrics | {"images": results.images}


def load_checkpoint(run: RunFolder, checkpoint: Literal["best", "last"], config: Config) -> Snapshot:
    """Load the best or the last checkpoint of a run."""
    if checkpoint not in ("best", "last"):
        raise ConfigError(f"checkpoint={checkpoint!r}: choose best or last")
    store = CheckpointStore(run, monitor=config.checkpoint.monitor)
    entry = store.best_or_latest() if checkpoint == "best" else store.latest()
    if entry is None:
        raise CheckpointError(f"the run {run.uri} has no checkpoint yet")
    return store.load(entry)


def trained_model(
    run: RunFolder,
    config: ModelConfig,
    snapshot: Snapshot,
    num_classes: int,
    image_size: int,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a run's model with the averaged weights of a checkpoint, or the plain ones if there is no average."""
    model = build_model(config, num_classes, image_size, options=options)
    load_weights(model, snapshot.average or snapshot.model, f"the checkpoint of {run.uri}")
    return model


def prepare_evaluation(
    run: str | Path | RunFolder,
    split: str = "test",
    checkpoint: Literal["best", "last"] = "best",
    device: str = "auto",
    overrides: Sequence[str] = (),
    notify: Callable[[str], object] = warnings.warn,
    trust: bool = False,
) -> Evaluation:
    """Load a run's checkpoint and images; arguments and errors are those of `evaluate`."""
    if split not in ("test", "val", "train"):
        raise ConfigError(f"split={split!r}: choose test, val or train")
    folder = run if isinstance(run, RunFolder) else open_run(run)
    config: Config = load_run_config(folder.fetch(CONFIG_FILE), *overrides, trust=trust)
    snapshot = load_checkpoint(folder, checkpoint, config)
    context = RunContext(folder, choose_device(device))
    dataset = load_run_data(config, folder)
    require_same(snapshot, {"always": {"class names": list(dataset.class_names)}}, f"the checkpoint of {folder.uri}")
    report_lines(notify, dataset.skipped)
    digest = digest_of_files(dataset)
    if snapshot.state.get("pictures", digest) != digest:  # older checkpoints do not have it
        notify("the images differ from those at the start of the run; the model may have been trained on some of them")
    train, val = train_and_val(config, dataset)
    indices = {"test": np.arange(len(dataset.test.labels)), "val": val, "train": train}[split]
    images = dataset.test if split == "test" else dataset.train
    if not len(indices):
        raise ConfigError(f"the run {folder.uri} has no images of this split (data.val_fraction=0): --split {split}")
    evaluated = min(config.train.eval_batch_size, len(indices))
    check_device(config, dataset.num_classes, context.device, 0, evaluated)
    sizes = dataset.num_classes, dataset.image_size
    model = trained_model(folder, config.model, snapshot, *sizes, config.options.model)
    # Measuring both loaders would take longer than it saves in a single pass.
    engine = engine_of(config, context.device, dataset, images, "dali" if config.data.loader == "dali" else "torch")
    return Evaluation(config, context, dataset, model.to(context.device), engine, indices)

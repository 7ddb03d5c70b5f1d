"""The training loop: plain PyTorch, the same for one process, torchrun and Ray.

`fit` trains and tests one run, `train_epoch` walks one epoch, `train_step` takes one step, `evaluate_model`
and `evaluate_test_set` evaluate a model.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from densenet_dist.data.datasets import Dataset
from densenet_dist.data.engine import Engine
from densenet_dist.data.loader import Batch, BatchRecipe
from densenet_dist.errors import DataError, storage_errors
from densenet_dist.run_folder import METRICS_FILE, SUMMARY_FILE
from densenet_dist.schema import Config
from densenet_dist.train.board import Board
from densenet_dist.train.building import build_job
from densenet_dist.train.checkpoint import Position, load_weights
from densenet_dist.train.classes import note_data
from densenet_dist.train.context import RunContext
from densenet_dist.train.control import StopRequest
from densenet_dist.train.ddp import no_sync, sync_from_rank0
from densenet_dist.train.inputs import engine_of, eval_loader, normalisation, part_warnings, tell_lines
from densenet_dist.train.job import Job, describe
from densenet_dist.train.keeping import after_step, decide, diverged, leave_run, report_damage, restore, save, watched
from densenet_dist.train.logs import RunLog
from densenet_dist.train.metrics import Metrics
from densenet_dist.train.network import autocast
from densenet_dist.train.results import ResultsAccumulator, TestResults, add_images, write_test_results
from densenet_dist.train.step_graph import StepGraph

PROGRESS_EVERY_S = 0.5


@storage_errors()
def fit(config: Config, context: RunContext) -> dict[str, Any]:
    """Train as configured, from the run's latest checkpoint if it has one; then test the best model once.

    Every rank calls it. Rank 0 writes classes.json, metrics.jsonl, TensorBoard, checkpoints and summary.json to
    the run's folder.

    Returns:
        What summary.json holds: final figures, the same on every rank.

    Raises:
        TrainingError: when a loss is NaN or infinite, on every rank at the same step.
        Stopped: when the context's status was asked for that, and all is saved.
        DataError, ConfigError, StorageError, CheckpointError: as their names say.
    """
    job = build_job(config, context)
    log = None
    try:
        restore(job)
        if context.rank == 0:
            log = RunLog(context.run, job.position.global_step, config.checkpoint.monitor)
            missing = [f"epoch {epoch}" for epoch in log.missing_epochs(job.position.epoch)]
            tell_lines(job.warn, missing, f"{context.run.uri}/{METRICS_FILE}: lines that are missing or damaged")
        return _fit(job, log)
    except BaseException as error:
        if log is not None:  # this process may go on to another run
            log.abandon(failed=isinstance(error, Exception), leaves=context.status.requested is StopRequest.LEAVE)
        raise
    finally:
        if context.status.requested is not StopRequest.LEAVE:  # the folder is still this run's
            _profile(job, ends=True)
        job.saver.close()


def _fit(job: Job, log: RunLog | None) -> dict[str, Any]:
    config, context = job.config, job.context
    if log is not None:
        if job.position.global_step == 0:
            log.show(Board.introduce, config, job.dataset)
        log.track(config, lambda text, warning: context.report({"kind": "note", "text": text, "warning": warning}))
        note_data(context.run, config, job.dataset)
        context.report(describe(job))
        for text in part_warnings(config, job.dataset):
            job.warn(text)
        tell_lines(job.warn, job.dataset.skipped)
    while job.position.epoch < config.train.epochs and not job.course.stopped:
        _run_epoch(job, log)
    return _finish(job, log)


def train_epoch(job: Job, log: RunLog | None = None) -> dict[str, float]:
    """Take the remaining steps of the current epoch.

    Returns:
        ``train/loss``, ``train/top1``, ``train/top5`` over the whole epoch and all ranks; ``perf/images_per_s`` and
        ``perf/data_wait`` (share of time) of rank 0.
    """
    job.forward.train()
    status = job.context.status
    status.enter("wait")
    shown = time.perf_counter()
    _profile(job)
    for batch in _batches(job):
        status.enter("train")
        if log is not None and job.position.global_step == 0:
            first = batch.batch() if isinstance(batch, BatchRecipe) else batch
            log.show(Board.images, "train/augmented", first.images, *normalisation(job.config, job.dataset), 0)
        with nullcontext() if job.profiler is None else job.profiler.step(job.position.global_step):
            train_step(job, batch)
        status.advance(job.position.global_step)
        after_step(job)
        _profile(job, ends=job.position.step == job.train_loader.steps_per_epoch)
        now = time.perf_counter()
        if job.context.rank == 0 and now - shown > PROGRESS_EVERY_S:
            shown = now
            _show_progress(job)
        status.enter("wait")
    status.enter("train")
    totals = job.metrics.compute()  # waits for the device, so that the time below is that of the work
    status.enter("validate")
    trained, waited = job.count_time()
    figures = {f"train/{name}": totals[name] for name in ("loss", "top1", "top5")}
    return figures | {"perf/images_per_s": job.num_images[0] / trained, "perf/data_wait": waited / trained}


def _batches(job: Job) -> Iterator[Batch] | Iterator[BatchRecipe]:
    """Those left of the current epoch; recipes where a captured step can make the batch too."""
    start = (job.position.epoch, job.position.step)
    recipes = None if job.step_graph is None else job.train_loader.recipes(*start)
    return job.train_loader.epoch(*start) if recipes is None else recipes


def train_step(job: Job, batch: Batch | BatchRecipe) -> None:
    """One optimizer step on this rank's share of a global batch.

    The loss is the mean over the *global* batch: DDP averages the ranks' gradients, so each rank's summed loss is
    scaled by world_size / global_size, which stays exact where the shares are unequal.
    """
    step = job.position.global_step
    job.reseed_dropout()
    if job.step_graph is not None:
        _step_as_graph(job, job.step_graph, batch if isinstance(batch, BatchRecipe) else BatchRecipe.of(batch))
    else:
        for group in job.optimizer.param_groups:
            group["lr"] = job.course.lr(step)
        _step_in_parts(job, batch.batch() if isinstance(batch, BatchRecipe) else batch)
    if job.average is not None:
        job.average.update(step)
    job.position = Position(job.position.epoch, job.position.step + 1, step + 1)


def _step_in_parts(job: Job, batch: Batch) -> None:
    """Forward, backward and the optimizer's step; the parts (``grad_accum_steps``) add up to the whole."""
    parts = min(job.config.train.grad_accum_steps, batch.global_size // job.context.world_size)
    scale = job.context.world_size / batch.global_size
    pieces = zip(batch.images.tensor_split(parts), batch.targets.tensor_split(parts), strict=True)
    for number, (images, aims) in enumerate(pieces, start=1):
        with no_sync(job.forward) if number < parts else nullcontext():
            loss, logits = job.forward_backward(images, aims, scale)
        job.metrics.update(loss, logits, aims)
        job.finite.update(loss.detach(), job.position.global_step)
    job.update_weights()
    job.optimizer.zero_grad(set_to_none=True)


def _step_as_graph(job: Job, graph: StepGraph, recipe: BatchRecipe) -> None:
    graph.set_learning_rate(job.course.lr(job.position.global_step))
    loss, logits, aims = graph(recipe)
    job.metrics.update(loss, logits, aims)
    job.finite.update(loss, job.position.global_step)


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    precision: str,
    on_batch: Callable[[Tensor, Batch], None] | None = None,
    split: str = "test",
) -> dict[str, float]:
    """Loss, top-1, top-5 and number of images over all ranks' batches; every rank calls it, with its own batches.

    `on_batch` is called with the logits and the batch; `split` names the images in the error.

    Raises:
        DataError: on every rank, if no image could be read.
    """
    model.eval()
    sync_from_rank0(list(model.buffers()))
    metrics = Metrics(device)
    for batch in batches:
        with autocast(device, precision):
            logits = model(batch.images)
        metrics.update(F.cross_entropy(logits.float(), batch.targets, reduction="sum"), logits, batch.targets)
        if on_batch is not None:
            on_batch(logits, batch)
    totals = metrics.compute()
    if not totals["images"]:
        raise DataError(f"none of the {split} images can be read any more\n  restore their files, then try again")
    return totals


def evaluate_test_set(
    model: nn.Module,
    config: Config,
    context: RunContext,
    dataset: Dataset,
    engine: Engine,
    watch: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> TestResults:
    """Evaluate a model on the test set, which is shared among the ranks; every rank calls it.

    Args:
        engine: of the test split.
        watch: wraps the batches, to do something between two of them.

    Returns:
        The same on every rank, but rank 0 alone has the images of the mistakes.
    """
    loader = eval_loader(config, context, engine)
    accumulator = ResultsAccumulator(dataset.num_classes)

    def add(logits: Tensor, batch: Batch) -> None:
        accumulator.update(logits, batch.targets, loader.batch_indices)

    metrics = evaluate_model(model, watch(loader), context.device, config.train.precision, add)
    accumulator.reduce(context.device)
    results = accumulator.compute(metrics, dataset.class_names, context.device)
    if context.rank == 0:
        try:
            results = add_images(results, config, dataset, engine)
        except Exception as error:  # the results are worth more than images
            context.report({"kind": "note", "text": f"the images of the worst mistakes could not be read: {error}"})
    return results


def _run_epoch(job: Job, log: RunLog | None) -> None:
    started = time.perf_counter()
    record: dict[str, Any] = {
        "epoch": job.position.epoch + 1,
        "lr": job.course.lr(job.position.global_step - job.position.step),
    }
    record |= train_epoch(job, log)
    request = decide(job)
    validation = _validate(job)
    job.end_epoch(validation.get("val/loss"))
    record |= validation | job.context.goodput.figures() | {"seconds": time.perf_counter() - started}
    record["perf/device_hours"] = job.context.goodput.device_hours
    if log is not None:
        log.record(record, job.position.global_step)
        log.publish()
    _tell_of_lost_files(job)
    last = job.position.epoch == job.config.train.epochs or job.course.stopped
    if job.position.epoch % job.config.checkpoint.every_epochs == 0 or last or request is StopRequest.SAVE:
        save(job, job.snapshot(validation))
    if job.context.hands_over or last:
        job.saver.wait()
    latest = job.store.latest()
    job.context.report(
        {
            "kind": "epoch",
            **record,
            "epochs": job.config.train.epochs,
            "global_step": job.position.global_step,
            "many_classes": job.dataset.num_classes > 10,
            "checkpoint": latest.name if latest else None,
            "is_best": latest is not None and job.store.best == latest.name and latest.position == job.position,
        }
    )


def _validate(job: Job) -> dict[str, float]:
    if job.val_loader is None:
        return {}
    before = job.snapshot(validated=False)  # refers to the state, which validation leaves as it is
    batches = watched(job, job.val_loader, lambda: leave_run(job, before))
    try:
        precision = job.config.train.precision
        totals = evaluate_model(job.eval_model, batches, job.context.device, precision, split="validation")
    except DataError:
        save(job, before)  # training goes on from here once the files are back
        job.saver.wait()
        raise
    if not math.isfinite(totals["loss"]):
        raise diverged(job, "validation loss is", job.position.global_step - 1)
    return {f"val/{name}": totals[name] for name in ("loss", "top1", "top5")}


def _finish(job: Job, log: RunLog | None) -> dict[str, Any]:
    """Test the best model once, on every rank's share of the test images, and write the summary."""
    config, context = job.config, job.context
    context.status.enter("test")
    if context.rank == 0:
        context.report({"kind": "phase", "text": "testing"})
    job.saver.wait()
    best: list[Any] = [None]
    if context.rank == 0:
        snapshot = job.store.load_best()
        assert snapshot is not None  # the last epoch always saves
        if job.store.damaged:
            report_damage(job)
            job.store.write_list()
        load_weights(job.eval_model, snapshot.average or snapshot.model, "the best checkpoint")
        best = [{"epoch": snapshot.position.epoch, **snapshot.metrics}]
    if dist.is_initialized():
        dist.broadcast_object_list(best, src=0)
    sync_from_rank0(list(job.eval_model.parameters()))
    engine = engine_of(config, context.device, job.dataset, job.dataset.test, job.loader)
    watch = partial(watched, job, leave=lambda: leave_run(job))
    results = evaluate_test_set(job.eval_model, config, context, job.dataset, engine, watch)
    if not math.isfinite(results.loss):
        raise diverged(job, "test loss is", job.position.global_step - 1)
    test = {"test/loss": results.loss, "test/top1": results.top1, "test/top5": results.top5}
    summary = {
        "status": "early stop" if job.course.stopped else "finished",
        "epochs": job.position.epoch,
        "global_step": job.position.global_step,
        "train_seconds": round(job.seconds, 3),
        "best": best[0],
        **test,
    }
    if log is not None:
        log.record({"epoch": best[0]["epoch"], **test}, job.position.global_step)
        log.show(Board.test_results, results, job.position.global_step)
        log.show(Board.finished, job.position.global_step)
        log.close()
        write_test_results(context.run, results)
        context.run.write(SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
        log.end_tracking(summary)
        context.report({"kind": "end", **summary})
    return summary


def _tell_of_lost_files(job: Job) -> None:
    """Say which pictures could not be read any more in this epoch, on any rank. A collective call."""
    if job.engine.files is None:
        return
    news = job.engine.substitutes.news()
    found: list[Any] = [news]
    if dist.is_initialized():
        found = [None] * job.context.world_size
        dist.all_gather_object(found, news)
    lines = sorted({line for news in found for line in news})
    tell_lines(job.warn, lines, "pictures that can no longer be read, and are replaced")


def _profile(job: Job, *, ends: bool = False) -> None:
    """Begin or end what is recorded of the steps, between two of them; a part ends with its epoch."""
    profiler, taken = job.profiler, job.position.global_step
    if profiler is not None:
        with job.context.status.during("save"):
            _beside(job, "the profile", lambda: profiler.finish(taken) if ends else profiler.between_steps(taken))


def _beside(job: Job, what: str, show: Callable[[], None]) -> None:
    """Show something that a run can do without: it is never lost to a picture."""
    try:
        show()
    except Exception as error:
        job.context.report({"kind": "note", "text": f"{what} could not be made: {type(error).__name__}: {error}"})


def _show_progress(job: Job) -> None:
    loss, top1, _, images = job.metrics.sums.tolist()
    trained, _ = job.count_time()
    job.context.report(
        {
            "kind": "progress",
            "epoch": job.position.epoch + 1,
            "epochs": job.config.train.epochs,
            "step": job.position.step,
            "steps": job.train_loader.steps_per_epoch,
            "global_step": job.position.global_step,
            "loss": loss / max(images, 1.0),
            "top1": top1 / max(images, 1.0),
            "rate": job.position.step * job.config.train.global_batch_size / trained,
            "goodput": job.context.goodput.ratio,
        }
    )

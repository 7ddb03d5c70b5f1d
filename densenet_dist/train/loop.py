"""The training loop: plain PyTorch, the same for one process, torchrun and Ray.

`fit` trains epoch by epoch (`train_epoch`) and step by step (`train_step`), then tests the best model. The functions
below them handle checkpoints, stop requests, validation and logging.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from typing import Any

import torch

from densenet_dist.data.loader import Batch, BatchRecipe
from densenet_dist.errors import DenseNetDistError, TrainingError, storage_errors
from densenet_dist.run_folder import METRICS_FILE, SUMMARY_FILE, WEIGHTS_FILE
from densenet_dist.schema import Config
from densenet_dist.train.context import RunContext, Stopped, StopRequest
from densenet_dist.train.evaluation import Evaluation, evaluate_model, evaluate_test_set
from densenet_dist.train.inputs import engine_of, report_lines, split_warnings, write_metadata
from densenet_dist.train.logs import RunLog, TensorBoardWriter, epoch_event, progress_event, start_event
from densenet_dist.train.network import no_sync, suppress_out_of_memory
from densenet_dist.train.performance import epoch_metrics, step_metrics
from densenet_dist.train.ranks import broadcast, sync_from_rank0
from densenet_dist.train.results import write_test_results
from densenet_dist.train.snapshot import Snapshot, load_weights
from densenet_dist.train.state import custom_states, report_damage, resume, take_snapshot
from densenet_dist.train.step_graph import StepResult
from densenet_dist.train.time_limit import fit_to_time
from densenet_dist.train.trainer import Trainer

PROGRESS_EVERY_S = 0.5


@storage_errors()
def fit(config: Config, context: RunContext) -> dict[str, Any]:
    """Train as configured, from the run's latest checkpoint if it has one; then test the best model once.

    Every rank calls it. Rank 0 writes classes.json, metrics.jsonl, TensorBoard, checkpoints and summary.json to
    the run's folder.

    Returns:
        The content of summary.json: the final metrics, the same on every rank.

    Raises:
        TrainingError: a loss is NaN or infinite. Every rank raises it at the same step.
        Stopped: a stop was requested; everything is saved, unless another job has taken over the run's folder.
    """
    if context.rank == 0:
        context.run.guard()  # workers may be restarted after another job has taken over the folder
    trainer = Trainer(config, context)
    log = None
    try:
        resume(trainer)
        if context.rank == 0:
            log = RunLog(context.run, trainer.position.global_step, config.checkpoint.monitor, trainer.position.epoch)
            _start_log(trainer, log)
        trainer.notify("on_start")
        custom_states(trainer)  # fails now, not at the first checkpoint, if a custom state cannot be saved
        while not trainer.finished:
            started = time.perf_counter()
            record = train_epoch(trainer, log)
            request = sync_requests(trainer)
            before = take_snapshot(trainer, validated=False)  # no copy; the state stays as it is until `end_epoch`
            stop_if_requested(trainer, request, before)
            validation = _validate(trainer, before)
            request = max(request, sync_requests(trainer))
            stop_if_requested(trainer, request, before)  # the validation may be incomplete
            if not math.isfinite(validation.get("val/loss", 0.0)):
                raise trainer.divergence_error("validation loss", trainer.position.global_step - 1)
            cut = trainer.position.step < trainer.steps_per_epoch
            if cut:  # for lack of time: a run that is extended completes the epoch
                save(trainer, take_snapshot(trainer, validation))
            trainer.end_epoch(validation.get("val/loss"))
            record |= validation | trainer.goodput.metrics() | {"seconds": time.perf_counter() - started}
            trainer.notify("on_epoch", dict(record))
            _end_epoch(trainer, log, record, None if cut else validation, save_now=request is StopRequest.SAVE)
        return _test(trainer, log)
    except BaseException as error:
        if log is not None:  # release it: this process may train another run (notebook, sweep)
            log.close_after_error(
                failed=isinstance(error, Exception), leaves=context.status.requested is StopRequest.ABANDON
            )
        raise
    finally:
        if context.status.requested is not StopRequest.ABANDON:
            trainer.profiler.finish()
        trainer.store.close()


def train_epoch(trainer: Trainer, log: RunLog | None = None) -> dict[str, Any]:
    """Take the remaining steps of the current epoch.

    Returns:
        ``epoch`` (from 1), ``lr`` (at its start); ``train/loss``, ``train/top1``, ``train/top5`` over the whole epoch
        and all ranks; ``perf/images_per_s`` of all ranks; ``perf/data_wait``, this rank's share of time spent waiting.
    """
    trainer.train_model.train()
    status, epoch = trainer.context.status, trainer.position.epoch
    if trainer.position.step == 0:
        trainer.epoch_lr = trainer.lr_controller.lr(trainer.position.global_step)
    status.enter("wait")
    shown = time.perf_counter()
    for batch in trainer.batches():
        status.enter("train")
        if log is not None and trainer.position.global_step == 0:
            log.write_tensorboard(_show_images, trainer, batch)
        ends_epoch = trainer.steps_left == 1
        with trainer.profiler.step(trainer.position.global_step, ends_epoch=ends_epoch):
            train_step(trainer, batch)
        log_steps(trainer)
        status.advance(trainer.position.global_step)
        if not ends_epoch:  # `fit` saves at the end of the epoch
            save_or_stop(trainer)
        if trainer.context.rank == 0 and time.perf_counter() - shown > PROGRESS_EVERY_S:
            shown = time.perf_counter()
            trainer.context.report(progress_event(trainer))
        status.enter("wait")
    status.enter("train")
    totals = trainer.metrics.compute()  # waits for the device: the time below includes its work
    status.enter("validate")  # the phase of all that follows, until the next epoch
    trained, waited = trainer.epoch_time()
    record = {f"train/{key}": value for key, value in totals.items() if key != "images"}
    speed = {"perf/images_per_s": totals["images"] / trained, "perf/data_wait": waited / trained}
    return {"epoch": epoch + 1, "lr": trainer.epoch_lr} | record | speed


def train_step(trainer: Trainer, batch: Batch | BatchRecipe) -> None:
    """Take one optimizer step on this rank's share of a global batch.

    The loss is the mean over the *global* batch: DDP averages the ranks' gradients, so each rank's summed loss is
    scaled by world_size / global_size, which stays exact where the shares are unequal.
    """
    results: list[StepResult] | None = None
    while results is None:
        trainer.prepare_step()
        with suppress_out_of_memory():  # releases the traceback, which holds the step's tensors
            results = _forward_backward(trainer, batch)
        if results is None:
            trainer.halve_micro_batches(batch)
    for result in results:
        trainer.update_metrics(*result)
    if trainer.step_graph is None:  # a graph includes the update of the weights
        trainer.update_weights()
        trainer.optimizer.zero_grad(set_to_none=True)
    trainer.end_step()


def _forward_backward(trainer: Trainer, batch: Batch | BatchRecipe) -> list[StepResult]:
    """Accumulate the gradients of this rank's share of a batch; return the results of its micro-batches."""
    if trainer.step_graph is not None:
        return [trainer.step_graph(batch if isinstance(batch, BatchRecipe) else BatchRecipe.of(batch))]
    batch = batch.compute() if isinstance(batch, BatchRecipe) else batch
    count = trainer.micro_batches.count(trainer.position.global_step, batch.global_size)
    scale, results = trainer.context.world_size / batch.global_size, []
    micro_batches = zip(batch.images.tensor_split(count), batch.targets.tensor_split(count), strict=True)
    for number, (images, targets) in enumerate(micro_batches, start=1):
        with no_sync(trainer.train_model) if number < count else nullcontext():
            results.append(StepResult(*trainer.forward_backward(images, targets, scale), targets))
    return results


def log_steps(trainer: Trainer) -> None:
    """Record the metrics of the last ``log.every_steps`` steps if that is due. Waits for the device only then."""
    every, step = trainer.config.log.every_steps, trainer.position.global_step
    if every is not None and step % every == 0:
        metrics = step_metrics(trainer)
        if trainer.log is not None:
            trainer.log.record(metrics, step)


def save_or_stop(trainer: Trainer) -> None:
    """Save within an epoch if the configuration or a request asks for it, and stop if that is requested."""
    every = trainer.config.checkpoint.every_steps
    if (isinstance(every, int) and trainer.position.global_step % every == 0) or trainer.rank_sync.due():
        request = sync_requests(trainer)
        if request in (StopRequest.SAVE, StopRequest.STOP):
            fit_to_time(trainer)
            save(trainer, take_snapshot(trainer))
        stop_if_requested(trainer, request)


def sync_requests(trainer: Trainer) -> StopRequest:
    """Exchange the requests of all ranks, and of the configuration, and return the greatest one. A collective call.

    Raises:
        TrainingError: a loss since the last call was not finite.
    """
    every = trainer.config.checkpoint.every_steps
    if every == "auto":  # depends on the clock, so rank 0 decides for all ranks
        save_is_due = trainer.context.rank == 0 and trainer.store.save_is_due()
    else:
        save_is_due = every is not None and trainer.position.global_step % every == 0
    if trainer.context.rank == 0 and trainer.time_limit.is_due(trainer.position.global_step):
        save_is_due = True  # `fit_to_time` comes with a checkpoint
    not_finite, request = trainer.rank_sync.exchange(StopRequest.SAVE if save_is_due else StopRequest.NONE)
    if not_finite is not None:
        raise trainer.divergence_error("loss", not_finite)
    return request


def save(trainer: Trainer, snapshot: Snapshot) -> None:
    """Copy a snapshot and write it in the background.

    Raises:
        TrainingError: the weights are not finite.
        StorageError: the previous checkpoint could not be written.
    """
    # The losses checked so far are those before the last update, which may have produced NaN. Such weights must not
    # replace a good checkpoint.
    norms = torch.stack(torch._foreach_norm([parameter.detach() for parameter in trainer.model.parameters()]))
    if not norms.isfinite().all():
        raise trainer.divergence_error("norm of the weights", trainer.position.global_step - 1)
    if trainer.context.rank == 0:
        if trainer.log is not None and trainer.config.log.every_steps is not None:
            with trainer.context.status.during("save"):
                trainer.context.run.publish(METRICS_FILE)  # a resumed run needs the lines of the steps before
        trainer.store.save(snapshot)
    trainer.saved_step = trainer.position.global_step


def stop_if_requested(trainer: Trainer, request: StopRequest, snapshot: Snapshot | None = None) -> None:
    """Raise `Stopped` if the ranks have agreed on it; before that, save the snapshot, if one is given."""
    if request is StopRequest.STOP:
        if snapshot is not None and trainer.saved_step != trainer.position.global_step:
            save(trainer, snapshot)
        trainer.store.wait()
        trainer.context.note(f"stopped; the checkpoint of step {trainer.saved_step} is saved")
    if request in (StopRequest.STOP, StopRequest.ABANDON):
        raise Stopped


def _validate(trainer: Trainer, before: Snapshot) -> dict[str, float]:
    if trainer.val_loader is None:
        return {}

    def save_now() -> None:  # the other ranks may take longer than there is time
        if trainer.context.rank == 0 and trainer.context.status.requested is StopRequest.STOP:
            save(trainer, before)
            trainer.store.wait()

    try:
        model, precision = trainer.eval_model, trainer.config.train.precision
        totals = evaluate_model(model, trainer.val_loader, trainer.context, precision, None, save_now)
    except DenseNetDistError:
        save(trainer, before)  # training resumes from here once the files are back, or there is more memory
        trainer.store.wait()
        raise
    return {f"val/{name}": value for name, value in totals.items() if name != "images"}


def _end_epoch(
    trainer: Trainer, log: RunLog | None, record: dict[str, Any], validation: dict[str, float] | None, *, save_now: bool
) -> None:
    """Record an epoch, save if that is due, and report it. `validation` is None if it is saved already."""
    config, context, position = trainer.config, trainer.context, trainer.position
    record |= epoch_metrics(trainer, record["perf/images_per_s"])
    record["perf/device_hours"] = trainer.goodput.device_hours
    if log is not None:
        with context.status.during("save"):  # slow storage is not a hang
            log.record(record, position.global_step)
            log.publish()
    due = save_now or trainer.finished or position.epoch % config.checkpoint.every_epochs == 0
    if due and validation is not None:
        fit_to_time(trainer)
        save(trainer, take_snapshot(trainer, validation))
    if context.sync_each_epoch or trainer.finished:
        trainer.store.wait()
    with context.status.during("save"):  # in a sweep this waits for the scheduler, which is not a hang
        context.report(epoch_event(trainer, record))


def _test(trainer: Trainer, log: RunLog | None) -> dict[str, Any]:
    """Test the best model once, on every rank's share of the test images, and write the summary."""
    config, context, step = trainer.config, trainer.context, trainer.position.global_step
    trainer.store.wait()
    context.status.enter("test")
    best: dict[str, Any] = {}
    if context.rank == 0:
        context.report({"kind": "phase", "text": "testing"})
        snapshot = trainer.store.load_best()
        assert snapshot is not None  # the last epoch always saves
        report_damage(trainer)
        trainer.store.write_list()  # without checkpoints that `resume` found damaged, too
        load_weights(trainer.eval_model, snapshot.average or snapshot.model, "the best checkpoint")
        best = {"epoch": snapshot.position.last_epoch, **snapshot.metrics}
    best = broadcast(best)
    sync_from_rank0(list(trainer.eval_model.parameters()))
    engine = engine_of(config, context.device, trainer.dataset, trainer.dataset.test, trainer.loader_name)
    test = Evaluation(config, context, trainer.dataset, trainer.eval_model, engine)
    results = evaluate_test_set(test)
    stop_if_requested(trainer, sync_requests(trainer))
    if not math.isfinite(results.loss):
        raise trainer.divergence_error("test loss", step - 1)
    metrics = {f"test/{name}": value for name, value in results.metrics.items()}
    status = "early stop" if trainer.lr_controller.stopped else "finished"
    if trainer.lr_controller.end_step == step < config.train.epochs * trainer.steps_per_epoch:
        status = "time limit"
    summary = {
        "status": status,
        "epochs": trainer.position.epoch,
        "trained_epochs": round(step / trainer.steps_per_epoch, 2),
        "global_step": step,
        "train_seconds": round(trainer.train_time()[0], 3),
        "best": best,
        **metrics,
        "test/images": round(results.images),
    }
    if log is not None:
        with context.status.during("save"):  # slow storage, or a slow tracker, is not a hang
            log.record({"epoch": best["epoch"], **metrics}, step)
            log.write_tensorboard(TensorBoardWriter.test_results, results, step)
            log.write_tensorboard(TensorBoardWriter.finished, step)
            log.publish(last=True)
            write_test_results(context.run, results)
            context.run.write(SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
            context.run.remove(WEIGHTS_FILE)  # the initial weights: there are checkpoints now
            log.end_tracking(summary)
        context.report({"kind": "end", **summary})
    try:
        trainer.notify("on_end", dict(summary))
    except TrainingError as error:  # everything is written
        context.warn(str(error))
    return summary


def _start_log(trainer: Trainer, log: RunLog) -> None:
    """Record and report the configuration, and warn about problems of the log and the data."""
    config, context, dataset = trainer.config, trainer.context, trainer.dataset
    trainer.log = log
    if trainer.position.global_step == 0:
        log.write_tensorboard(TensorBoardWriter.write_hparams, config, dataset.num_classes)
    log.track(config, context.note)
    write_metadata(context.run, config, dataset)
    context.report(start_event(trainer))
    for text in split_warnings(config, dataset):
        context.warn(text)
    report_lines(context.warn, dataset.skipped)


def _show_images(board: TensorBoardWriter, trainer: Trainer, batch: Batch | BatchRecipe) -> None:
    first = batch.compute() if isinstance(batch, BatchRecipe) else batch
    board.images("train/augmented", first.images, trainer.engine.mean, trainer.engine.std, 0)

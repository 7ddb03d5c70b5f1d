"""When a run saves, when it leaves, and where it goes on: what ranks decide together after a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from densenet_dist.data.loader import Batch
from densenet_dist.errors import TrainingError
from densenet_dist.train.checkpoint import Snapshot
from densenet_dist.train.context import Stopped
from densenet_dist.train.control import StopRequest
from densenet_dist.train.identity import digest_of_files
from densenet_dist.train.job import Job


def after_step(job: Job) -> None:
    """Look at what is asked of the run, and save or leave where it is.

    Raises:
        Stopped: on every rank, once all is saved.
        TrainingError: where a loss was not finite.
    """
    step, every = job.position.global_step, job.config.checkpoint.every_steps
    if job.position.step == job.train_loader.steps_per_epoch:
        return  # all is looked at and saved once the epoch is over
    due = isinstance(every, int) and step % every == 0
    if due or job.rank_sync.due():
        auto = every == "auto" and job.context.rank == 0 and job.saver.due()
        request = decide(job, StopRequest.SAVE if auto else StopRequest.NONE)
        if request is StopRequest.LEAVE:
            raise Stopped
        if due or request is not StopRequest.NONE:
            job.count_time()
            save(job, job.snapshot())
        if request is StopRequest.STOP:
            leave_run(job)


def decide(job: Job, request: StopRequest = StopRequest.NONE) -> StopRequest:
    """Look together with the other ranks at the losses so far, and at what is asked of the run."""
    not_finite, request = job.rank_sync.exchange(request)
    if not_finite is not None:
        raise diverged(job, "loss is", not_finite)
    return request


def save(job: Job, snapshot: Snapshot) -> None:
    """Hand a snapshot over to be written.

    Raises:
        TrainingError: where the weights are not finite.
        StorageError: where the one before could not be written.
    """
    # The last step's loss was that of the weights before it.
    norms = torch.stack(torch._foreach_norm([parameter.detach() for parameter in job.model.parameters()]))
    if not norms.isfinite().all():
        raise diverged(job, "norm of the weights is", job.position.global_step - 1)
    if job.context.rank == 0:
        with job.context.status.during("save"):
            job.saver.save(snapshot)
    job.saved_step = job.position.global_step


def watched(job: Job, batches: Iterable[Batch], leave: Callable[[], None]) -> Iterator[Batch]:
    """The batches of an evaluation. Rank 0 leaves between two of them when it is asked to stop."""
    status = job.context.status
    for batch in batches:
        yield batch
        status.advance()
        if status.requested is StopRequest.LEAVE:
            raise Stopped
        if job.context.rank == 0 and status.requested is StopRequest.STOP:
            leave()


def leave_run(job: Job, snapshot: Snapshot | None = None) -> NoReturn:
    """Save what is given, wait until all is written, and end."""
    if snapshot is not None:
        save(job, snapshot)
    job.saver.wait()
    if job.context.rank == 0:
        job.context.report({"kind": "note", "text": f"stopped; the checkpoint of step {job.saved_step} is saved"})
    raise Stopped


def diverged(job: Job, what: str, step: int) -> TrainingError:
    """The error that says so, and what is kept."""
    kept = "no checkpoint was saved yet"
    if job.saved_step is not None:
        kept = f"the checkpoint of step {job.saved_step} is kept"
    return TrainingError(
        f"the {what} NaN or infinite at step {step} (epoch {step // job.train_loader.steps_per_epoch + 1}); {kept}\n"
        "  try a lower train.lr, a warm-up (train.schedule.warmup_epochs), train.clip_grad_norm=1 "
        "or train.precision=fp32"
    )


def report_damage(job: Job) -> None:
    """Say which checkpoints were found damaged while loading."""
    for problem in job.store.damaged:
        job.warn(f"{problem}; it is left out")


def restore(job: Job) -> None:
    """Take up the latest whole checkpoint; rank 0 chooses it, so that all take the same."""
    chosen: list[Any] = [None]
    if job.context.rank == 0:
        snapshot = job.store.load_latest()
        chosen[0] = snapshot.position if snapshot else None
        if job.store.rebuilt:
            job.warn(f"{job.store.rebuilt}; it is rebuilt from the checkpoints' folders")
        report_damage(job)
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, src=0)
    for entry in job.store.entries:
        if entry.position == chosen[0]:
            snapshot = job.store.load(entry)
            job.restore(snapshot)
            if snapshot.state.get("pictures") != digest_of_files(job.dataset):
                job.warn("the pictures are not those that the run began with: it goes on, but no longer exactly")

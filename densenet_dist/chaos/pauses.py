"""What checkpoints of the notebook's net cost its training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from densenet_dist.config import load_config

if TYPE_CHECKING:
    from densenet_dist.train.job import Job


def pauses(folder: Path, number: int = 20) -> list[float]:
    """Seconds that training stands still for each of so many checkpoints, written to `folder`.

    Between two of them there is as much time as the writing needs, as with ``checkpoint.every_steps: auto``.
    """
    from densenet_dist.train.engine import train_step

    job = _job(folder)
    train_step(job, next(iter(job.train_loader.epoch(0))))  # so that there are moments of the gradients too
    found = []
    for _ in range(number):
        began = time.perf_counter()
        job.saver.save(job.snapshot())
        found.append(time.perf_counter() - began)
        job.saver.wait()
    job.close()
    return found


def share_of_auto(folder: Path, seconds: float) -> tuple[float, int]:
    """Train for so long with ``checkpoint.every_steps: auto``, writing to `folder`.

    Returns:
        Which share of the time went into checkpoints, pauses and writing together, 0 to 1; and how many there were.
    """
    from densenet_dist.train.engine import train_step
    from densenet_dist.train.keeping import after_step

    job = _job(folder)
    began = time.perf_counter()
    for batch in job.train_loader.epoch(0):
        train_step(job, batch)
        after_step(job)
        if time.perf_counter() - began > seconds:
            break
    job.saver.wait()
    share = job.saver.spent / (time.perf_counter() - began)
    job.close()
    return share, job.context.pulse.saved


def _job(folder: Path) -> Job:
    import torch

    from densenet_dist.run_folder import RunFolder
    from densenet_dist.train.building import build_job
    from densenet_dist.train.context import LocalContext

    overrides = ("train.global_batch_size=16", "data.limit=8000", "data.loader=torch", "data.val_fraction=0")
    config = load_config({"name": "pauses", "model": {"variant": "notebook"}, "data": {"name": "shapes"}}, *overrides)
    run = RunFolder(str(folder), "pauses")
    run.create()
    return build_job(config, LocalContext(run, torch.device("cpu")))

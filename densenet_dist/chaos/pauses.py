"""How long a step waits for a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

from densenet_dist.config import load_config


def pauses(folder: Path, number: int = 20) -> list[float]:
    """Seconds that training stands still for each of so many checkpoints of the notebook's net, written to `folder`.

    Between two of them there is as much time as the writing needs, as with ``checkpoint.every_steps: auto``.
    """
    import torch

    from densenet_dist.train.context import LocalContext
    from densenet_dist.train.engine import train_step
    from densenet_dist.train.job import build_job
    from densenet_dist.train.run_folder import RunFolder

    overrides = ("train.global_batch_size=16", "data.limit=200", "data.loader=torch", "data.val_fraction=0")
    model = {"variant": "notebook"}
    config = load_config({"name": "pauses", "model": model, "data": {"name": "shapes"}}, *overrides)
    run = RunFolder(str(folder), "pauses")
    run.create()
    job = build_job(config, LocalContext(run, torch.device("cpu")))
    train_step(job, next(iter(job.train_loader.epoch(0))))  # so that there are moments of the gradients too
    found = []
    for _ in range(number):
        began = time.perf_counter()
        job.saver.save(job.snapshot())
        found.append(time.perf_counter() - began)
        job.saver.wait()
    job.saver.close()
    return found

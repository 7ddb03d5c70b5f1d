"""Runs that take a second: a DenseNet of two layers on a few dozen generated images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from densenet_dist.config import load_config, to_yaml
from densenet_dist.run_folder import CONFIG_FILE, RunFolder
from densenet_dist.schema import Config
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.context import Event, RunContext
from densenet_dist.train.loop import fit
from densenet_dist.train.snapshot import Snapshot
from densenet_dist.train.trainer import Trainer

TINY = {
    "name": "tiny",
    "model": {"variant": "densenet_bc", "growth_rate": 4, "num_layers": [1, 1]},
    # 67 images to train on, 8 to validate with: 4 batches of 16, then one of 3.
    "data": {"name": "shapes", "limit": 75, "test_limit": 75, "prefetch": 1, "loader": "torch"},
    "train": {"epochs": 3, "global_batch_size": 16, "eval_batch_size": 20, "lr": 0.05},
    "cluster": {"engine": "local", "device": "cpu"},
}
STEPS_PER_EPOCH = 5


def tiny(storage: Path | str, *settings: str) -> Config:
    """The tiny run's configuration, in `storage`, with changes."""
    return load_config(TINY, {"storage": str(storage)}, *settings)


def run_of(config: Config) -> RunFolder:
    return RunFolder(config.storage, config.name)


def context_of(config: Config, run: RunFolder | None = None, listener: Callable[[Event], None] | None = None) -> Any:
    """A context for this process, or for its rank in the process group it is in."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return RunContext(run or run_of(config), torch.device("cpu"), rank, world_size, listener=listener)


def train(
    config: Config, *, run: RunFolder | None = None, listener: Callable[[Event], None] | None = None
) -> dict[str, Any]:
    """Train, or go on with, a run; its summary."""
    context = context_of(config, run, listener)
    if context.rank == 0:
        context.run.write(CONFIG_FILE, to_yaml(config))
    return fit(config, context)


def notes_of(config: Config) -> list[str]:
    """Train, or go on with, a run; what was noted."""
    notes: list[str] = []
    train(config, listener=lambda event: event["kind"] == "note" and notes.append(event["text"]))
    return notes


def stop_after(epoch: int, config: Config) -> None:
    """Train until an epoch is over, and stop as Ctrl-C does."""

    def listener(event: Event) -> None:
        if event["kind"] == "epoch" and event["epoch"] == epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, listener=listener)


def save(store: CheckpointStore, snapshot: Snapshot) -> None:
    """Write a checkpoint, list it, and delete those that are not to be kept."""
    store.save(snapshot)
    store.wait()


def trainer_of(config: Config) -> Trainer:
    """One rank's trainer, before its first step."""
    return Trainer(config, context_of(config))


def records(config: Config) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    from ray_runs import records as read  # needs psutil

    return read(run_of(config).path)


def weights_of(config: Config) -> dict[str, dict[str, bytes]]:
    """The bytes of every weight file, by checkpoint."""
    folders = (run_of(config).path / "checkpoints").glob("step-*")
    return {folder.name: {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} for folder in folders}

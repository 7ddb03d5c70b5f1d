"""A run's net as it is evaluated, with averaged weights where there are any, and the header that describes it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from densenet_dist.config import load_config
from densenet_dist.data.augment import EVAL_CROP
from densenet_dist.inference.header import Header, make_header
from densenet_dist.inference.network import Network
from densenet_dist.run_folder import CONFIG_FILE, open_run
from densenet_dist.schema import Config
from densenet_dist.train.classes import classes_of
from densenet_dist.train.context import choose_device
from densenet_dist.train.environment import git_commit, package_version
from densenet_dist.train.evaluation import load_checkpoint, trained_model
from densenet_dist.train.network import autocast


@dataclass(frozen=True, eq=False)
class Trained:
    """A run's checkpoint as a program: grey levels to logits, in the precision of the run's training and evaluation.

    Attributes:
        network: with its weights, on `device`, in the form of dense blocks that the run has.
    """

    config: Config
    header: Header
    network: Network
    device: torch.device

    def __call__(self, pixels: Tensor) -> Tensor:
        """Classify; see `Network`."""
        with autocast(self.device, self.config.train.precision):
            logits: Tensor = self.network(pixels)
        return logits


def open_trained(
    run: str | Path,
    *,
    checkpoint: Literal["best", "last"] = "best",
    device: str = "auto",
    block: Literal["reference"] | None = None,
    overrides: tuple[str, ...] = (),
) -> Trained:
    """Load a run's checkpoint, without its data set where the run tells its classes.

    Args:
        block: form of the dense blocks, if not the run's own.
        overrides: changes to the run's configuration, such as ``data.root=...``.

    Raises:
        StorageError, CheckpointError, DataError, EnvironmentProblem: as their names say.
    """
    folder = open_run(run)
    config = load_config(folder.fetch(CONFIG_FILE), *overrides)
    snapshot = load_checkpoint(folder, checkpoint, config)
    classes = classes_of(folder, config)
    chosen = choose_device(device)
    settings = config.model if block is None else replace(config.model, block=block)
    model = trained_model(folder, settings, snapshot, len(classes.names), classes.image_size)
    header = make_header(
        model.architecture,
        version=package_version("densenet-dist") or "unknown",
        run=config.name,
        data=config.data.name,
        checkpoint=f"{checkpoint}, step {snapshot.position.global_step}",
        commit=git_commit(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        class_names=classes.names,
        mean=classes.mean,
        std=classes.std,
        crop=EVAL_CROP if config.data.augment == "random_resized_crop" else 1.0,
        precision="fp32",
        metrics=snapshot.metrics,
    )
    network = Network(model, classes.mean, classes.std).eval().requires_grad_(False)
    return Trained(config, header, network.to(chosen), chosen)

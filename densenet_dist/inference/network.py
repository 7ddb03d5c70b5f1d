"""A trained model as one module from pixel values to logits, from a run or for an exported file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from densenet_dist.config import load_config
from densenet_dist.data.augment import EVAL_CROP
from densenet_dist.environment import git_commit, package_version
from densenet_dist.inference.header import Header, architecture_of, make_header
from densenet_dist.model import DenseNet
from densenet_dist.run_folder import CONFIG_FILE, open_run
from densenet_dist.schema import Config
from densenet_dist.train.context import choose_device
from densenet_dist.train.evaluation import load_checkpoint, trained_model
from densenet_dist.train.inputs import read_metadata
from densenet_dist.train.network import autocast


class Network(nn.Module):
    """Normalises and classifies images.

    Input: (N, 3, H, W) float32 pixel values from 0 to 255, RGB. Output: (N, classes) float32 logits. The model computes
    in the dtype of its weights; with bfloat16, batch normalisation keeps float32 parameters (`to_bfloat16`).

    Args:
        model: the trained model.
        mean, std: normalisation of images in [0, 1].
    """

    model: DenseNet
    scale: Tensor
    shift: Tensor

    def __init__(self, model: DenseNet, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        # Bit for bit the normalisation of data.torch_loader.TorchEngine, including its two roundings.
        levels = 255.0 * np.asarray(std, dtype=np.float64)
        for name, values in (("scale", 1.0 / levels), ("shift", -255.0 * np.asarray(mean, dtype=np.float64) / levels)):
            self.register_buffer(name, torch.from_numpy(values.astype(np.float32)).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute logits; see the class."""
        images = pixels * self.scale + self.shift
        first = next(self.model.parameters())
        logits: Tensor = self.model(images.to(first.dtype))
        return logits.float()


def to_bfloat16(model: DenseNet) -> DenseNet:
    """Convert convolutions and linear layers to bfloat16 in place; batch normalisation stays float32."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(torch.bfloat16)
    return model


def empty_net(header: Header) -> DenseNet:
    """Build the model of a header on the meta device, in the reference form."""
    architecture = replace(architecture_of(header), block="reference", init="torchvision")
    with torch.device("meta"):
        model = DenseNet(architecture)
    if header.precision == "bf16":
        to_bfloat16(model)
    return model


@dataclass(frozen=True, eq=False)
class Trained:
    """The model of a run's checkpoint, which computes in the precision of the run's evaluation.

    Attributes:
        network: with its weights, on `device`.
    """

    config: Config
    header: Header
    network: Network
    device: torch.device

    def __call__(self, pixels: Tensor) -> Tensor:
        """Compute logits; see `Network`."""
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
    """Load a run's checkpoint; only old runs without classes.json need their data set.

    Args:
        block: form of the dense blocks; by default that of the run.
        overrides: changes to the run's configuration, such as ``data.root=...``.

    Raises:
        StorageError, CheckpointError, DataError, EnvironmentProblem: as their names say.
    """
    folder = open_run(run)
    config = load_config(folder.fetch(CONFIG_FILE), *overrides)
    snapshot = load_checkpoint(folder, checkpoint, config)
    classes = read_metadata(folder, config)
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
        # Images in memory are evaluated whole, see `augment.evaluation_parameters`.
        crop=EVAL_CROP if config.data.name == "folder" and config.data.augment == "random_resized_crop" else 1.0,
        precision="fp32",
        metrics=snapshot.metrics,
    )
    network = Network(model, classes.mean, classes.std).eval().requires_grad_(False)
    return Trained(config, header, network.to(chosen), chosen)

"""Classify images with a trained model from a run or a safetensors file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from pydantic import ValidationError
from torch import Tensor

from densenet_dist.config import load_run_config
from densenet_dist.custom import is_custom
from densenet_dist.data.augment import EVAL_CROP
from densenet_dist.data.image_files import BadImage
from densenet_dist.environment import git_commit, package_version
from densenet_dist.errors import CheckpointError, ConfigError, DataError, OutOfMemory, is_out_of_memory
from densenet_dist.inference import formats
from densenet_dist.inference.header import CustomModel, Header, first_problem
from densenet_dist.inference.images import ImageLike, Unreadable, prepare, prepared
from densenet_dist.model import DenseNet
from densenet_dist.model.grad_cam import grad_cam, has_heat_maps
from densenet_dist.object_store import fetch_file, is_uri
from densenet_dist.pages.figures import heat_overlay
from densenet_dist.run_folder import CONFIG_FILE, open_run
from densenet_dist.schema import Config
from densenet_dist.train.context import choose_device
from densenet_dist.train.evaluation import load_checkpoint, trained_model
from densenet_dist.train.inputs import read_metadata
from densenet_dist.train.network import autocast

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_BATCH = 64
Checkpoint: TypeAlias = Literal["best", "last"]
Device: TypeAlias = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class ClassProbability:
    """A class, its label, and its probability in [0, 1]."""

    name: str
    label: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        source: the path of the image, or its number.
        top: the most probable classes, most probable first.
    """

    source: str
    top: tuple[ClassProbability, ...]


class Classifier:
    """Classifies images exactly as the evaluation of the run does.

    Args:
        header: the model's metadata.
        network: the model.
        device: where it runs; `network` is moved there.
        precision: of the computation: fp32, or bf16 or fp16 for automatic mixed precision.
    """

    def __init__(self, header: Header, network: formats.Network, device: torch.device, precision: str = "fp32") -> None:
        self.header, self.device, self._precision = header, device, precision
        self._network = network.to(device)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names by label."""
        return self.header.class_names

    @torch.no_grad()
    def logits(self, pixels: Tensor, *, tta: bool = False) -> Tensor:
        """Compute logits.

        Args:
            pixels: (n, 3, size, size) float32 pixel values, 0 to 255.
            tta: average the logits with those of the mirrored images.

        Returns:
            (n, classes) float32 on the CPU.
        """
        pixels = pixels.to(self.device)
        with autocast(self.device, self._precision):
            logits: Tensor = self._network(pixels)
            if tta:
                logits = (logits + self._network(pixels.flip(3))) / 2
        return logits.cpu()

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        top: int = 5,
        batch_size: int = DEFAULT_BATCH,
        tta: bool = False,
    ) -> list[Prediction]:
        """Classify images.

        Args:
            images: one or several: paths, uint8 arrays (H, W, 3) or PIL images. Prefer paths: Pillow opens some damaged
                JPEG files without an error.
            top: number of classes per image.
            batch_size: images per batch.
            tta: average with the mirrored image.

        Raises:
            DataError: listing all unusable images.
        """
        single = isinstance(images, str | os.PathLike) or hasattr(images, "convert") or hasattr(images, "shape")
        found = list(self.stream([images] if single else images, top=top, batch_size=batch_size, tta=tta))
        bad = [f"{item.source}: {item.reason}" for item in found if isinstance(item, Unreadable)]
        if bad:
            raise DataError("\n  ".join(("unusable images:", *bad)))
        return [item for item in found if isinstance(item, Prediction)]

    def stream(
        self,
        images: Iterable[ImageLike | Unreadable],
        *,
        top: int = 5,
        batch_size: int = DEFAULT_BATCH,
        tta: bool = False,
    ) -> Iterator[Prediction | Unreadable]:
        """Yield the same predictions in order as they are made, and `Unreadable` for unusable images.

        Threads decode images ahead of the model.
        """
        if top < 1 or batch_size < 1:
            raise ConfigError(f"top={top} and batch_size={batch_size} must each be at least 1")
        items = prepared(images, self.header.image_size, self.header.crop, ahead=2 * batch_size)
        while batch := list(islice(items, batch_size)):
            pixels = [found for _, found in batch if isinstance(found, Tensor)]
            tops = iter(self._classify(torch.stack(pixels), top, tta) if pixels else ())
            for name, found in batch:
                yield found if isinstance(found, Unreadable) else Prediction(name, next(tops))

    def heat_map(self, image: ImageLike, label: int) -> Image.Image | None:
        """Show which regions of an image support a class: Grad-CAM over the image as the model takes it.

        Returns:
            The image; None for models other than DenseNets, and last feature maps of one pixel.

        Raises:
            DataError: the image cannot be used.
        """
        if not has_heat_maps(self._network.model):
            return None
        try:
            pixels = prepare(image, self.header.image_size, self.header.crop)
        except BadImage as error:
            raise DataError(f"{image if isinstance(image, str | os.PathLike) else 'the image'}: {error}") from error
        images = self._network.normalize(pixels[None].to(self.device))
        (heat,) = grad_cam(self._network.model, images, torch.tensor([label])).cpu().numpy()
        return heat_overlay(pixels.round().to(torch.uint8).permute(1, 2, 0).numpy(), heat)

    def _classify(self, pixels: Tensor, top: int, tta: bool) -> list[tuple[ClassProbability, ...]]:
        try:
            logits = self.logits(pixels, tta=tta)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"{len(pixels)} images at a time do not fit into the memory of {self.device}\n"
                "  lower --batch-size (in Python: batch_size)"
            ) from error
        if not logits.isfinite().all():
            raise CheckpointError("the model returns NaN or infinite logits: its weights are damaged")
        probabilities, labels = logits.softmax(dim=1).topk(min(top, len(self.class_names)), dim=1)
        return [
            tuple(ClassProbability(self.class_names[label], label, value) for value, label in zip(*row, strict=True))
            for row in zip(probabilities.tolist(), labels.tolist(), strict=True)
        ]


def load_classifier(
    path: str | Path, *, checkpoint: Checkpoint = "best", device: Device = "auto", trust: bool = False
) -> Classifier:
    """Load a trained model to classify images.

    Args:
        path: the folder of a run (path or URI), its name under ``runs/``, or an exported safetensors file, which may
            be untrusted: nothing in it can run, unless you trust its custom model.
        checkpoint: of a run: best (by ``checkpoint.monitor``) or last.
        device: auto uses a GPU if there is one.
        trust: import the custom model that the run or file names, which runs its code.

    Raises:
        ConfigError: the last checkpoint of an exported file, which holds only one; or a custom model without `trust`.
        StorageError, CheckpointError, EnvironmentProblem: as their names say.
        DataError: the run is too old to have its class names, and its data set is missing.
    """
    file = _exported_file(path)
    if file is not None:
        if checkpoint != "best":
            raise ConfigError(f"{path} is an exported file with one checkpoint; leave out --checkpoint {checkpoint}")
        if file.suffix != formats.SUFFIXES["safetensors"]:
            raise CheckpointError(
                f"{file} is neither a run nor a safetensors export\n"
                "  onnxruntime runs .onnx files, torch.export.load reads .pt2 files that you trust (docs/predict.md)"
            )
        return Classifier(*formats.read_safetensors(file, trust=trust), choose_device(device))
    config, header, network = open_trained(path, checkpoint=checkpoint, trust=trust)
    return Classifier(header, network, choose_device(device), config.train.precision)


def _exported_file(path: str | Path) -> Path | None:
    """Return the exported file of that name, downloaded from an object store if needed; None if it names a run."""
    text, suffixes = str(path), formats.SUFFIXES.values()
    if is_uri(text):
        return fetch_file(text) if Path(text.partition("?")[0]).suffix in suffixes else None
    local = Path(os.path.expanduser(text))
    if os.path.isfile(local) or (local.suffix in suffixes and not os.path.isdir(local)):
        return local
    return None


def open_trained(
    run: str | Path,
    *,
    checkpoint: Checkpoint = "best",
    block: Literal["reference"] | None = None,
    overrides: tuple[str, ...] = (),
    trust: bool = False,
) -> tuple[Config, Header, formats.Network]:
    """Load a run's checkpoint on the CPU; only old runs without classes.json need their data set.

    Args:
        block: form of the dense blocks; by default that of the run.
        overrides: changes to the run's configuration, such as ``data.root=...``.
        trust: import the custom parts that the run names.

    Raises:
        StorageError, CheckpointError, DataError, EnvironmentProblem: as their names say.
    """
    folder = open_run(run)
    config = load_run_config(folder.fetch(CONFIG_FILE), *overrides, trust=trust)
    snapshot = load_checkpoint(folder, checkpoint, config)
    classes = read_metadata(folder, config)
    settings = config.model if block is None else replace(config.model, block=block)
    name, options = settings.variant, config.options.model
    model = trained_model(folder, settings, snapshot, len(classes.names), classes.image_size, options)
    net = None
    if isinstance(model, DenseNet) and not is_custom(name):
        net = replace(model.architecture, block="reference")
    other = None if net else CustomModel(name=name, options=options, image_size=classes.image_size)
    try:
        header = Header(
            format=1,
            version=package_version("densenet-dist") or "unknown",
            run=config.name,
            data=config.data.name,
            checkpoint=f"{checkpoint}, step {snapshot.position.global_step}",
            commit=git_commit(),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            class_names=classes.names,
            architecture=net,
            mean=classes.mean,
            std=classes.std,
            # Images in memory are evaluated whole, see `augment.evaluation_parameters`.
            crop=EVAL_CROP if config.data.name == "folder" and config.data.augment == "random_resized_crop" else 1.0,
            precision="fp32",
            metrics=snapshot.metrics,
            custom=other,
        )
    except ValidationError as error:  # the folder of a run is untrusted, too
        raise CheckpointError(f"the model of the run cannot be used: {first_problem(error)}") from None
    return config, header, formats.Network(model, classes.mean, classes.std)

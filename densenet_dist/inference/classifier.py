"""A trained net that classifies pictures, from a run, a safetensors file or an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from densenet_dist.errors import CheckpointError, ConfigError, DataError
from densenet_dist.inference import formats
from densenet_dist.inference.header import Header
from densenet_dist.inference.network import open_trained
from densenet_dist.inference.pictures import Picture, Unreadable, prepared
from densenet_dist.object_store import fetch_file, is_uri
from densenet_dist.train.context import choose_device

SUFFIXES = {".safetensors": "safetensors", ".pt2": "torch-export", ".onnx": "onnx"}
"""The exported files' suffixes, and the formats; a ``.pt2`` is written only."""

DEFAULT_BATCH = 64
Device: TypeAlias = Literal["auto", "cpu", "cuda"]
Run: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Guess:
    """A class, its label, and how probable it is, in [0, 1]."""

    name: str
    label: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What the net says of one picture.

    Attributes:
        source: the picture's path, or its place among those given.
        top: the most probable classes, the most probable first.
    """

    source: str
    top: tuple[Guess, ...]


class Classifier:
    """Classifies pictures as the evaluation of the run would.

    Args:
        header: what the net is.
        run: (n, 3, size, size) float32 grey levels on `device` to (n, classes) logits.
        device: where it runs.
    """

    def __init__(self, header: Header, run: Run, device: torch.device) -> None:
        self.header, self.device, self._run = header, device, run

    @property
    def class_names(self) -> tuple[str, ...]:
        """By label."""
        return self.header.class_names

    @torch.no_grad()
    def logits(self, pixels: Tensor, *, tta: bool = False) -> Tensor:
        """What the net makes of images.

        Args:
            pixels: (n, 3, size, size) float32, grey levels.
            tta: mean of the image's logits and its mirror image's.

        Returns:
            (n, classes) float32 on the CPU.
        """
        pixels = pixels.to(self.device)
        logits = self._run(pixels).float()
        if tta:
            logits = (logits + self._run(pixels.flip(3)).float()) / 2
        return logits.cpu()

    def predict(
        self,
        images: Picture | Iterable[Picture],
        *,
        top: int = 5,
        batch_size: int = DEFAULT_BATCH,
        tta: bool = False,
    ) -> list[Prediction]:
        """Classify pictures.

        Args:
            images: one picture or several: paths, uint8 arrays (H, W, 3) or PIL images.
            top: how many classes to give for each.
            batch_size: pictures that the net sees at a time.
            tta: mean with the mirror image.

        Raises:
            DataError: naming all pictures that cannot be used.
        """
        alone = isinstance(images, str | os.PathLike | Tensor) or hasattr(images, "convert") or hasattr(images, "shape")
        found = list(self.stream([images] if alone else images, top=top, batch_size=batch_size, tta=tta))
        bad = [f"{item.source}: {item.reason}" for item in found if isinstance(item, Unreadable)]
        if bad:
            raise DataError("\n  ".join(("pictures that cannot be used:", *bad)))
        return [item for item in found if isinstance(item, Prediction)]

    def stream(
        self,
        images: Iterable[Picture | Unreadable],
        *,
        top: int = 5,
        batch_size: int = DEFAULT_BATCH,
        tta: bool = False,
    ) -> Iterator[Prediction | Unreadable]:
        """The same in order while it goes on; pictures that cannot be used are told of in their places.

        Pictures are decoded by threads while the net works on those before them.
        """
        if top < 1 or batch_size < 1:
            raise ConfigError(f"top={top} and batch_size={batch_size} must each be at least 1")
        threads = len(os.sched_getaffinity(0))
        items = prepared(images, self.header.image_size, self.header.crop, threads=threads, ahead=2 * batch_size)
        while batch := list(islice(items, batch_size)):
            pixels = [found for _, found in batch if isinstance(found, Tensor)]
            guesses = iter(self._guesses(torch.stack(pixels), top, tta) if pixels else ())
            for name, found in batch:
                yield found if isinstance(found, Unreadable) else Prediction(name, next(guesses))

    def _guesses(self, pixels: Tensor, top: int, tta: bool) -> list[tuple[Guess, ...]]:
        shares, labels = self.logits(pixels, tta=tta).softmax(dim=1).topk(min(top, len(self.class_names)), dim=1)
        return [
            tuple(Guess(self.class_names[label], label, share) for share, label in zip(*row, strict=True))
            for row in zip(shares.tolist(), labels.tolist(), strict=True)
        ]


def load_classifier(
    path: str | Path,
    *,
    checkpoint: Literal["best", "last"] = "best",
    device: Device = "auto",
) -> Classifier:
    """A net that classifies pictures.

    Args:
        path: a run's folder (path or URI), its name under ``runs/``, or an exported file (safetensors or ONNX); nothing
            in it can run.
        checkpoint: of a run.
        device: auto takes a GPU if there is one; ONNX files run on the CPU.

    Raises:
        StorageError, CheckpointError, EnvironmentProblem: as their names say.
        DataError: an old run does not tell its classes, and its data set is not there.
    """
    file = _exported_file(path)
    if file is None:
        trained = open_trained(path, checkpoint=checkpoint, device=device)
        return Classifier(trained.header, trained, trained.device)
    return open_exported(file, device)


def open_exported(file: Path, device: Device = "auto") -> Classifier:
    """The net in an exported file; arguments and errors as for `load_classifier`."""
    try:
        with file.open("rb") as opened:
            start = opened.read(16)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if start.startswith(b"PK") or file.suffix == ".pt2":
        raise CheckpointError(
            f"{file} is a program for PyTorch alone, which is not read here\n"
            "  name the run, or export it as safetensors; torch.export.load runs it, if you trust the file"
        )
    if start[8:9] == b"{":
        header, network = formats.read_safetensors(file)
        chosen = choose_device(device)
        return Classifier(header, network.to(chosen), chosen)
    if file.suffix != ".onnx":
        raise CheckpointError(
            f"{file} is no exported net: name a run's folder, or a .safetensors or .onnx file of densenet-dist export"
        )
    if device == "cuda":
        raise ConfigError(f"{file}: ONNX files run on the CPU here; use --device cpu, or another format")
    header, run = formats.read_onnx(file)
    return Classifier(header, run, torch.device("cpu"))


def _exported_file(path: str | Path) -> Path | None:
    """The exported file of that name, taken from an object store first; None where it is to be a run."""
    text = str(path)
    if is_uri(text):
        return fetch_file(text) if Path(text.partition("?")[0]).suffix in SUFFIXES else None
    local = Path(os.path.expanduser(text))
    if local.is_file() or (local.suffix in SUFFIXES and not local.is_dir()):
        return local
    return None

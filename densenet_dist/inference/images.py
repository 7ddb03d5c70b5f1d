"""Find, decode and preprocess images of any kind and size, exactly as evaluation does."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from densenet_dist.data import torch_ops
from densenet_dist.data.augment import central_windows
from densenet_dist.data.background import map_ahead
from densenet_dist.data.image_files import BadImage, decode_any, pixels_of
from densenet_dist.data.image_folder import walk
from densenet_dist.errors import DataError

ImageLike: TypeAlias = Any
"""A path, an array (H, W, 3) uint8, or a PIL image."""


@dataclass(frozen=True)
class Unreadable:
    """An unusable image.

    Attributes:
        source: its path or number.
        reason: why it cannot be used.
    """

    source: str
    reason: str


def find(arguments: Iterable[str]) -> Iterator[Path | Unreadable]:
    """Yield the files of a command line's arguments: files, and image files below folders."""
    for argument in map(os.path.expanduser, arguments):
        if os.path.isdir(argument):
            yield from _below(argument)
        else:
            yield Path(argument)


def _below(folder: str) -> Iterator[Path | Unreadable]:
    """Yield the image files below `folder`."""
    problems: list[OSError] = []
    found = False
    for place, names in walk(folder, set(), problems.append):
        found = found or bool(names)
        yield from (Path(place, name) for name in names)
    yield from (Unreadable(str(error.filename), str(error.strerror)) for error in problems)
    if not found and not problems:
        yield Unreadable(str(Path(folder)), "contains no images")


def prepare(image: ImageLike, size: int, crop: float) -> Tensor:
    """Decode an image, crop its central square and resample it.

    Args:
        image: see `ImageLike`.
        size: side in pixels.
        crop: side of the square as a share of the image's shorter side.

    Returns:
        (3, size, size) float32 pixel values, 0 to 255.

    Raises:
        BadImage: it cannot be used.
    """
    pixels = _decode(image)
    height, width = pixels.shape[1:]
    ((left, top, side, _),) = central_windows(np.array([[width, height]]), crop).tolist()
    return torch_ops.resize(pixels[:, top : top + side, left : left + side], size)


def prepared(
    images: Iterable[ImageLike | Unreadable], size: int, crop: float, *, ahead: int
) -> Iterator[tuple[str, Tensor | Unreadable]]:
    """Yield each image's name with its pixels or its problem, in order, prepared ahead by threads."""

    def make(numbered: tuple[int, ImageLike | Unreadable]) -> tuple[str, Tensor | Unreadable]:
        index, image = numbered
        if isinstance(image, Unreadable):
            return image.source, image
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {index + 1}"
        try:
            return name, prepare(image, size, crop)
        except BadImage as error:
            return name, Unreadable(name, str(error))

    yield from map_ahead(make, enumerate(images), ahead, threads=len(os.sched_getaffinity(0)))


def _decode(image: ImageLike) -> Tensor:
    """Decode an image to (3, H, W) uint8, RGB, upright."""
    if isinstance(image, str | os.PathLike):
        return decode_any(Path(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
            raise DataError(f"an array of shape {image.shape} and dtype {image.dtype}: images must be uint8 (H, W, 3)")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise DataError(f"a {type(image).__name__} is not an image: give paths, uint8 arrays (H, W, 3) or PIL images")
    return pixels_of(image)

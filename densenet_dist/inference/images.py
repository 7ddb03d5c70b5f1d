"""Find, decode and preprocess images of any kind and size, exactly as evaluation does."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from densenet_dist.data import torch_ops
from densenet_dist.data.augment import central_windows
from densenet_dist.data.background import map_ahead
from densenet_dist.data.image_files import BadImage, decode_any, pixels_of
from densenet_dist.data.image_folder import walk
from densenet_dist.errors import DataError

ImageLike: TypeAlias = Any
"""A path; (H, W, 3), (H, W, 4) or (H, W) uint8 as an array; (3 or 4, H, W) uint8 as a tensor; or a PIL image."""


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
    """Yield the files of a command line's arguments: files, image files below folders, and matches of patterns."""
    for argument in map(os.path.expanduser, arguments):
        if os.path.isdir(argument):
            yield from _below(argument)
        elif os.path.exists(argument) or not glob.has_magic(argument):
            yield Path(argument)
        elif matches := sorted(filter(os.path.isfile, glob.glob(argument, recursive=True))):
            yield from map(Path, matches)
        else:
            yield Unreadable(argument, "no file matches")


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

    with warnings.catch_warnings(action="ignore"):  # of Pillow
        yield from map_ahead(make, enumerate(images), ahead, threads=len(os.sched_getaffinity(0)))


def _decode(image: ImageLike) -> Tensor:
    """Decode an image to (3, H, W) uint8, RGB, upright."""
    if isinstance(image, str | os.PathLike):
        return decode_any(Path(image))
    if isinstance(image, Tensor | np.ndarray):
        array: Any = image
        if isinstance(image, Tensor) and image.ndim == 3 and image.dtype == torch.uint8:
            array = image.permute(1, 2, 0).cpu().numpy()
        elif image.shape[2:] == (1,):
            array = image[:, :, 0]
        # Other tensors keep a dtype that is not NumPy's.
        if array.dtype != np.uint8 or 0 in array.shape or not (array.ndim == 2 or array.shape[2:] in ((3,), (4,))):
            raise DataError(
                f"an image of shape {tuple(image.shape)} and dtype {image.dtype}: arrays must be uint8 and (H, W, 3), "
                "(H, W, 4) or (H, W), tensors uint8 and (3, H, W) or (4, H, W)"
            )
        image = Image.fromarray(array)
    if not hasattr(image, "convert"):
        raise DataError(f"a {type(image).__name__} is not an image: give paths, uint8 arrays (H, W, 3) or PIL images")
    return pixels_of(image)

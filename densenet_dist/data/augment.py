"""Augmentation parameters of every image, as pure functions of (seed, epoch, dataset index).

The engines only apply these numbers, so torch and DALI give the same images for any number of ranks, also on resuming.
In this order: a window of an image file is resized to a square, tones are changed (`trivial_augment`), one bilinear
warp does everything geometric, the result is normalized, a hole is cut, and pairs of images are mixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from densenet_dist.data import trivial_augment
from densenet_dist.data.plan import Stream, random_words, unit_floats
from densenet_dist.errors import ConfigError

GEOMETRIES = ("none", "notebook", "crop_flip", "random_resized_crop")

Padding = Literal["border", "zeros"]
_Draws = npt.NDArray[np.float64]

ROTATION_DEGREES = 20.0  # Keras: rotation_range=20
SHIFT_FRACTION = 0.125  # Keras: width_shift_range=height_shift_range=0.125
ZOOM_FRACTION = 0.1  # Keras: zoom_range=0.10, so factors in [0.9, 1.1]
CROP_PADDING = 4  # pixels on each side, He et al. 2016, section 4.2
CROP_RATIO = 4 / 3  # random resized crop: sides within 3:4 and 4:3, Szegedy et al. 2015, section 6
CROP_ATTEMPTS = 10  # as in torchvision
EVAL_CROP = 0.875  # of the shorter side, with random_resized_crop: 224 of 256, as for ImageNet


@dataclass(frozen=True)
class Augmentation:
    """The augmentations, in any combination; `flip` and `crop_scale` apply to the geometries that use them.

    Attributes:
        geometry: one of `GEOMETRIES`; or a function that maps draws (n, 6) in [0, 1) to a matrix (n, 2, 2) and an
            offset (n, 2), see `Parameters.affine`. With an alternating flip, flip where the last draw is below 0.5.
        trivial_augment: whether to apply one of TrivialAugment's operations to each image.
        cutout: side in pixels of the square hole (DeVries & Taylor 2017); 0 for none.
        mixup: alpha of Beta(alpha, alpha) for the share of the image itself (Zhang et al. 2018); 0 for none.
        cutmix: likewise, for the area outside of a box from another image (Yun et al. 2019). With both, each image gets
            one of them, with equal probability.
        crop_scale: smallest share of the area that a random resized crop shows.
        flip: random; or alternating: drawn for the first epoch, and the opposite in every other epoch (Jordan 2024,
            arXiv:2404.00498, section 3.6), so that two epochs show each image both ways.
    """

    geometry: str | Callable[[_Draws], Any] = "none"
    trivial_augment: bool = False
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    crop_scale: float = 0.08
    flip: Literal["random", "alternating"] = "random"

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that targets are probabilities."""
        return self.mixup > 0 or self.cutmix > 0


NO_AUGMENTATION = Augmentation()


@dataclass(frozen=True, eq=False)
class Parameters:
    """The operations on each of n images: arrays with one row per image, or None for operations that are not used.

    Attributes:
        window: (n, 4) int64: left, top, width, height of the part of an image file that is shown.
        affine: (n, 2, 3) float32 [A | b]: maps an output pixel to the position in the input that it shows, in pixels
            (x, y) from the center: `input = A @ output + b`.
        tone: (n,) int64, a `trivial_augment.Tone`.
        strength: (n,) float32: factor, bit mask or threshold of the tone operation.
        hole: (n, 4) int64: left, top, right, bottom of the part that becomes zero after normalization.
        blend: (n,) float32: share of the image itself in each pixel; the rest is its partner's.
        box: (n, 4) int64: left, top, right, bottom of the part that is entirely the partner's.
        label_share: (n,) float32: share of the image's own label in the target.
        padding: what the warp shows outside of the image: its border repeated, or zeros (black).
    """

    window: Any = None
    affine: Any = None
    tone: Any = None
    strength: Any = None
    hole: Any = None
    blend: Any = None
    box: Any = None
    label_share: Any = None
    padding: Padding = "border"

    def map(self, function: Callable[[Any], Any]) -> Parameters:
        """Apply `function` to every array, for instance to select rows."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "padding"}
        return replace(self, **{name: function(array) for name, array in arrays.items() if array is not None})


class _Warp(NamedTuple):
    """`Parameters.affine` before rounding: matrix (n, 2, 2) and offset (n, 2), float64."""

    matrix: _Draws
    offset: _Draws
    padding: Padding


def draw(
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    num_images: int,
    image_size: int,
    sizes: npt.NDArray[np.int64] | None = None,
) -> Parameters:
    """Draw the parameters of images 0 .. num_images - 1 in `epoch`: dataset indices, or positions if balanced.

    Image i has its own draws in each stream, so its parameters depend on (seed, epoch, i) alone: not on the number of
    images, and not on the order or batch in which it is seen.

    Args:
        image_size: side of the square images in pixels.
        sizes: (n, 2) int64, width and height of image files; None for images in memory, which are square.
    """

    def uniform(stream: Stream, draws: int, epoch: int = epoch) -> _Draws:
        words = random_words(num_images * draws, seed=seed, stream=stream, epoch=epoch)
        return unit_floats(words).reshape(num_images, draws)

    def geometric() -> _Draws:
        drawn = uniform(Stream.AUGMENTATION, 6)  # the last one decides on the flip, see `_flip_sign`
        if augmentation.flip == "alternating":
            flipped_first = uniform(Stream.AUGMENTATION, 6, epoch=0)[:, 5] < 0.5
            drawn[:, 5] = np.where(flipped_first == (epoch % 2 == 0), 0.0, 0.5)  # flip, else do not
        return drawn

    if isinstance(augmentation.geometry, str) and augmentation.geometry not in GEOMETRIES:
        raise ConfigError(f"data.augment={augmentation.geometry!r} must be one of {', '.join(GEOMETRIES)}")
    arrays: dict[str, Any] = {"window": None if sizes is None else central_windows(sizes)}
    warp: _Warp | None = None
    if not isinstance(augmentation.geometry, str):
        warp = _custom(augmentation.geometry, geometric())
    elif augmentation.geometry == "notebook":
        warp = _notebook(geometric(), image_size)
    elif augmentation.geometry == "crop_flip":
        warp = _crop_flip(geometric())
    elif augmentation.geometry == "random_resized_crop":
        shown = np.full((num_images, 2), image_size) if sizes is None else sizes
        windows = random_windows(shown, seed, epoch, augmentation.crop_scale)
        if sizes is not None:  # a file is cropped while it is resized, so the warp only flips
            arrays["window"], windows = windows, np.array([[0, 0, image_size, image_size]])
        warp = _enlarge(windows, _flip_sign(geometric()), image_size)
    if augmentation.trivial_augment:
        drawn = trivial_augment.draw(uniform(Stream.TRIVIAL_AUGMENT, 3), image_size)
        warp = _compose(drawn, warp)
        arrays |= {"tone": drawn.tone, "strength": drawn.strength}
    if warp is not None:
        affine = np.concatenate([warp.matrix, warp.offset[:, :, None]], axis=2).astype(np.float32)
        arrays |= {"affine": affine, "padding": warp.padding}
    if augmentation.cutout > 0:
        arrays["hole"] = _boxes(uniform(Stream.CUTOUT, 2), np.full(num_images, augmentation.cutout), image_size)
    if augmentation.mixes:
        mixing = _mix(augmentation, uniform(Stream.MIX, 4), image_size)
        arrays["blend"], arrays["box"], arrays["label_share"] = mixing
    return Parameters(**arrays)


def evaluation_parameters(geometry: str, sizes: npt.NDArray[np.int64] | None) -> Parameters:
    """Return the parameters for evaluation: a central square crop of image files of these sizes, and nothing else.

    After training with random_resized_crop, which enlarges objects, its side is `EVAL_CROP` of the shorter side.
    """
    if sizes is None:
        return Parameters()
    return Parameters(window=central_windows(sizes, EVAL_CROP if geometry == "random_resized_crop" else 1.0))


def central_windows(sizes: npt.NDArray[np.int64], share: float = 1.0) -> npt.NDArray[np.int64]:
    """Return the largest central square of images of these sizes (n, 2), or `share` of its side: (n, 4) int64."""
    side = np.maximum(1, np.rint(sizes.min(axis=1) * share).astype(np.int64))[:, None]
    return np.concatenate([(sizes - side) // 2, side, side], axis=1)


def random_windows(sizes: npt.NDArray[np.int64], seed: int, epoch: int, smallest: float) -> npt.NDArray[np.int64]:
    """Draw windows (n, 4) int64 of images of these sizes: a random resized crop (Szegedy et al. 2015, section 6).

    As in torchvision: up to ten attempts at a window of between `smallest` and all of the area, with an aspect ratio
    between 3:4 and 4:3; if none fits, the largest central window with such a ratio.
    """
    count = len(sizes)
    width, height = sizes.T.astype(np.float64)
    most = np.minimum(sizes, np.rint(sizes[:, ::-1] * CROP_RATIO).astype(np.int64))
    windows = np.concatenate([(sizes - most) // 2, most], axis=1)
    waiting = np.arange(count)
    for attempt in range(CROP_ATTEMPTS):
        words = random_words(4 * count, seed=seed, stream=Stream.RESIZED_CROP, epoch=epoch * CROP_ATTEMPTS + attempt)
        share, ratio, left, top = unit_floats(words).reshape(count, 4)[waiting].T
        area = width[waiting] * height[waiting] * (smallest + (1.0 - smallest) * share)
        root = CROP_RATIO ** (ratio - 0.5)  # square root of a log-uniform aspect ratio
        side = np.rint(np.sqrt(area)[:, None] * np.stack([root, 1.0 / root], axis=1)).astype(np.int64)
        room = sizes[waiting] - side
        fits = (side >= 1).all(axis=1) & (room >= 0).all(axis=1)
        corner = np.floor(np.stack([left, top], axis=1) * (room + 1)).astype(np.int64)
        windows[waiting[fits]] = np.concatenate([corner, side], axis=1)[fits]
        waiting = waiting[~fits]
        if len(waiting) == 0:
            break
    return windows


def _notebook(draws: _Draws, image_size: int) -> _Warp:
    """Warp as Keras' `ImageDataGenerator` with the notebook's settings does, from draws (n, 6) in [0, 1).

    A = R(theta) diag(zx, zy) diag(+-1, 1) and b = R(theta) (tx, ty), with R = [[cos, -sin], [sin, cos]]: Keras warps
    by rotation @ shift @ zoom about the center (`apply_affine_transform`) and flips last.
    """
    signed = 2.0 * draws[:, :5] - 1.0
    angle = np.deg2rad(ROTATION_DEGREES * signed[:, 0])
    shift = SHIFT_FRACTION * image_size * signed[:, 1:3]
    zoom = 1.0 + ZOOM_FRACTION * signed[:, 3:5]
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.stack([cos, -sin, sin, cos], axis=1).reshape(-1, 2, 2)
    matrix = rotation * zoom[:, None, :]
    matrix[:, :, 0] *= _flip_sign(draws)[:, None]
    return _Warp(matrix, np.einsum("nij,nj->ni", rotation, shift), "border")


def _crop_flip(draws: _Draws) -> _Warp:
    """Pad with 4 black pixels, crop at random to the original size, and flip, from draws (n, 6).

    A crop at (left, top) of the padded image is a shift by a whole number of pixels, left - 4 and top - 4.
    """
    matrix = np.zeros((len(draws), 2, 2))
    matrix[:, 0, 0] = _flip_sign(draws)
    matrix[:, 1, 1] = 1.0
    corner = np.floor(draws[:, 1:3] * (2 * CROP_PADDING + 1))
    return _Warp(matrix, corner - CROP_PADDING, "zeros")


def _custom(function: Callable[[_Draws], Any], draws: _Draws) -> _Warp:
    """Warp by a user's function; draws and results are those of `Augmentation.geometry`."""
    count = len(draws)
    matrix, offset = (np.asarray(found, dtype=np.float64) for found in function(draws))
    if (matrix.shape, offset.shape) != ((count, 2, 2), (count, 2)) or not np.isfinite(matrix.sum() + offset.sum()):
        raise ConfigError(
            f"data.augment: the function must return a finite matrix ({count}, 2, 2) and offset ({count}, 2) for "
            f"{count} images, not {matrix.shape} and {offset.shape}"
        )
    return _Warp(matrix, offset, "border")


def _enlarge(windows: npt.NDArray[np.int64], flip: _Draws, image_size: int) -> _Warp:
    """Resize windows (n or 1, 4) of square images to the image size, and flip those where `flip` (n,) is -1."""
    matrix = np.zeros((len(flip), 2, 2))
    matrix[:, 0, 0] = windows[:, 2] / image_size * flip
    matrix[:, 1, 1] = windows[:, 3] / image_size
    center = windows[:, :2] + windows[:, 2:] / 2 - image_size / 2
    return _Warp(matrix, np.broadcast_to(center, (len(flip), 2)), "border")


def _flip_sign(draws: _Draws) -> _Draws:
    """Return -1 to mirror an image left to right, else 1, (n,) float64."""
    return np.where(draws[:, 5] < 0.5, -1.0, 1.0)


def _compose(drawn: trivial_augment.Drawn, warp: _Warp | None) -> _Warp:
    """Combine two warps: TrivialAugment's is applied first, then `warp`."""
    if warp is None:
        return _Warp(drawn.matrix, drawn.offset, "zeros")
    offset = np.einsum("nij,nj->ni", drawn.matrix, warp.offset) + drawn.offset
    return _Warp(drawn.matrix @ warp.matrix, offset, warp.padding)


def _boxes(draws: _Draws, side: npt.NDArray[Any], image_size: int) -> npt.NDArray[np.int64]:
    """Return squares of `side` (n,) pixels around a random pixel, clipped: (n, 4) left, top, right, bottom."""
    corner = np.floor(draws * image_size).astype(np.int64) - (side[:, None] // 2).astype(np.int64)
    far = corner + side[:, None].astype(np.int64)
    return np.concatenate([corner, far], axis=1).clip(0, image_size)


def _mix(
    augmentation: Augmentation, draws: _Draws, image_size: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return `Parameters.blend`, `box` and `label_share` from draws (n, 4): choice, share, center of the box."""
    if augmentation.mixup > 0 and augmentation.cutmix > 0:
        cut = draws[:, 0] < 0.5
    else:
        cut = np.full(len(draws), augmentation.cutmix > 0)
    share = np.empty(len(draws))
    share[~cut] = _beta(augmentation.mixup, draws[~cut, 1])
    share[cut] = _beta(augmentation.cutmix, draws[cut, 1])
    side = np.where(cut, np.floor(image_size * np.sqrt(1.0 - share)), 0.0)
    box = _boxes(draws[:, 2:], side, image_size)
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    label_share = np.where(cut, 1.0 - area / image_size**2, share)
    return np.where(cut, 1.0, share).astype(np.float32), box, label_share.astype(np.float32)


def _beta(alpha: float, draws: _Draws) -> _Draws:
    """Draw from Beta(alpha, alpha) by inversion: one uniform draw gives one number, whatever alpha is."""
    if alpha == 1.0 or len(draws) == 0:
        return draws
    from scipy.special import betaincinv

    return np.asarray(betaincinv(alpha, alpha, draws))

"""The augmentation written plainly in NumPy, float64, one image at a time: what both engines are held to.

Slow, and meant to be read. `densenet_dist.data.augment` says where the numbers come from, this module what they do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from densenet_dist.data.augment import Padding, Parameters
from densenet_dist.data.trivial_augment import Tone

Image = npt.NDArray[np.float64]  # (H, W, 3) grey levels, [0, 255]


def augment_image(
    image: npt.NDArray[np.generic], todo: Parameters, mean: Sequence[float], std: Sequence[float]
) -> Image:
    """One image as a loader makes it: resized, tones changed, warped, normalised, a hole cut; not mixed.

    Args:
        image: (h, w, 3) grey levels, [0, 255]; square unless `todo` has a window.
        todo: one image's row of each array.
        mean: of each channel, for images in [0, 1].
        std: likewise.

    Returns:
        (H, W, 3) float64, normalised.
    """
    pixels = image.astype(np.float64)
    if todo.tone is not None:
        pixels = change_tone(pixels, Tone(int(todo.tone)), float(todo.strength))
    if todo.affine is not None:
        pixels = warp(pixels, todo.affine.astype(np.float64), todo.padding)
    pixels = (pixels / 255.0 - np.array(mean, dtype=np.float64)) / np.array(std, dtype=np.float64)
    if todo.hole is not None:
        left, top, right, bottom = todo.hole
        pixels[top:bottom, left:right] = 0.0
    return pixels


def shrink_or_enlarge(image: npt.NDArray[np.generic], window: Sequence[int], size: int) -> Image:
    """The `window` (left, top, width, height) of a picture resampled to a square of `size` pixels.

    Each output pixel is the mean of the input under a triangle as wide as two output pixels, or two input pixels where
    it enlarges; beyond the window its border goes on.
    """
    left, top, width, height = window
    part = image[top : top + height, left : left + width].astype(np.float64)
    resampled: Image = np.einsum(
        "yh,hwc,xw->yxc", _triangles(height, size), part, _triangles(width, size), optimize=True
    )
    return resampled


def _triangles(length: int, size: int) -> npt.NDArray[np.float64]:
    """(size, length): the weight of each input pixel in each output pixel."""
    scale = length / size
    reach = max(scale, 1.0)
    weights = np.zeros((size, length))
    for out in range(size):
        middle = (out + 0.5) * scale
        taps = np.arange(int(np.floor(middle - reach)) - 1, int(np.ceil(middle + reach)) + 1)
        heights = np.maximum(0.0, 1.0 - np.abs(taps + 0.5 - middle) / reach)
        np.add.at(weights[out], taps.clip(0, length - 1), heights / heights.sum())
    return weights


def warp(image: Image, affine: npt.NDArray[np.float64], padding: Padding) -> Image:
    """Each output pixel is the input at `A @ (x, y) + b` from the centre, interpolated between its four neighbours."""
    size = len(image)
    centre = (size - 1) / 2
    out = np.empty_like(image)
    for y in range(size):
        for x in range(size):
            at = affine[:, :2] @ (x - centre, y - centre) + affine[:, 2] + centre
            near = np.floor(at).astype(int)
            share_x, share_y = at - near
            total = np.zeros(3)
            for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
                weight = (share_x if dx else 1.0 - share_x) * (share_y if dy else 1.0 - share_y)
                total += weight * _pixel(image, near[0] + dx, near[1] + dy, padding)
            out[y, x] = total
    return out


def _pixel(image: Image, x: int, y: int, padding: Padding) -> npt.NDArray[np.float64]:
    last = len(image) - 1
    if padding == "zeros" and not (0 <= x <= last and 0 <= y <= last):
        return np.zeros(3)
    pixel: npt.NDArray[np.float64] = image[min(max(y, 0), last), min(max(x, 0), last)]
    return pixel


def change_tone(image: Image, tone: Tone, strength: float) -> Image:
    """What `trivial_augment.Tone` says, clipped to [0, 255], not rounded."""
    grey = image @ (0.299, 0.587, 0.114)
    if tone == Tone.BRIGHTNESS:
        image = image * strength
    elif tone == Tone.COLOR:
        image = _between(grey[:, :, None], image, strength)
    elif tone == Tone.CONTRAST:
        image = _between(grey.mean(), image, strength)
    elif tone == Tone.SHARPNESS:
        image = _between(_smooth(image), image, strength)
    elif tone == Tone.POSTERIZE:
        image = (np.floor(image + 0.5).astype(int) & int(strength)).astype(float)
    elif tone == Tone.SOLARIZE:
        image = np.where(image >= strength, 255.0 - image, image)
    elif tone == Tone.AUTOCONTRAST:
        image = np.stack([_stretched(image[:, :, channel]) for channel in range(3)], axis=2)
    elif tone == Tone.EQUALIZE:
        image = np.stack([_equalized(image[:, :, channel]) for channel in range(3)], axis=2)
    return image.clip(0.0, 255.0)


def _between(zero: npt.NDArray[np.float64] | np.float64, one: Image, strength: float) -> Image:
    """`zero` at strength 0, `one` at 1, and on in the same direction beyond."""
    return zero + (one - zero) * strength


def _smooth(image: Image) -> Image:
    smooth = image.copy()
    total = sum(
        image[1 + dy : len(image) - 1 + dy, 1 + dx : len(image) - 1 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)
    )
    smooth[1:-1, 1:-1] = (total + 4.0 * image[1:-1, 1:-1]) / 13.0
    return smooth


def _stretched(channel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    low, high = channel.min(), channel.max()
    if low == high:
        return channel
    stretched: npt.NDArray[np.float64] = (channel - low) * 255.0 / (high - low)
    return stretched


def _equalized(channel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    levels = np.floor(channel + 0.5).astype(int)
    up_to = np.bincount(levels.ravel(), minlength=256).cumsum()
    lowest = up_to[levels.min()]
    if lowest == levels.size:
        return levels.astype(float)
    # In float32, like OpenCV: in float64 a half would now and then be rounded to the other side.
    table = np.rint((up_to - lowest).astype(np.float32) * (np.float32(255.0) / np.float32(levels.size - lowest)))
    equalized: npt.NDArray[np.float64] = table.astype(np.float64)[levels]
    return equalized

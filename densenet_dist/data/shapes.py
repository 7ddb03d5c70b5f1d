"""`shapes`: a generated data set of 32x32 RGB images in ten classes, made in seconds from a seed, without a download.

An image shows one large shape at a random position, size, angle and color, light on dark or dark on light, on a
striped and mottled background with strokes, dots and noise. The class is the shape alone: no pixel, color or position
reveals it, so a linear classifier on pixels learns almost nothing, while a small convolutional network learns it in
minutes.

The images are the same on every machine, except that a few pixels may be rounded to the next gray level.

Shapes are signed distance functions after Inigo Quilez, https://iquilezles.org/articles/distfunctions2d.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from densenet_dist.data.plan import Stream, random_words, unit_floats

IMAGE_SIZE = 32
TRAIN_IMAGES = 10_000
TEST_IMAGES = 2_000
MEAN = (0.5, 0.5, 0.5)  # of every channel, whatever the seed: colors, and light and dark, are symmetric
STD = (0.315, 0.315, 0.315)

Field = npt.NDArray[np.floating]  # float32, one number per pixel of each image, (n, 32, 32)

_CHUNK = 250  # images drawn at once, so that their fields fit into a core's cache
_CLUTTER = 8  # strokes and dots in an image, half of each
_MOTTLE = 5  # side of the coarse grid from which the background is interpolated
_NOISE = 0.08  # maximum, as a share of the full scale
_SCALARS = 17 + 8 * _CLUTTER + 3 * _MOTTLE**2  # random numbers per image, without its noise
_NOISE_WORDS = IMAGE_SIZE**2 * 3 // 8


def generate(count: int, *, seed: int, part: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Generate the first `count` images of a part, (count, 32, 32, 3) uint8, and their labels, (count,) int64.

    Image i depends on (seed, part, i) alone and has class i mod 10. The parts are 0, training, and 1, test.
    """
    labels = np.arange(count, dtype=np.int64) % len(CLASS_NAMES)
    words = random_words(count * (_SCALARS + _NOISE_WORDS), seed=seed, stream=Stream.SHAPES, epoch=part)
    words = words.reshape(count, _SCALARS + _NOISE_WORDS)
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for start in range(0, count, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        images[chunk] = _draw(labels[chunk], words[chunk])
    return images, labels


def _draw(labels: npt.NDArray[np.int64], words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """Draw images (n, 32, 32, 3) uint8 of the classes `labels` (n,) from random words (n, m)."""
    draws = _Draws(unit_floats(words[:, :_SCALARS]).astype(np.float32))
    dark, light = draws.take(3, 0.0, 0.4), draws.take(3, 0.6, 1.0)
    negative = draws.take(1, 0.0, 1.0) < 0.5
    ground, ink = np.where(negative, dark, light), np.where(negative, light, dark)
    canvas = _background(draws, ground)
    for index in range(_CLUTTER):
        canvas = _blend(canvas, *_stroke(draws, is_dot=index % 2 == 1))
    canvas = _blend(canvas, _shape(draws, labels), ink)
    noise = np.ascontiguousarray(words[:, _SCALARS:]).view(np.uint8).reshape(canvas.shape)
    canvas += (noise.astype(np.float32) - 127.5) * (_NOISE / 127.5)
    return (canvas.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)


class _Draws:
    """Gives the columns of (n, m) float32 numbers in [0, 1), each once."""

    def __init__(self, values: Field) -> None:
        self._values = values
        self._used = 0

    def take(self, columns: int, low: float, high: float) -> Field:
        """Return the next columns, (n, columns) float32, uniform in [low, high)."""
        values = self._values[:, self._used : self._used + columns]
        self._used += columns
        return values * (high - low) + low


def _local(center: Field, angle: Field, scale: Field) -> tuple[Field, Field]:
    """Return x and y of every pixel, (n, 32, 32) each, in a shape's coordinates: from its center, rotated, scaled.

    The center (n, 2) and the scale (n, 1) are in pixels, the angle (n, 1) is in radians.
    """
    pixels = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    x = ((pixels - center[:, :1]) / scale)[:, None, :]
    y = ((pixels - center[:, 1:]) / scale)[:, :, None]
    cos, sin = np.cos(angle)[:, :, None], np.sin(angle)[:, :, None]
    return cos * x + sin * y, cos * y - sin * x


def _cover(distance: Field) -> Field:
    """Return the share of each pixel that a shape covers, from the signed distance to its edge in pixels."""
    return (-distance + 0.5).clip(0.0, 1.0)


def _blend(canvas: Field, cover: Field, color: Field) -> Field:
    """Paint a color (n, 3) over a canvas (n, 3, 32, 32), as far as `cover` (n, 32, 32) is above 0."""
    return canvas + cover[:, None] * (color[:, :, None, None] - canvas)


def _background(draws: _Draws, ground: Field) -> Field:
    """Draw canvases (n, 3, 32, 32) of a ground color (n, 3), mottled and striped."""
    grid = draws.take(3 * _MOTTLE**2, -0.2, 0.2).reshape(-1, 3, _MOTTLE, _MOTTLE)
    positions = np.linspace(0.0, _MOTTLE - 1.0, IMAGE_SIZE, dtype=np.float32)
    weights = np.clip(1.0 - np.abs(positions[:, None] - np.arange(_MOTTLE, dtype=np.float32)), 0.0, 1.0)
    mottle: Field = np.einsum("ia,ncab,jb->ncij", weights, grid, weights, optimize=True)
    period, angle, phase = draws.take(1, 4.0, 16.0), draws.take(1, 0.0, math.pi), draws.take(1, 0.0, 2.0 * math.pi)
    across, _ = _local(np.zeros((len(ground), 2), dtype=np.float32), angle, period)
    stripes = np.sin(across * (2.0 * math.pi) + phase[:, :, None])
    tint = draws.take(3, -0.15, 0.15)
    return ground[:, :, None, None] + mottle + stripes[:, None] * tint[:, :, None, None]


def _stroke(draws: _Draws, *, is_dot: bool) -> tuple[Field, Field]:
    """Draw the cover (n, 32, 32) and color (n, 3) of a short round-ended stroke, or of a dot."""
    center, angle = draws.take(2, 0.0, IMAGE_SIZE), draws.take(1, 0.0, math.pi)
    half_length, radius = draws.take(1, 2.0, 5.0)[:, :, None], draws.take(1, 0.5, 1.2)[:, :, None]
    x, y = _local(center, angle, np.ones_like(angle))
    if not is_dot:
        x = np.maximum(np.abs(x) - half_length, 0.0)
    return _cover(_length(x, y) - radius), draws.take(3, 0.0, 1.0)


def _shape(draws: _Draws, labels: npt.NDArray[np.int64]) -> Field:
    """Draw the cover (n, 32, 32) of the shapes of classes `labels` (n,), each entirely inside its image."""
    radius, angle = draws.take(1, 7.0, 12.0), draws.take(1, 0.0, 2.0 * math.pi)
    center = draws.take(2, -1.0, 1.0) * (-radius + IMAGE_SIZE / 2) + IMAGE_SIZE / 2
    x, y = _local(center, angle, radius)
    distance = np.empty_like(x)
    for label, distance_to in enumerate(_SHAPES.values()):
        chosen = labels == label
        distance[chosen] = distance_to(x[chosen], y[chosen])
    return _cover(distance * radius[:, :, None])


# The shapes: signed distance to the edge, negative inside, of a shape of about unit radius.


def _length(x: Field, y: Field) -> Field:
    return np.sqrt(x * x + y * y)


def _box(x: Field, y: Field, half_width: float, half_height: float) -> Field:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _star(x: Field, y: Field) -> Field:
    # Fold the plane into half of one of the five points; its edge is then one line, from the tip (1, 0) to the notch.
    sector = 2.0 * math.pi / 5.0
    angle = np.abs((np.arctan2(x, y) + sector / 2.0) % sector - sector / 2.0)
    radius = _length(x, y)
    notch_x, notch_y = 0.42 * math.cos(sector / 2.0), 0.42 * math.sin(sector / 2.0)
    edge = math.hypot(notch_y, 1.0 - notch_x)
    return ((radius * np.cos(angle) - 1.0) * notch_y + radius * np.sin(angle) * (1.0 - notch_x)) / edge


_SHAPES: dict[str, Callable[[Field, Field], Field]] = {
    "circle": lambda x, y: _length(x, y) - 0.85,
    "ring": lambda x, y: np.abs(_length(x, y) - 0.8) - 0.2,
    "semicircle": lambda x, y: np.maximum(_length(x, y - 0.4) - 1.0, y - 0.4),
    "triangle": lambda x, y: np.maximum(np.abs(x) * math.sqrt(0.75) + y * 0.5, -y) - 0.5,
    "square": lambda x, y: _box(x, y, 0.7, 0.7),
    "frame": lambda x, y: np.abs(_box(x, y, 0.6, 0.6)) - 0.16,
    "bar": lambda x, y: _box(x, y, 1.0, 0.3),
    "cross": lambda x, y: np.minimum(_box(x, y, 1.0, 0.28), _box(x, y, 0.28, 1.0)),
    "star": _star,
    "ell": lambda x, y: np.minimum(_box(x + 0.45, y, 0.28, 0.85), _box(x, y - 0.57, 0.73, 0.28)),
}
CLASS_NAMES = tuple(_SHAPES)

"""TrivialAugment (Müller & Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021).

Each image gets one operation, drawn evenly from fourteen, at one of 31 strengths, drawn evenly; the space is the
paper's "wide" one, as in torchvision's `TrivialAugmentWide`. Shear, translation and rotation become part of the one
warp that an image gets anyway, so they are bilinear (the paper's are nearest) and cost nothing more. The others change
tones, and the loaders apply them to the grey levels before the warp, without rounding in between.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

STRENGTHS = 31
MAX_SHEAR = 0.99
MAX_SHIFT = 32.0  # pixels, whatever the image's size
MAX_DEGREES = 135.0
MAX_CHANGE = 0.99  # of brightness, colour, contrast, sharpness: factors in [0.01, 1.99]


class Tone(IntEnum):
    """What is done to an image's tones; the meaning of its strength."""

    NONE = 0
    BRIGHTNESS = 1
    """Grey levels times the strength."""
    COLOR = 2
    """From its grey version (0) through itself (1) to more colourful (above)."""
    CONTRAST = 3
    """From the mean grey level of the whole image (0) through itself (1) to more contrast."""
    SHARPNESS = 4
    """From its smoothed version (0) through itself (1) to sharper; border pixels stay."""
    POSTERIZE = 5
    """Grey levels, as 8-bit integers, and this bit mask."""
    SOLARIZE = 6
    """Grey levels of at least the strength are inverted."""
    AUTOCONTRAST = 7
    """Each channel stretched to [0, 255]; a constant one stays."""
    EQUALIZE = 8
    """Each channel's histogram, of 8-bit integers, made flat."""


class Drawn(NamedTuple):
    """One operation for each image.

    Attributes:
        matrix: (n, 2, 2) float64, of the warp from output to input in pixels about the centre.
        offset: (n, 2) float64.
        tone: (n,) int64, a `Tone`.
        strength: (n,) float32.
    """

    matrix: Array
    offset: Array
    tone: npt.NDArray[np.int64]
    strength: npt.NDArray[np.float32]


def draw(draws: Array, image_size: int) -> Drawn:
    """The operations that draws (n, 3) in [0, 1) stand for: which one, how strong, which sign."""
    count = len(draws)
    level = np.floor(draws[:, 1] * STRENGTHS) / (STRENGTHS - 1)  # 0, 1/30 .. 1
    signed = np.where(draws[:, 2] < 0.5, -level, level)
    unmoved = np.tile(np.eye(2), (count, 1, 1)), np.zeros((count, 2))
    drawn = Drawn(*unmoved, np.zeros(count, np.int64), np.zeros(count, np.float32))
    chosen = np.floor(draws[:, 0] * len(OPERATIONS)).astype(np.int64)
    for number, operation in enumerate(OPERATIONS.values()):
        rows = np.flatnonzero(chosen == number)
        operation(drawn, rows, level[rows], signed[rows], image_size)
    return drawn


_Operation = Callable[[Drawn, npt.NDArray[np.int64], Array, Array, int], None]


def _shear(axis: int) -> _Operation:
    def shear(drawn: Drawn, rows: npt.NDArray[np.int64], level: Array, signed: Array, image_size: int) -> None:
        # About the upper left corner, as in the paper's code.
        drawn.matrix[rows, axis, 1 - axis] = MAX_SHEAR * signed
        drawn.offset[rows, axis] = MAX_SHEAR * signed * image_size / 2

    return shear  # fmt: skip


def _translate(axis: int) -> _Operation:
    def translate(drawn: Drawn, rows: npt.NDArray[np.int64], level: Array, signed: Array, image_size: int) -> None:
        drawn.offset[rows, axis] = np.trunc(MAX_SHIFT * signed)  # whole pixels, as in the paper's code

    return translate  # fmt: skip


def _rotate(drawn: Drawn, rows: npt.NDArray[np.int64], level: Array, signed: Array, image_size: int) -> None:
    angle = np.deg2rad(MAX_DEGREES * signed)
    drawn.matrix[rows] = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], 1).reshape(-1, 2, 2)


def _change(tone: Tone, strength: Callable[[Array, Array], Array]) -> _Operation:
    def change(drawn: Drawn, rows: npt.NDArray[np.int64], level: Array, signed: Array, image_size: int) -> None:
        drawn.tone[rows] = tone
        drawn.strength[rows] = strength(level, signed)

    return change  # fmt: skip


def _factor(level: Array, signed: Array) -> Array:
    return 1.0 + MAX_CHANGE * signed


OPERATIONS: dict[str, _Operation] = {
    "identity": lambda *_: None,
    "shear_x": _shear(0),
    "shear_y": _shear(1),
    "translate_x": _translate(0),
    "translate_y": _translate(1),
    "rotate": _rotate,
    "brightness": _change(Tone.BRIGHTNESS, _factor),
    "color": _change(Tone.COLOR, _factor),
    "contrast": _change(Tone.CONTRAST, _factor),
    "sharpness": _change(Tone.SHARPNESS, _factor),
    "posterize": _change(Tone.POSTERIZE, lambda level, signed: 256.0 - 2.0 ** np.rint(6.0 * level)),  # 8 to 2 bits
    "solarize": _change(Tone.SOLARIZE, lambda level, signed: 255.0 * (1.0 - level)),
    "autocontrast": _change(Tone.AUTOCONTRAST, lambda level, signed: level * 0.0),
    "equalize": _change(Tone.EQUALIZE, lambda level, signed: level * 0.0),
}
"""In torchvision's order."""

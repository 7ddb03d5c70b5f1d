"""TrivialAugment (Müller & Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation", ICCV 2021).

Each image gets one of fourteen operations, at one of 31 strengths, both drawn uniformly; the space is the paper's
"wide" one, as in torchvision's `TrivialAugmentWide`. Shear, translation and rotation become part of the one warp that
an image gets anyway, so they are bilinear (in the paper: nearest) and cost nothing extra. The others change tones,
before the warp and without rounding in between.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

STRENGTHS = 31
MAX_SHEAR = 0.99
MAX_SHIFT = 32.0  # pixels, whatever the image size
MAX_DEGREES = 135.0
MAX_CHANGE = 0.99  # of brightness, color, contrast, sharpness: factors in [0.01, 1.99]
OPERATIONS = (  # in torchvision's order
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast"),
    *("sharpness", "posterize", "solarize", "autocontrast", "equalize"),
)


class Tone(IntEnum):
    """The operation on an image's tones; the comments give the meaning of its strength."""

    NONE = 0
    BRIGHTNESS = 1  # gray levels are multiplied by the strength
    COLOR = 2  # from the gray version (0) through the image itself (1) to more color
    CONTRAST = 3  # from the mean gray level of the whole image (0) through itself (1) to more contrast
    SHARPNESS = 4  # from the smoothed version (0) through itself (1) to more sharpness; border pixels stay
    POSTERIZE = 5  # bit mask of the gray levels as 8-bit integers
    SOLARIZE = 6  # gray levels of at least the strength are inverted
    AUTOCONTRAST = 7  # each channel is stretched to [0, 255]; a constant one stays
    EQUALIZE = 8  # the histogram of each channel, of 8-bit integers, is made flat


class Drawn(NamedTuple):
    """One operation for each image.

    Attributes:
        matrix: (n, 2, 2) float64, of the warp from output to input in pixels from the center.
        offset: (n, 2) float64.
        tone: (n,) int64, a `Tone`.
        strength: (n,) float32.
    """

    matrix: Array
    offset: Array
    tone: npt.NDArray[np.int64]
    strength: npt.NDArray[np.float32]


def draw(draws: Array, image_size: int) -> Drawn:
    """Convert draws (n, 3) in [0, 1) to operations: which one, its strength, its sign."""
    count = len(draws)
    level = np.floor(draws[:, 1] * STRENGTHS) / (STRENGTHS - 1)  # 0, 1/30 .. 1
    signed = np.where(draws[:, 2] < 0.5, -level, level)
    factor = 1.0 + MAX_CHANGE * signed
    strengths = {
        **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), factor),
        "posterize": 256.0 - 2.0 ** np.rint(6.0 * level),  # 8 to 2 bits
        "solarize": 255.0 * (1.0 - level),
        **dict.fromkeys(("autocontrast", "equalize"), np.zeros(count)),
    }
    drawn = Drawn(
        np.tile(np.eye(2), (count, 1, 1)), np.zeros((count, 2)), np.zeros(count, np.int64), np.zeros(count, np.float32)
    )
    chosen = np.floor(draws[:, 0] * len(OPERATIONS)).astype(np.int64)
    for number, name in enumerate(OPERATIONS):
        rows, axis = np.flatnonzero(chosen == number), 1 if name.endswith("_y") else 0
        if name in strengths:
            drawn.tone[rows] = Tone[name.upper()]
            drawn.strength[rows] = strengths[name][rows]
        elif name.startswith("shear"):  # about the upper left corner, as in the paper's code
            drawn.matrix[rows, axis, 1 - axis] = MAX_SHEAR * signed[rows]
            drawn.offset[rows, axis] = MAX_SHEAR * signed[rows] * image_size / 2
        elif name.startswith("translate"):  # whole pixels, as in the paper's code
            drawn.offset[rows, axis] = np.trunc(MAX_SHIFT * signed[rows])
        elif name == "rotate":
            angle = np.deg2rad(MAX_DEGREES * signed[rows])
            rotation = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], axis=1)
            drawn.matrix[rows] = rotation.reshape(-1, 2, 2)
    return drawn

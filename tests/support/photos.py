"""Pictures of one's own, as somebody has them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def write_photos(root: Path, classes: Iterable[str], count: int) -> None:
    """Write so many pictures in a folder for each class, of several sizes and kinds; the classes differ in color."""
    random = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 120, (*random.integers(12, 60, 2), 3))
            pixels[..., label % 3] += 120
            kind = ("jpg", "png", "webp")[number % 3]
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:02}.{kind}")

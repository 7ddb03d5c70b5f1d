"""The torch warp shows the pixels that the augmentation means: Keras' for "notebook", a plain crop for "crop_flip"."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage

from densenet_dist.data.augment import Augmentation
from densenet_dist.data.datasets import Split, load_dataset
from densenet_dist.data.loader import TrainLoader
from densenet_dist.data.plan import Stream, random_words, unit_floats
from densenet_dist.data.torch_loader import TorchEngine

COUNT = 512
SEED, EPOCH = 11, 4
TOLERANCE = 0.01  # grey levels of 255


def grey_levels(images: npt.NDArray[np.uint8], augmentation: str) -> npt.NDArray[np.float32]:
    """What a loader makes of the images, in their own order, (n, H, W, 3) float32 in [0, 255]."""
    split = Split(images, np.arange(len(images)))
    loader = TrainLoader(
        split,
        np.arange(len(images)),
        engine=TorchEngine(images, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
        global_batch_size=100,
        augmentation=Augmentation(augmentation),
        seed=SEED,
    )
    batches = list(loader.epoch(EPOCH))
    pixels = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).numpy()
    return pixels[np.argsort(torch.cat([batch.labels for batch in batches]).numpy())]


def draws(count: int) -> npt.NDArray[np.float64]:
    """The six numbers of each image, (n, 6) in [0, 1): angle, shift x and y, zoom x and y, flip."""
    return unit_floats(random_words(6 * count, seed=SEED, stream=Stream.AUGMENTATION, epoch=EPOCH)).reshape(-1, 6)


def between(low: float, high: float, draw: float) -> float:
    return low + (high - low) * draw


def keras(image: npt.NDArray[np.uint8], draw: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`ImageDataGenerator` with the notebook's arguments, after `apply_affine_transform` of Keras 2, in float64."""
    height, width = image.shape[:2]
    theta = np.deg2rad(between(-20, 20, draw[0]))
    # Keras draws tx from height_shift_range and ty from width_shift_range; here the two are equal.
    tx, ty = (between(-0.125, 0.125, draw[1 + axis]) * (height, width)[axis] for axis in range(2))
    zx, zy = (between(0.9, 1.1, draw[3 + axis]) for axis in range(2))
    cos, sin = np.cos(theta), np.sin(theta)
    rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    shift = np.array([[1, 0, tx], [0, 1, ty], [0, 0, 1]])
    zoom = np.diag([zx, zy, 1])
    to_centre = np.array([[1, 0, height / 2 - 0.5], [0, 1, width / 2 - 0.5], [0, 0, 1]])
    matrix = to_centre @ rotation @ shift @ zoom @ np.linalg.inv(to_centre)
    # The matrix is for (x, y), arrays are indexed by (row, column): swap both axes.
    matrix[:, [0, 1]] = matrix[:, [1, 0]]
    matrix[[0, 1]] = matrix[[1, 0]]
    warped = [
        ndimage.affine_transform(
            image[:, :, channel].astype(np.float64), matrix[:2, :2], matrix[:2, 2], order=1, mode="nearest"
        )
        for channel in range(3)
    ]
    return np.stack(warped, axis=2)[:, :: -1 if draw[5] < 0.5 else 1]


def crop_flip(image: npt.NDArray[np.uint8], draw: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Pad by four black pixels, cut out, mirror: by indexing alone."""
    size = len(image)
    left, top = int(draw[1] * 9), int(draw[2] * 9)
    cut = np.pad(image, ((4, 4), (4, 4), (0, 0)))[top : top + size, left : left + size]
    return cut[:, ::-1] if draw[5] < 0.5 else cut


def noise(size: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (COUNT, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [32, 27])
def test_notebook_is_keras_on_noise(size: int) -> None:
    images = noise(size)
    expected = np.stack([keras(image, draw) for image, draw in zip(images, draws(COUNT), strict=True)])
    assert np.abs(grey_levels(images, "notebook") - expected).max() <= TOLERANCE


def test_notebook_is_keras_on_cifar(official: Path) -> None:
    images = load_dataset("cifar10", official, download=False, limit=COUNT).train.images
    expected = np.stack([keras(image, draw) for image, draw in zip(images, draws(COUNT), strict=True)])
    assert np.abs(grey_levels(images, "notebook") - expected).max() <= TOLERANCE


def test_crop_flip_is_exact() -> None:
    images = noise(32)
    expected = np.stack([crop_flip(image, draw) for image, draw in zip(images, draws(COUNT), strict=True)])
    assert np.array_equal(grey_levels(images, "crop_flip"), expected.astype(np.float32))


def test_crop_flip_of_an_odd_size_is_exact_but_for_rounding() -> None:
    images = noise(27)
    expected = np.stack([crop_flip(image, draw) for image, draw in zip(images, draws(COUNT), strict=True)])
    assert np.abs(grey_levels(images, "crop_flip") - expected).max() <= 1e-3


def test_none_leaves_pixels_alone() -> None:
    images = noise(32)
    assert np.array_equal(grey_levels(images, "none"), images.astype(np.float32))

"""The torch engine shows what `augment_reference` spells out, and that warps as SciPy does."""

import augment_reference as reference
import numpy as np
import numpy.typing as npt
import pytest
import torch
from image_loaders import MEAN, STD, by_torch, noise, smooth
from scipy import ndimage

from densenet_dist.data import torch_ops
from densenet_dist.data.augment import GEOMETRIES, Augmentation, Padding, Parameters, draw
from densenet_dist.data.trivial_augment import Tone

TOLERANCE = 0.01  # grey levels of 255


def row(todo: Parameters, index: int) -> Parameters:
    """The parameters of one image."""
    return todo.map(lambda array: array[index])


def furthest(images: npt.NDArray[np.uint8], todo: Parameters) -> float:
    """How far the engine is from the reference at most, in grey levels."""
    expected = np.stack(
        [reference.augment_image(image, row(todo, index), MEAN, STD) for index, image in enumerate(images)]
    )
    return float((np.abs(by_torch(images, todo, MEAN, STD) - expected) * np.array(STD) * 255.0).max())


class TestEngine:
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_is_the_reference(self, geometry: str) -> None:
        for size in (16, 27):  # small ones: the reference takes its time
            images = np.concatenate([smooth(15, size), noise(15, size)])
            for kind in (Augmentation(geometry), Augmentation(geometry, trivial_augment=True, cutout=6)):
                assert furthest(images, draw(kind, 3, 4, len(images), size)) <= TOLERANCE

    @pytest.mark.parametrize("tone", Tone, ids=[tone.name for tone in Tone])
    def test_tones(self, tone: Tone) -> None:
        """Each at many strengths, of images with many levels, few, and one."""
        flat = np.full((3, 32, 32, 3), (0, 77, 255), np.uint8)
        few = noise(10, 32) // 64 * 40 + 13
        images = np.concatenate([smooth(40, 32), noise(40, 32), few, flat])
        levels = np.arange(len(images)) % 31 / 30
        strength = {
            Tone.POSTERIZE: 256.0 - 2.0 ** np.rint(6 * levels),
            Tone.SOLARIZE: 255.0 * (1.0 - levels),
        }.get(tone, 1.0 + 0.99 * (2.0 * levels - 1.0))
        todo = Parameters(tone=np.full(len(images), int(tone)), strength=strength.astype(np.float32))
        assert furthest(images, todo) <= TOLERANCE

    @pytest.mark.parametrize("tone", [Tone.CONTRAST, Tone.SHARPNESS, Tone.EQUALIZE], ids=str)
    def test_threads_and_batch_leave_the_bits_of_tones_alone(self, tone: Tone) -> None:
        """Of pictures that are large enough for torch to cut one to pieces for its threads."""
        images, threads = smooth(4, 224), torch.get_num_threads()
        todo = Parameters(tone=np.full(4, int(tone)), strength=np.full(4, 1.75, np.float32))
        try:
            torch.set_num_threads(1)
            expected = by_torch(images, todo, MEAN, STD)
            for count in (1, 2):
                torch.set_num_threads(count)
                single = [
                    by_torch(images[place : place + 1], todo.map(lambda array: array[:1]), MEAN, STD)
                    for place in range(4)
                ]
                assert np.array_equal(by_torch(images, todo, MEAN, STD), expected)
                assert np.array_equal(np.concatenate(single), expected)
        finally:
            torch.set_num_threads(threads)


WINDOWS = [
    ((32, 32), (0, 0, 32, 32)),
    ((50, 40), (7, 3, 20, 31)),
    ((500, 375), (0, 0, 500, 375)),
    ((64, 32), (0, 0, 64, 32)),
    ((20, 100), (3, 9, 15, 90)),
    ((5, 7), (1, 2, 3, 4)),
    ((1, 1), (0, 0, 1, 1)),
    ((1, 500), (0, 0, 1, 500)),
    ((2000, 3), (0, 0, 2000, 3)),
]
"""Width and height of a picture, and a window of it."""


class TestResize:
    @pytest.mark.parametrize("size", [1, 7, 32])
    @pytest.mark.parametrize(("picture", "window"), WINDOWS)
    def test_is_the_reference(self, picture: tuple[int, int], window: tuple[int, int, int, int], size: int) -> None:
        width, height = picture
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        left, top, across, down = window
        part = torch.from_numpy(image).permute(2, 0, 1)[:, top : top + down, left : left + across]
        found = torch_ops.resize(part, size)
        assert found.shape == (3, size, size)
        assert found.dtype == torch.float32
        expected = reference.shrink_or_enlarge(image, window, size).transpose(2, 0, 1)
        assert np.abs(found.numpy() - expected).max() <= 1e-3


class TestWarp:
    @pytest.mark.parametrize(("padding", "mode"), [("border", "nearest"), ("zeros", "grid-constant")])
    def test_is_scipys(self, padding: Padding, mode: str) -> None:
        size = 13
        rng = np.random.default_rng(0)
        places = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=-1) - (size - 1) / 2
        for _ in range(8):
            image = rng.uniform(0, 255, (size, size, 3))
            affine = np.concatenate([rng.normal(size=(2, 2)), rng.normal(scale=size / 4, size=(2, 1))], axis=1)
            x, y = np.moveaxis(places @ affine[:, :2].T + affine[:, 2] + (size - 1) / 2, -1, 0)
            found = reference.warp(image, affine, padding)
            for channel in range(3):
                expected = ndimage.map_coordinates(image[:, :, channel], [y, x], order=1, mode=mode, cval=0.0)
                assert np.abs(found[:, :, channel] - expected).max() < 1e-9

    def test_directions(self) -> None:
        """x goes to the right and comes first; the map is from output to input."""
        image = np.arange(4 * 4 * 3, dtype=np.float64).reshape(4, 4, 3)
        right = reference.warp(image, np.array([[1.0, 0, 1], [0, 1, 0]]), "zeros")
        assert np.array_equal(right[:, :3], image[:, 1:])
        assert (right[:, 3] == 0).all()
        below = reference.warp(image, np.array([[1.0, 0, 0], [0, 1, 2]]), "border")
        assert np.array_equal(below, image[[2, 3, 3, 3]])
        mirrored = reference.warp(image, np.array([[-1.0, 0, 0], [0, 1, 0]]), "zeros")
        assert np.array_equal(mirrored, image[:, ::-1])

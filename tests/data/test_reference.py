"""The torch engine shows what `reference` spells out, and `reference` what Pillow and SciPy make of the same."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from densenet_dist.data import reference, torch_ops
from densenet_dist.data.augment import GEOMETRIES, Augmentation, Padding, Parameters, draw
from densenet_dist.data.datasets import Split
from densenet_dist.data.engines import make_engine
from densenet_dist.data.requests import Epoch, Request
from densenet_dist.data.trivial_augment import Tone

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
TOLERANCE = 0.01  # grey levels of 255
SIZE = 16  # the reference takes its time


def noise(count: int, size: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def smooth(count: int, size: int) -> npt.NDArray[np.uint8]:
    """Random images that look a little like photographs: noise enlarged, with different contrasts."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 5, 5)))
    levels = F.interpolate(coarse, size=(size, size), mode="bicubic").permute(0, 2, 3, 1).numpy()
    shrunk = 128 + (levels - 128) * rng.uniform(0.3, 1.0, (count, 1, 1, 3))
    return (shrunk + rng.normal(0, 4, shrunk.shape)).clip(0, 255).astype(np.uint8)


def by_engine(images: npt.NDArray[np.uint8], todo: Parameters) -> Any:
    """What the torch engine makes of images, (n, H, W, 3), normalised."""
    count, size = images.shape[:2]
    labels = np.arange(count)
    engine = make_engine("torch", Split(images, labels), mean=MEAN, std=STD, prefetch=0)
    epoch = Epoch(np.arange(count), labels, todo, size)
    stream = engine.stream(lambda number: Request(epoch, (slice(0, count),)), count)
    return next(iter(stream.batches(0, 1))).permute(0, 2, 3, 1).double().numpy()


def row(todo: Parameters, index: int) -> Parameters:
    """The parameters of one image."""
    return todo.map(lambda array: array[index])


def furthest(images: npt.NDArray[np.uint8], todo: Parameters) -> float:
    """How far the engine is from the reference at most, in grey levels."""
    expected = np.stack(
        [reference.augment_image(image, row(todo, index), MEAN, STD) for index, image in enumerate(images)]
    )
    return float((np.abs(by_engine(images, todo) - expected) * np.array(STD) * 255.0).max())


class TestEngine:
    @pytest.mark.parametrize("cutout", [0, 6])
    @pytest.mark.parametrize("trivial", [False, True])
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_is_the_reference(self, geometry: str, trivial: bool, cutout: int) -> None:
        images = np.concatenate([smooth(15, SIZE), noise(15, SIZE)])
        kind = Augmentation(geometry, trivial_augment=trivial, cutout=cutout)
        assert furthest(images, draw(kind, 3, 4, len(images), SIZE)) <= TOLERANCE

    @pytest.mark.parametrize("size", [32, 27])
    def test_is_the_reference_at_other_sizes(self, size: int) -> None:
        images = np.concatenate([smooth(10, size), noise(10, size)])
        kind = Augmentation("notebook", trivial_augment=True, cutout=8)
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

    @pytest.mark.parametrize("tone", Tone, ids=[tone.name for tone in Tone])
    def test_tones_of_levels_in_between(self, tone: Tone) -> None:
        """As they are in pictures that have been resized; half of them lie in the middle between two whole ones."""
        rng = np.random.default_rng(0)
        images = rng.uniform(0, 255, (20, 16, 16, 3)).astype(np.float32)
        images[:10] = np.floor(images[:10]) + 0.5
        strength = np.full(20, {Tone.POSTERIZE: 240.0, Tone.SOLARIZE: 127.5}.get(tone, 1.7), np.float32)
        found = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        torch_ops.change_tones(found, np.full(20, int(tone)), torch.from_numpy(strength), torch.from_numpy)
        for image, shown, strong in zip(images, found.permute(0, 2, 3, 1).numpy(), strength, strict=True):
            expected = reference.change_tone(image.astype(np.float64), tone, float(strong))
            assert np.abs(shown - expected).max() <= TOLERANCE

    @pytest.mark.parametrize("tone", Tone, ids=[tone.name for tone in Tone])
    def test_autocast_leaves_tones_alone(self, tone: Tone) -> None:
        images = smooth(20, 32)
        todo = Parameters(tone=np.full(20, int(tone)), strength=np.full(20, 1.75, np.float32))
        expected = by_engine(images, todo)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert np.array_equal(by_engine(images, todo), expected)

    @pytest.mark.parametrize("tone", Tone, ids=[tone.name for tone in Tone])
    def test_threads_and_batch_leave_the_bits_of_tones_alone(self, tone: Tone) -> None:
        """Of pictures that are large enough for torch to cut one to pieces for its threads."""
        images, threads = smooth(4, 224), torch.get_num_threads()
        todo = Parameters(tone=np.full(4, int(tone)), strength=np.full(4, 1.75, np.float32))
        try:
            torch.set_num_threads(1)
            expected = by_engine(images, todo)
            for count in (1, 2):
                torch.set_num_threads(count)
                single = [by_engine(images[place : place + 1], todo.map(lambda array: array[:1])) for place in range(4)]
                assert np.array_equal(by_engine(images, todo), expected)
                assert np.array_equal(np.concatenate(single), expected)
        finally:
            torch.set_num_threads(threads)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_holes(self, layout: torch.memory_format) -> None:
        images = torch.ones(3, 3, 8, 8).to(memory_format=layout)
        torch_ops.cut_holes(images, torch.tensor([[0, 0, 0, 0], [1, 2, 4, 8], [0, 0, 8, 8]]))
        assert (images == 0).sum(dim=(1, 2, 3)).tolist() == [0, 3 * 3 * 6, 3 * 64]
        assert (images[1, :, 2:8, 1:4] == 0).all()


WINDOWS = [
    ((32, 32), (0, 0, 32, 32)),
    ((50, 40), (0, 0, 50, 40)),
    ((50, 40), (7, 3, 20, 31)),
    ((33, 31), (1, 0, 32, 31)),
    ((160, 120), (11, 5, 140, 101)),
    ((32, 64), (0, 0, 32, 64)),
    ((64, 32), (0, 0, 64, 32)),
    ((100, 20), (0, 0, 100, 20)),
    ((20, 100), (3, 9, 15, 90)),
    ((8, 8), (0, 0, 8, 8)),
    ((5, 7), (1, 2, 3, 4)),
    ((1, 1), (0, 0, 1, 1)),
    ((9, 9), (8, 8, 1, 1)),
    ((1, 500), (0, 0, 1, 500)),
    ((500, 1), (0, 0, 500, 1)),
    ((2, 300), (0, 17, 2, 200)),
    ((2000, 3), (0, 0, 2000, 3)),
]
"""Width and height of a picture, and a window of it."""


class TestResize:
    @pytest.mark.parametrize("size", [1, 2, 7, 32, 64])
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

    @pytest.mark.parametrize(("width", "height"), [(500, 375), (600, 800)])
    def test_shrinks_photographs(self, width: int, height: int) -> None:
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        found = torch_ops.resize(torch.from_numpy(image).permute(2, 0, 1), 5).permute(1, 2, 0).numpy()
        assert np.abs(found - reference.shrink_or_enlarge(image, (0, 0, width, height), 5)).max() <= 1e-3

    @pytest.mark.parametrize("level", [0, 1, 255])
    def test_one_grey_level_stays(self, level: int) -> None:
        for width, height in ((500, 3), (3, 500), (77, 99), (2, 2)):
            picture = torch.full((3, height, width), level, dtype=torch.uint8)
            assert (torch_ops.resize(picture, 32) - level).abs().max() <= 1e-4

    @pytest.mark.parametrize("size", [1, 7, 32, 64])
    @pytest.mark.parametrize(("picture", "window"), WINDOWS)
    def test_is_pillows_in_the_middle(
        self, picture: tuple[int, int], window: tuple[int, int, int, int], size: int
    ) -> None:
        """Where filters lie inside of the window: what lies beyond it Pillow leaves out of the mean."""
        width, height = picture
        image = np.random.default_rng(0).uniform(0, 255, (height, width, 3)).astype(np.float32)
        left, top, across, down = window
        part = np.ascontiguousarray(image[top : top + down, left : left + across])
        found = reference.shrink_or_enlarge(image, window, size)
        inside = np.ix_(_whole_filters(down, size), _whole_filters(across, size))
        for channel in range(3):
            by_pillow = Image.fromarray(part[:, :, channel]).resize((size, size), Image.Resampling.BILINEAR)
            assert np.abs(found[:, :, channel] - np.asarray(by_pillow))[inside].max(initial=0.0) <= 1e-3

    def test_the_middle_is_most_of_it(self) -> None:
        assert len(_whole_filters(500, 32)) == 30
        assert len(_whole_filters(8, 32)) == 28
        assert len(_whole_filters(32, 32)) == 32

    def test_border_goes_on(self) -> None:
        """Half of the first filter lies before the first pixel: by hand."""
        image = np.array([10, 20, 30, 40], dtype=np.uint8)[None, :, None].repeat(3, axis=2)
        # Scale 2: weights 1/8, 3/8, 3/8, 1/8 of the pixels -1, 0, 1, 2, with pixel -1 = pixel 0.
        first, last = (4 * 10 + 3 * 20 + 30) / 8, (20 + 3 * 30 + 4 * 40) / 8
        found = reference.shrink_or_enlarge(image, (0, 0, 4, 1), 2)
        assert found[:, :, 0].tolist() == [[first, last]] * 2
        by_torch = torch_ops.resize(torch.from_numpy(image).permute(2, 0, 1), 2)
        assert by_torch[0].tolist() == [[first, last]] * 2

    def test_same_size_is_untouched(self) -> None:
        picture = torch.from_numpy(noise(1, 32)[0]).permute(2, 0, 1)
        assert torch.equal(torch_ops.resize(picture, 32), picture.float())


def _whole_filters(length: int, size: int) -> npt.NDArray[np.intp]:
    """Output pixels none of whose filter lies outside of the input."""
    scale = length / size
    middles = (np.arange(size) + 0.5) * scale
    reach = scale if scale > 1.0 else 0.5  # enlarging, pixels whose middle is before the first one's show that alone
    return np.flatnonzero((middles - reach >= -1e-9) & (middles + reach <= length + 1e-9))


class TestWarp:
    @pytest.mark.parametrize("size", [16, 13])
    @pytest.mark.parametrize(("padding", "mode"), [("border", "nearest"), ("zeros", "grid-constant")])
    def test_is_scipys(self, padding: Padding, mode: str, size: int) -> None:
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

    @pytest.mark.parametrize("padding", ["border", "zeros"])
    def test_torch_agrees_far_outside(self, padding: Padding) -> None:
        """Any map, also one that shows nothing of the image."""
        rng = np.random.default_rng(0)
        images = noise(20, SIZE)
        affine = np.concatenate([2 * rng.normal(size=(20, 2, 2)), rng.normal(scale=SIZE, size=(20, 2, 1))], axis=2)
        assert furthest(images, Parameters(affine=affine.astype(np.float32), padding=padding)) <= TOLERANCE

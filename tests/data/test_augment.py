"""Parameters depend on (seed, epoch, index) alone, have the distributions that the papers ask for, and mean the pixels
that Pillow and torchvision make of them."""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from image_loaders import by_torch, noise, smooth
from scipy import ndimage
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import TrivialAugmentWide

from densenet_dist.data import augment, trivial_augment
from densenet_dist.data.augment import GEOMETRIES, Augmentation, Parameters, draw
from densenet_dist.data.plan import Stream, random_words, unit_floats
from densenet_dist.data.trivial_augment import OPERATIONS, STRENGTHS, Tone

NAMES = ("window", "affine", "tone", "strength", "hole", "blend", "box", "label_share")
AWKWARD = [(1, 1), (1, 2), (2, 1), (3, 4), (1, 500), (500, 1), (7, 300), (32, 32), (500, 375), (375, 500), (4000, 3000)]


def sha(array: npt.NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def picture_sizes(count: int) -> npt.NDArray[np.int64]:
    """Widths and heights of pictures in files, awkward ones among them."""
    sizes = np.random.default_rng(0).integers(1, 600, (count, 2))
    sizes[: len(AWKWARD)] = AWKWARD[:count]
    return sizes


def test_golden() -> None:
    """What was drawn when these streams were first released. A difference makes every run of old unrepeatable."""

    def drawn(geometry: str = "none", **options: Any) -> Parameters:
        return draw(Augmentation(geometry, **options), 42, 7, 1000, 32)

    crops = drawn("crop_flip").affine
    assert (sha(crops[:, :, :2]), sha(crops[:, :, 2])) == ("85daec488d06d345", "6b8d45db91135a02")
    windows = augment.random_windows(np.full((1000, 2), [500, 375]), 42, 7, 0.08)
    assert windows[0].tolist() == [9, 0, 473, 375]
    assert sha(windows) == "36a258a32c48f63c"
    assert sha(drawn(trivial_augment=True).tone) == "4a36a6fcf2a35d93"
    assert sha(drawn(cutout=8).hole) == "93045bbe06759957"
    mixed = drawn(mixup=1.0, cutmix=1.0)
    assert (sha(mixed.box), sha(mixed.blend)) == ("5b0e4cdcc11f2745", "939d29279ea5332a")
    assert sha(mixed.label_share) == "68dd32dea8504aaf"


@pytest.mark.parametrize("geometry", ["crop_flip", "random_resized_crop"])
def test_alternating_flip_shows_every_image_the_other_way_in_the_next_epoch(geometry: str) -> None:
    """Jordan 2024, arXiv:2404.00498, section 3.6."""
    kinds = Augmentation(geometry), Augmentation(geometry, flip="alternating")
    epochs = [[draw(kind, 3, epoch, 2000, 32).affine for epoch in range(4)] for kind in kinds]
    random, alternating = (np.array([np.linalg.det(affine[:, :, :2]) < 0 for affine in each]) for each in epochs)
    assert (alternating[0] == random[0]).all()
    for epoch in range(3):
        assert (alternating[epoch] != alternating[epoch + 1]).all()
    assert 0.4 < (random[1] != random[2]).mean() < 0.6
    assert 0.4 < alternating[0].mean() < 0.6
    for one, other in zip(*epochs, strict=True):  # all else is as it was
        np.testing.assert_array_equal(abs(one[:, :, 0]), abs(other[:, :, 0]))
        np.testing.assert_array_equal(one[:, :, 1:], other[:, :, 1:])


def test_parameters_depend_on_seed_epoch_and_index_alone() -> None:
    kind = Augmentation("random_resized_crop", trivial_augment=True, cutout=8, mixup=0.2, cutmix=1.0)
    few, many, later, other = (
        draw(kind, seed, epoch, count, 32, picture_sizes(500)[:count])
        for seed, epoch, count in [(1, 2, 20), (1, 2, 500), (1, 3, 20), (2, 2, 20)]
    )
    for name in NAMES:
        expected = getattr(few, name)
        assert np.array_equal(expected, getattr(many, name)[:20])
        assert not np.array_equal(expected, getattr(later, name))
        assert not np.array_equal(expected, getattr(other, name))


class TestWindows:
    def test_random_ones_are_inside(self) -> None:
        sizes = np.repeat(AWKWARD, 300, axis=0)
        for smallest in (1e-6, 0.08, 1.0):
            windows = augment.random_windows(sizes, 0, 0, smallest)
            assert (windows.shape, windows.dtype) == ((len(sizes), 4), np.int64)
            assert (windows[:, :2] >= 0).all()
            assert (windows[:, 2:] >= 1).all()
            assert (windows[:, :2] + windows[:, 2:] <= sizes).all()

    def test_central_ones(self) -> None:
        sizes = np.array([[1, 1], [5, 2], [2, 5], [500, 375], [375, 500], [300, 300]])
        expected = [[0, 0, 1, 1], [1, 0, 2, 2], [0, 1, 2, 2], [62, 0, 375, 375], [0, 62, 375, 375], [0, 0, 300, 300]]
        assert augment.central_windows(sizes).tolist() == expected


def test_random_resized_crop_shows_the_window() -> None:
    """Enlarged as torch would, and mirrored; but at its rim the warp sees what lies beyond the window."""
    size = 32
    images = np.random.default_rng(0).integers(0, 256, (100, size, size, 3), dtype=np.uint8)
    kind = Augmentation("random_resized_crop")
    todo = draw(kind, 3, 4, 100, size)
    windows = augment.random_windows(np.full((100, 2), size), 3, 4, kind.crop_scale)
    words = random_words(600, seed=3, stream=Stream.AUGMENTATION, epoch=4)
    flipped = unit_floats(words).reshape(100, 6)[:, 5] < 0.5
    assert 30 < flipped.sum() < 70
    assert todo.padding == "border"
    found = by_torch(images, todo)
    for index, (left, top, width, height) in enumerate(windows.tolist()):
        part = torch.from_numpy(images[index, top : top + height, left : left + width]).permute(2, 0, 1)[None]
        enlarged = F.interpolate(part.double(), (size, size), mode="bilinear", align_corners=False)[0]
        expected = enlarged.permute(1, 2, 0).numpy()
        middles = (np.arange(size) + 0.5) / size
        across, down = (
            np.flatnonzero((middles * side >= 0.5) & (middles * side <= side - 0.5)) for side in (width, height)
        )
        shown = found[index, :, ::-1] if flipped[index] else found[index]
        inside = np.ix_(down, across)
        assert np.abs(shown[inside] - expected[inside]).max() < 0.002


SPACE = TrivialAugmentWide._AUGMENTATION_SPACE
OURS = tuple(OPERATIONS)
THEIRS = tuple(SPACE)
SIGNED_TONES = ("brightness", "color", "contrast", "sharpness")
TONES = [(name, sign) for name in SIGNED_TONES for sign in (1, -1)]
TONES += [("solarize", 1), ("autocontrast", 1), ("posterize", 1)]


def operation(name: str, sign: int = 1, size: int = 32) -> tuple[trivial_augment.Drawn, npt.NDArray[np.float64]]:
    """One operation at each of its strengths, and torchvision's magnitudes, (31,), signed in its own sense."""
    which = (OURS.index(name) + 0.5) / len(OURS)
    levels = (np.arange(STRENGTHS) + 0.5) / STRENGTHS
    draws = np.stack([np.full(STRENGTHS, which), levels, np.full(STRENGTHS, 0.5 + sign / 4)], axis=1)
    magnitudes, signed = SPACE[THEIRS[OURS.index(name)]]
    found = magnitudes(STRENGTHS, size, size)
    values = np.zeros(STRENGTHS) if found is None else found.double().numpy()
    if "translate" in name:
        values = values.round(5)  # torchvision's float32 has 15.999999 for 16 pixels, which it cuts to 15
    # Of the same sign, ours moves the other way, like the paper's code; each way is drawn as often as the other.
    return trivial_augment.draw(draws, size), values * (sign if signed else 1) * (-1 if "translate" in name else 1)


def parameters_of(drawn: trivial_augment.Drawn) -> Parameters:
    affine = np.concatenate([drawn.matrix, drawn.offset[:, :, None]], axis=2).astype(np.float32)
    return Parameters(affine=affine, tone=drawn.tone, strength=drawn.strength, padding="zeros")


def by_torchvision(image: npt.NDArray[np.float64], name: str, magnitude: float) -> npt.NDArray[np.float64]:
    """What `TrivialAugmentWide` does to gray levels (H, W, 3), in floating point and bilinearly."""
    scale = 1.0 if name == "posterize" else 255.0  # that one works on whole numbers
    pixels = torch.from_numpy((image / scale).astype(np.uint8 if name == "posterize" else np.float64)).permute(2, 0, 1)
    wide = TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
    fill: Any = {torch.Tensor: None}  # black, without blending its edge once more
    changed: torch.Tensor = wide._apply_image_or_video_transform(
        pixels, THEIRS[OURS.index(name)], magnitude, interpolation=InterpolationMode.BILINEAR, fill=fill
    )
    return changed.permute(1, 2, 0).double().numpy() * scale


class TestTrivialAugment:
    @pytest.mark.parametrize(("sign", "size"), [(1, 32), (-1, 27)])
    @pytest.mark.parametrize("name", OURS[:6])
    def test_geometry_is_torchvisions(self, name: str, sign: int, size: int) -> None:
        """The same direction, center and black surroundings, everywhere, the rim included."""
        images = smooth(STRENGTHS, size)
        drawn, magnitudes = operation(name, sign, size)
        found = by_torch(images, parameters_of(drawn))
        for index, magnitude in enumerate(magnitudes.tolist()):
            expected = by_torchvision(images[index].astype(np.float64), name, magnitude)
            assert np.abs(found[index] - expected).max() < 0.01

    @pytest.mark.parametrize(("name", "sign"), TONES)
    def test_tones_are_torchvisions(self, name: str, sign: int) -> None:
        """Of images in floating point, which torchvision does not round either; "equalize" is held to DALI's alone."""
        images = np.concatenate([smooth(STRENGTHS - 2, 32), np.full((1, 32, 32, 3), 77, np.uint8), noise(1, 32)])
        drawn, magnitudes = operation(name, sign)
        found = by_torch(images, parameters_of(drawn))
        for index, magnitude in enumerate(magnitudes.tolist()):
            image = images[index].astype(np.float64)
            expected = by_torchvision(image, name, magnitude)
            # A level that is the threshold itself: 255 times a float32 falls on either side of it.
            clear = np.abs(image - 255.0 * magnitude) > 1e-3 if name == "solarize" else True
            # torchvision's luma is 0.2989, 0.587, 0.114: a sum of 0.9999.
            tolerance = 0.03 if name in ("color", "contrast") else 0.001
            assert np.abs(found[index] - expected).max(where=clear, initial=0.0) < tolerance

    @pytest.mark.parametrize("tone", [Tone.CONTRAST, Tone.SHARPNESS, Tone.EQUALIZE], ids=str)
    def test_threads_and_batch_leave_the_bits_of_tones_alone(self, tone: Tone) -> None:
        """Of pictures that are large enough for torch to cut one to pieces for its threads."""
        images, threads = smooth(4, 224), torch.get_num_threads()
        todo = Parameters(tone=np.full(4, int(tone)), strength=np.full(4, 1.75, np.float32))
        single = todo.map(lambda array: array[:1])
        try:
            torch.set_num_threads(1)
            expected = by_torch(images, todo)
            for count in (1, 2):
                torch.set_num_threads(count)
                assert np.array_equal(by_torch(images, todo), expected)
                apart = [by_torch(images[place : place + 1], single) for place in range(4)]
                assert np.array_equal(np.concatenate(apart), expected)
        finally:
            torch.set_num_threads(threads)

    @pytest.mark.parametrize("geometry", GEOMETRIES[1:])
    def test_comes_before_the_geometry(self, geometry: str) -> None:
        """What it made is cropped, flipped or warped: the maps are composed."""
        both = draw(Augmentation(geometry, trivial_augment=True), 5, 6, 500, 32)
        first = draw(Augmentation(trivial_augment=True), 5, 6, 500, 32)
        then = draw(Augmentation(geometry), 5, 6, 500, 32)
        assert both.padding == then.padding
        last_row = np.tile([0.0, 0.0, 1.0], (500, 1, 1))
        one, other, whole = (np.concatenate([found.affine, last_row], axis=1) for found in (first, then, both))
        np.testing.assert_allclose(whole, one @ other, rtol=0, atol=1e-5)


def test_cutout_blanks_a_square() -> None:
    """About a random pixel, cut off at the border; the rest stays."""
    images = noise(20, 32)
    todo = draw(Augmentation(cutout=8), 5, 6, 20, 32)
    found = by_torch(images, todo)
    for image, expected, (left, top, right, bottom) in zip(found, images.astype(float), todo.hole, strict=True):
        assert 4 <= right - left <= 8
        assert 4 <= bottom - top <= 8
        expected[top:bottom, left:right] = 0.0
        np.testing.assert_allclose(image, expected, atol=1e-4)


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
    to_center = np.array([[1, 0, height / 2 - 0.5], [0, 1, width / 2 - 0.5], [0, 0, 1]])
    matrix = to_center @ rotation @ shift @ zoom @ np.linalg.inv(to_center)
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


class TestGeometry:
    """The pixels that each geometry means: Keras' for "notebook", a plain crop for "crop_flip"."""

    def draws(self, count: int) -> npt.NDArray[np.float64]:
        """The six numbers of each image, in [0, 1): angle, shift x and y, zoom x and y, flip."""
        return unit_floats(random_words(6 * count, seed=11, stream=Stream.AUGMENTATION, epoch=4)).reshape(-1, 6)

    @pytest.mark.parametrize("size", [32, 27])
    def test_notebook_is_keras(self, size: int) -> None:
        images = noise(256, size)
        expected = np.stack([keras(image, one) for image, one in zip(images, self.draws(256), strict=True)])
        found = by_torch(images, draw(Augmentation("notebook"), 11, 4, 256, size))
        assert np.abs(found - expected).max() <= 0.01

    def test_crop_flip_is_exact(self) -> None:
        images = noise(256, 32)
        expected = np.stack([crop_flip(image, one) for image, one in zip(images, self.draws(256), strict=True)])
        assert np.array_equal(by_torch(images, draw(Augmentation("crop_flip"), 11, 4, 256, 32)), expected)

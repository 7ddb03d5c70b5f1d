"""Parameters depend on (seed, epoch, index) alone, have the distributions that the papers ask for, and mean the pixels
that Pillow and torchvision make of them."""

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import TrivialAugmentWide

from densenet_dist.config import load_config
from densenet_dist.data import augment, reference, torch_ops, trivial_augment
from densenet_dist.data.augment import GEOMETRIES, Augmentation, Parameters, draw
from densenet_dist.data.datasets import Split
from densenet_dist.data.engines import make_engine
from densenet_dist.data.plan import Stream, random_words, unit_floats
from densenet_dist.data.requests import Epoch, Request
from densenet_dist.data.trivial_augment import OPERATIONS, STRENGTHS, Tone
from densenet_dist.errors import ConfigError
from densenet_dist.train.inputs import augmentation_of

P = 1e-3  # what a statistical test must not fall below
NAMES = ("window", "affine", "tone", "strength", "hole", "blend", "box", "own")
KINDS = [Augmentation(geometry) for geometry in GEOMETRIES] + [
    Augmentation(trivial_augment=True),
    Augmentation(cutout=8),
    Augmentation(mixup=0.2),
    Augmentation(cutmix=1.0),
    Augmentation("notebook", trivial_augment=True, cutout=8, mixup=0.2, cutmix=1.0),
    Augmentation("crop_flip", trivial_augment=True, cutout=8, mixup=0.2, cutmix=1.0),
    Augmentation("random_resized_crop", trivial_augment=True, cutout=8, mixup=0.2, cutmix=1.0),
]
AWKWARD = [(1, 1), (1, 2), (2, 1), (3, 4), (1, 500), (500, 1), (7, 300), (32, 32), (500, 375), (375, 500), (4000, 3000)]

# What was drawn when these streams were first released.
CROP_FLIP = ("85daec488d06d345", "6b8d45db91135a02")
NOTEBOOK_999 = [0.9585915, -0.2036316, 0.1992568, 0.9796378, 2.2412117, 4.5123806]
TRIVIAL_TONES = "4a36a6fcf2a35d93"
TRIVIAL_STRENGTHS = [(4, 1.033), (6, 0.505), (11, 0.307)]
TRIVIAL_AFFINES = [
    (0, [1.0, 0.0, 0.0, -0.957, 1.0, -15.312]),
    (1, [0.98768836, -0.15643446, 0.0, 0.15643446, 0.98768836, 0.0]),
]
CUTOUT = "93045bbe06759957"
MIXED = ("5b0e4cdcc11f2745", "939d29279ea5332a", "68dd32dea8504aaf")
MIXUP = [9.8846841e-01, 1.4734104e-08, 2.3793699e-02, 6.1887358e-03, 4.2824424e-03]
RESIZED_CROP = "36a258a32c48f63c"
RESIZED_CROP_0 = [9, 0, 473, 375]


def sha(array: npt.NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def picture_sizes(count: int) -> npt.NDArray[np.int64]:
    """Widths and heights of pictures in files, awkward ones among them."""
    sizes = np.random.default_rng(0).integers(1, 600, (count, 2))
    sizes[: len(AWKWARD)] = AWKWARD[:count]
    return sizes


def pixels(images: npt.NDArray[np.uint8], todo: Parameters, mean: float = 0.0, std: float = 1 / 255) -> Any:
    """What the torch engine makes of images, (n, H, W, 3); in grey levels if not told otherwise."""
    count, size = images.shape[:2]
    labels = np.arange(count)
    engine = make_engine("torch", Split(images, labels), mean=(mean,) * 3, std=(std,) * 3, prefetch=0)
    epoch = Epoch(np.arange(count), labels, todo, size)
    stream = engine.stream(lambda number: Request(epoch, (slice(0, count),)), count)
    return next(iter(stream.batches(0, 1))).permute(0, 2, 3, 1).double().numpy()


def smooth(count: int, size: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Random images that look a little like photographs: noise enlarged, with different contrasts."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (count, 3, 6, 6)))
    levels = F.interpolate(coarse, size=(size, size), mode="bicubic").permute(0, 2, 3, 1).numpy()
    shrunk = 128 + (levels - 128) * rng.uniform(0.3, 1.0, (count, 1, 1, 3))
    return (shrunk + rng.normal(0, 4, shrunk.shape)).clip(0, 255).astype(np.uint8)


def assert_uniform(values: npt.NDArray[np.generic], count: int) -> None:
    """Chi-square: `values` are whole numbers drawn evenly from 0 .. count - 1."""
    found = np.bincount(values.astype(np.int64), minlength=count)
    assert len(found) == count
    assert stats.chisquare(found).pvalue > P


class TestGolden:
    """A difference here makes every run of old unrepeatable."""

    def test_crop_flip(self) -> None:
        affine = draw(Augmentation("crop_flip"), 42, 7, 1000, 32).affine
        assert (sha(affine[:, :, :2]), sha(affine[:, :, 2])) == CROP_FLIP

    def test_notebook(self) -> None:
        # Sines and cosines may differ in the last bit from one processor to another: not a hash.
        affine = draw(Augmentation("notebook"), 42, 7, 1000, 32).affine
        found = np.concatenate([affine[999, :, :2].ravel(), affine[999, :, 2]])
        np.testing.assert_allclose(found, NOTEBOOK_999, rtol=0, atol=1e-6)

    def test_trivial_augment(self) -> None:
        found = draw(Augmentation(trivial_augment=True), 42, 7, 1000, 32)
        assert sha(found.tone) == TRIVIAL_TONES
        for row, strength in TRIVIAL_STRENGTHS:
            assert found.strength[row] == pytest.approx(strength, abs=1e-6)
        for row, affine in TRIVIAL_AFFINES:
            np.testing.assert_allclose(found.affine[row].ravel(), affine, rtol=0, atol=1e-6)

    def test_cutout(self) -> None:
        assert sha(draw(Augmentation(cutout=8), 42, 7, 1000, 32).hole) == CUTOUT

    def test_mix(self) -> None:
        found = draw(Augmentation(mixup=1.0, cutmix=1.0), 42, 7, 1000, 32)
        assert (sha(found.box), sha(found.blend), sha(found.own)) == MIXED

    def test_mixup(self) -> None:
        found = draw(Augmentation(mixup=0.2), 42, 7, 1000, 32).own
        np.testing.assert_allclose(found[:5], MIXUP, rtol=1e-5)

    def test_resized_crop(self) -> None:
        windows = augment.random_windows(np.full((1000, 2), [500, 375]), 42, 7, 0.08)
        assert windows[0].tolist() == RESIZED_CROP_0
        assert sha(windows) == RESIZED_CROP


class TestAlternatingFlip:
    """Jordan 2024, arXiv:2404.00498, section 3.6."""

    @pytest.mark.parametrize("geometry", ["notebook", "crop_flip", "random_resized_crop"])
    def test_every_image_is_shown_the_other_way_in_the_next_epoch(self, geometry: str) -> None:
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

    def test_the_configuration_says_which(self) -> None:
        assert augmentation_of(load_config({"data": {"flip": "alternating"}})).flip == "alternating"
        with pytest.raises(ConfigError, match=r"data.flip: alternating changes nothing with data.augment=none"):
            load_config({"data": {"flip": "alternating", "augment": "none"}})


class TestDraw:
    def test_nothing(self) -> None:
        found = draw(Augmentation(), 0, 0, 10, 32)
        assert [name for name in NAMES if getattr(found, name) is not None] == []

    def test_unknown(self) -> None:
        with pytest.raises(ConfigError, match=r"'mixup'.*none, notebook, crop_flip, random_resized_crop"):
            draw(Augmentation("mixup"), 0, 0, 10, 32)

    @pytest.mark.parametrize("files", [False, True])
    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_depends_on_seed_epoch_and_index_alone(self, kind: Augmentation, files: bool) -> None:
        few, many, later, other = (
            draw(kind, seed, epoch, count, 32, picture_sizes(500)[:count] if files else None)
            for seed, epoch, count in [(1, 2, 20), (1, 2, 500), (1, 3, 20), (2, 2, 20)]
        )
        assert few.padding == many.padding == later.padding == other.padding
        varying = 0
        for name in NAMES:
            arrays = [getattr(found, name) for found in (few, many, later, other)]
            if arrays[0] is None:
                assert arrays == [None] * 4
                continue
            assert len(arrays[0]) == 20
            assert np.array_equal(arrays[0], arrays[1][:20])
            # A share or a window may be the same for all images, whatever the draws.
            constant = np.array_equal(arrays[0], arrays[2])
            assert constant == np.array_equal(arrays[0], arrays[3])
            varying += not constant
        expected = (kind.geometry != "none") + kind.trivial_augment + (kind.cutout > 0) + kind.mixes
        assert varying >= expected

    def test_other_pictures_do_not_matter(self) -> None:
        """The window of a picture does not depend on the sizes of those before and after it."""
        sizes = picture_sizes(100)
        others = sizes[::-1].copy()
        others[50] = sizes[50]
        kind = Augmentation("random_resized_crop")
        one, other = (draw(kind, 0, 0, 100, 32, shown).window[50] for shown in (sizes, others))
        assert one.tolist() == other.tolist()

    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_streams_are_independent(self, geometry: str) -> None:
        """Switching one augmentation on changes nothing of the others."""
        sizes = picture_sizes(50)
        alone = {
            "window": Augmentation(geometry),
            "hole": Augmentation(cutout=8),
            **dict.fromkeys(("tone", "strength"), Augmentation(trivial_augment=True)),
            **dict.fromkeys(("blend", "box", "own"), Augmentation(mixup=0.2, cutmix=1.0)),
        }
        everything = Augmentation(geometry, trivial_augment=True, cutout=8, mixup=0.2, cutmix=1.0)
        together = draw(everything, 5, 6, 50, 32, sizes)
        for name, kind in alone.items():
            assert np.array_equal(getattr(together, name), getattr(draw(kind, 5, 6, 50, 32, sizes), name)), name
        without = draw(Augmentation(geometry, cutout=8, mixup=0.2, cutmix=1.0), 5, 6, 50, 32, sizes)
        plain = draw(Augmentation(geometry), 5, 6, 50, 32, sizes)
        assert without.padding == plain.padding
        assert (without.affine is None and plain.affine is None) or np.array_equal(without.affine, plain.affine)

    def test_streams_are_uncorrelated(self) -> None:
        kind = Augmentation("crop_flip", trivial_augment=True, cutout=1, mixup=1.0)
        found = draw(kind, 0, 0, 20_000, 32)
        crop = draw(Augmentation("crop_flip"), 0, 0, 20_000, 32).affine
        columns = [crop[:, 0, 0], crop[:, 0, 2], crop[:, 1, 2], found.tone, *found.hole[:, :2].T, found.own]
        correlation = np.corrcoef(np.array(columns, dtype=np.float64)) - np.eye(len(columns))
        assert np.abs(correlation).max() < 4 / math.sqrt(20_000)

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_types(self, kind: Augmentation) -> None:
        found = draw(kind, 0, 0, 10, 32, picture_sizes(10))
        types = {name: getattr(found, name).dtype for name in NAMES if getattr(found, name) is not None}
        assert set(types) >= {"window"}
        whole = {"window", "tone", "hole", "box"}
        assert types == {name: np.int64 if name in whole else np.float32 for name in types}
        shapes = {"window": (4,), "affine": (2, 3), "hole": (4,), "box": (4,)}
        assert all(getattr(found, name).shape == (10, *shapes.get(name, ())) for name in types)

    def test_map_touches_every_array(self) -> None:
        found = draw(KINDS[-2], 0, 0, 10, 32, picture_sizes(10))
        picked = found.map(lambda array: array[3:5])
        for name in NAMES:
            assert np.array_equal(getattr(picked, name), getattr(found, name)[3:5]), name
        assert picked.padding == found.padding == "zeros"
        assert all(getattr(Parameters().map(lambda array: array[0]), name) is None for name in NAMES)


class TestAffine:
    def test_notebook_ranges(self) -> None:
        found = draw(Augmentation("notebook"), 0, 0, 20_000, 32)
        matrix, offset = found.affine[:, :, :2], found.affine[:, :, 2]
        assert found.padding == "border"
        assert found.affine.dtype == np.float32
        zoom = np.linalg.norm(matrix, axis=1)  # columns are R (zx, 0) and R (0, zy)
        angle = np.rad2deg(np.arctan2(-matrix[:, 0, 1], matrix[:, 1, 1]))
        for values, low, high in ((zoom[:, 0], 0.9, 1.1), (zoom[:, 1], 0.9, 1.1), (angle, -20, 20)):
            assert low - 1e-4 <= values.min() < low + 0.01 * (high - low)
            assert high - 0.01 * (high - low) < values.max() <= high + 1e-4
        assert abs(np.corrcoef(zoom.T)[0, 1]) < 0.03
        flipped = np.linalg.det(matrix) < 0
        assert abs(flipped.mean() - 0.5) < 0.015
        assert 3.9 < np.abs(offset).max() <= 4.0 * np.sqrt(2.0)

    def test_crop_flip_offsets(self) -> None:
        found = draw(Augmentation("crop_flip"), 0, 0, 20_000, 32)
        assert found.padding == "zeros"
        for axis in range(2):
            values, counts = np.unique(found.affine[:, axis, 2], return_counts=True)
            assert values.tolist() == list(range(-4, 5))
            assert np.sum((counts - 20_000 / 9) ** 2 / (20_000 / 9)) < 26.1  # 8 degrees of freedom, p = 0.001
        assert abs(np.mean(found.affine[:, 0, 0] < 0) - 0.5) < 0.015

    @pytest.mark.parametrize("kind", KINDS[1:5], ids=str)
    @pytest.mark.parametrize("size", [32, 27])
    def test_dali_and_torch_say_the_same(self, kind: Augmentation, size: int) -> None:
        """Both forms take the middle of each output pixel to the same place of the input: that of `affine`."""
        affine = draw(kind, 0, 0, 50, size).affine
        pixels = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=-1).reshape(-1, 2) + 0.5
        dali = augment.dali_matrix(affine, size).astype(np.float64)
        by_dali = np.einsum("nij,pj->npi", dali[:, :, :2], pixels) + dali[:, None, :, 2]
        theta = augment.torch_theta(affine, size).astype(np.float64)
        by_torch = np.einsum("nij,pj->npi", theta[:, :, :2], pixels / (size / 2) - 1) + theta[:, None, :, 2]
        np.testing.assert_allclose(by_dali, (by_torch + 1) * (size / 2), rtol=0, atol=1e-5)
        meant = np.einsum("nij,pj->npi", affine[:, :, :2], pixels - size / 2) + affine[:, None, :, 2] + size / 2
        np.testing.assert_allclose(by_dali, meant, rtol=0, atol=1e-5)


def torchvision_windows(width: int, height: int, smallest: float, count: int) -> npt.NDArray[np.int64]:
    """`RandomResizedCrop`'s, (n, 4): left, top, width, height."""
    picture = torch.empty(1, 1, 1).expand(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [RandomResizedCrop.get_params(picture, [smallest, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    return np.array([(left, top, across, down) for top, left, down, across in drawn])


def windows_of(width: int, height: int, smallest: float = 0.08, count: int = 4000) -> npt.NDArray[np.int64]:
    return augment.random_windows(np.full((count, 2), [width, height]), 3, 1, smallest)


def _measures(windows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], ...]:
    """Area, ratio of the sides in its logarithm, left, top."""
    left, top, width, height = windows.T
    return width * height, np.log(width / height), left, top


class TestRandomWindows:
    @pytest.mark.parametrize("smallest", [1e-6, 0.08, 0.5, 1.0])
    def test_are_inside(self, smallest: float) -> None:
        sizes = np.repeat(AWKWARD, 300, axis=0)
        windows = augment.random_windows(sizes, 0, 0, smallest)
        assert windows.shape == (len(sizes), 4)
        assert windows.dtype == np.int64
        assert (windows[:, :2] >= 0).all()
        assert (windows[:, 2:] >= 1).all()
        assert (windows[:, :2] + windows[:, 2:] <= sizes).all()

    @pytest.mark.parametrize("smallest", [0.08, 0.5])
    @pytest.mark.parametrize(("width", "height"), AWKWARD)
    def test_area_and_ratio(self, width: int, height: int, smallest: float) -> None:
        """Some sides that round to those of the window have an area and a ratio within the limits."""
        windows = windows_of(width, height, smallest, 500)
        fallback = torchvision_windows(width, height, 1.0 if width != height else smallest, 1)[0]
        drawn = windows[(windows != fallback).any(axis=1)]
        across, down = drawn[:, 2:].T
        assert ((across + 0.5) * (down + 0.5) >= smallest * width * height).all()
        assert ((across - 0.5) * (down - 0.5) <= width * height).all()
        assert ((across + 0.5) / (down - 0.5) >= 3 / 4).all()
        assert ((across - 0.5) / (down + 0.5) <= 4 / 3).all()

    @pytest.mark.parametrize(("width", "height"), [(224, 224), (600, 400), (400, 150), (37, 41)])
    def test_distribution_is_torchvisions(self, width: int, height: int) -> None:
        ours, theirs = windows_of(width, height), torchvision_windows(width, height, 0.08, 2500)
        for one, other in zip(_measures(ours), _measures(theirs), strict=True):
            assert stats.ks_2samp(one, other).pvalue > P

    def test_area_and_ratio_are_uniform(self) -> None:
        """Of a picture so large that rounding is nothing, and of areas so small that every attempt fits."""
        windows = augment.random_windows(np.full((4000, 2), 10_000), 0, 0, 0.01)
        share = windows[:, 2] * windows[:, 3] / 1e8
        small = share < 0.5
        assert stats.kstest(share[small], stats.uniform(0.01, 0.49).cdf).pvalue > P
        ratio = np.log(windows[small, 2] / windows[small, 3])
        assert stats.kstest(ratio, stats.uniform(-math.log(4 / 3), 2 * math.log(4 / 3)).cdf).pvalue > P
        assert abs(np.corrcoef(share[small], ratio)[0, 1]) < 4 / math.sqrt(small.sum())

    @pytest.mark.parametrize(("width", "height"), [(224, 224), (60, 40)])
    def test_places_are_uniform(self, width: int, height: int) -> None:
        windows = windows_of(width, height)
        room = np.array([width, height]) - windows[:, 2:]
        jitter = np.random.default_rng(0).random(room.shape)  # whole places made continuous
        for axis in range(2):
            free = room[:, axis] > 0
            place = (windows[free, axis] + jitter[free, axis]) / (room[free, axis] + 1)
            assert stats.kstest(place, "uniform").pvalue > P

    def test_first_and_last_place_are_reached(self) -> None:
        windows = windows_of(8, 8)
        last = 8 - windows[:, 2:]
        for axis in range(2):
            free = last[:, axis] > 0
            assert (windows[free, axis] == 0).any()
            assert (windows[free, axis] == last[free, axis]).any()

    @pytest.mark.parametrize(
        ("width", "height"), [(1, 500), (500, 1), (3, 100), (100, 5), (7, 200), (1000, 10), (2, 99), (4, 100)]
    )
    def test_too_long_for_any_window(self, width: int, height: int) -> None:
        """The largest window in the middle with sides in 3:4 or 4:3, as in torchvision."""
        expected = torchvision_windows(width, height, 0.08, 1)[0]
        assert (windows_of(width, height, count=50) == expected).all()

    @pytest.mark.parametrize(("width", "height"), [(600, 400), (400, 600), (301, 211), (17, 10), (31, 57)])
    def test_all_of_the_area_asked_for(self, width: int, height: int) -> None:
        expected = torchvision_windows(width, height, 1.0, 1)[0]
        assert (windows_of(width, height, 1.0, 50) == expected).all()

    def test_epochs_share_no_attempt(self) -> None:
        """Ten attempts an epoch: the second attempt of one is not the first of another."""
        windows = [augment.random_windows(np.full((50, 2), 224), 0, epoch, 0.08).tolist() for epoch in range(30)]
        assert len({str(drawn) for drawn in windows}) == 30
        rows = [str(window) for drawn in windows for window in drawn]
        assert len(rows) - len(set(rows)) < 5


class TestEvaluation:
    def test_central_windows(self) -> None:
        sizes = np.array([[1, 1], [5, 2], [2, 5], [500, 375], [375, 500], [300, 300]])
        expected = [[0, 0, 1, 1], [1, 0, 2, 2], [0, 1, 2, 2], [62, 0, 375, 375], [0, 62, 375, 375], [0, 0, 300, 300]]
        assert augment.central_windows(sizes).tolist() == expected

    def test_share(self) -> None:
        sizes = np.array([[1, 1], [256, 256], [500, 400], [3, 4000]])
        expected = [[0, 0, 1, 1], [16, 16, 224, 224], [75, 25, 350, 350], [0, 1998, 3, 3]]
        assert augment.central_windows(sizes, augment.EVAL_CROP).tolist() == expected

    @pytest.mark.parametrize("share", [1.0, augment.EVAL_CROP])
    def test_are_inside_and_in_the_middle(self, share: float) -> None:
        sizes = picture_sizes(1000)
        windows = augment.central_windows(sizes, share)
        before, after = windows[:, :2], sizes - windows[:, :2] - windows[:, 2:]
        assert (before >= 0).all()
        assert np.isin(after - before, (0, 1)).all()
        assert (windows[:, 2] == windows[:, 3]).all()
        assert np.abs(windows[:, 2] - sizes.min(axis=1) * share).max() <= 0.5

    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_nothing_else_is_done(self, geometry: str) -> None:
        sizes = picture_sizes(20)
        share = 0.875 if geometry == "random_resized_crop" else 1.0
        found = augment.evaluation_parameters(geometry, sizes)
        assert np.array_equal(found.window, augment.central_windows(sizes, share))
        assert all(getattr(found, name) is None for name in NAMES[1:])
        assert all(getattr(augment.evaluation_parameters(geometry, None), name) is None for name in NAMES)

    def test_training_without_random_crops_sees_the_middle(self) -> None:
        sizes = picture_sizes(20)
        for geometry in ("none", "notebook", "crop_flip"):
            assert np.array_equal(
                draw(Augmentation(geometry), 0, 0, 20, 32, sizes).window, augment.central_windows(sizes)
            )


class TestResizedCropInMemory:
    @pytest.mark.parametrize("size", [32, 27])
    def test_shows_the_window(self, size: int) -> None:
        """Enlarged as torch would, and mirrored; but at its rim the warp sees what lies beyond the window."""
        images = np.random.default_rng(0).integers(0, 256, (100, size, size, 3), dtype=np.uint8)
        kind = Augmentation("random_resized_crop")
        todo = draw(kind, 3, 4, 100, size)
        windows = augment.random_windows(np.full((100, 2), size), 3, 4, kind.crop_scale)
        words = random_words(600, seed=3, stream=Stream.AUGMENTATION, epoch=4)
        flipped = unit_floats(words).reshape(100, 6)[:, 5] < 0.5
        assert 30 < flipped.sum() < 70
        assert todo.padding == "border"
        found = pixels(images, todo)
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
            if index < 3:
                slow = reference.warp(images[index].astype(np.float64), todo.affine[index].astype(np.float64), "border")
                assert np.abs((slow[:, ::-1] if flipped[index] else slow)[inside] - expected[inside]).max() < 0.002

    def test_pictures_in_files_are_mirrored_only(self) -> None:
        sizes = picture_sizes(50)
        todo = draw(Augmentation("random_resized_crop"), 3, 4, 50, 32, sizes)
        assert np.array_equal(todo.window, augment.random_windows(sizes, 3, 4, 0.08))
        flip = np.sign(todo.affine[:, 0, 0])
        assert set(flip) == {-1.0, 1.0}
        expected = np.zeros((50, 2, 3))
        expected[:, 0, 0], expected[:, 1, 1] = flip, 1.0
        assert np.array_equal(todo.affine, expected)


SPACE = TrivialAugmentWide._AUGMENTATION_SPACE
OURS = tuple(OPERATIONS)
THEIRS = tuple(SPACE)
TONES = {
    "brightness": Tone.BRIGHTNESS,
    "color": Tone.COLOR,
    "contrast": Tone.CONTRAST,
    "sharpness": Tone.SHARPNESS,
    "posterize": Tone.POSTERIZE,
    "solarize": Tone.SOLARIZE,
    "autocontrast": Tone.AUTOCONTRAST,
    "equalize": Tone.EQUALIZE,
}

SIGNED_TONES = [(name, sign) for name in TONES for sign in (1, -1) if sign == 1 or SPACE[THEIRS[OURS.index(name)]][1]]


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
    """What `TrivialAugmentWide` does to grey levels (H, W, 3), in floating point and bilinearly."""
    unit = torch.from_numpy(image / 255.0).permute(2, 0, 1)
    wide = TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
    fill: Any = {torch.Tensor: None}  # black, without blending its edge once more
    changed: torch.Tensor = wide._apply_image_or_video_transform(
        unit, THEIRS[OURS.index(name)], magnitude, interpolation=InterpolationMode.BILINEAR, fill=fill
    )
    levels: npt.NDArray[np.float64] = changed.permute(1, 2, 0).numpy() * 255.0
    return levels


class TestTrivialAugmentDraw:
    def test_operations_are_the_papers(self) -> None:
        assert [name.replace("_", "") for name in OURS] == [name.lower() for name in THEIRS]
        assert len(OURS) == 14

    def test_operations_and_strengths_are_uniform(self) -> None:
        """Read back from what is drawn: 14 operations, 31 strengths, two signs."""
        count = 40_000
        draws = unit_floats(random_words(3 * count, seed=0, stream=Stream.TRIVIAL_AUGMENT)).reshape(count, 3)
        drawn = trivial_augment.draw(draws, 32)
        found = draw(Augmentation(trivial_augment=True), 0, 0, count, 32)
        assert np.array_equal(found.tone, drawn.tone)
        assert np.array_equal(found.strength, drawn.strength)
        assert np.array_equal(found.affine[:, :, :2], drawn.matrix.astype(np.float32))
        assert np.array_equal(found.affine[:, :, 2], drawn.offset.astype(np.float32))
        assert found.padding == "zeros"
        tones = np.bincount(drawn.tone, minlength=9)
        assert stats.chisquare(tones, [count * 6 / 14] + [count / 14] * 8).pvalue > P
        matrix, offset = drawn.matrix, drawn.offset
        moved = {
            "shear_x": (matrix[:, 0, 1] != 0) & (matrix[:, 1, 0] == 0),
            "shear_y": (matrix[:, 1, 0] != 0) & (matrix[:, 0, 1] == 0),
            "translate_x": (matrix[:, 0, 1] == 0) & (offset[:, 0] != 0),
            "translate_y": (matrix[:, 1, 0] == 0) & (offset[:, 1] != 0),
            "rotate": (matrix[:, 0, 1] != 0) & (matrix[:, 1, 0] != 0),
        }
        # Of strength 0 nothing moves: these are the images that seem untouched, with those of the identity.
        counts = [int(rows.sum()) for rows in moved.values()]
        counts.append(int((drawn.tone == Tone.NONE).sum()) - sum(counts))
        shares = np.array([30 / 31] * 5 + [1 + 5 / 31])
        assert stats.chisquare(counts, shares / shares.sum() * sum(counts)).pvalue > P
        for name, value, largest in (
            ("shear_x", matrix[:, 0, 1], 0.99),
            ("shear_y", matrix[:, 1, 0], 0.99),
            ("rotate", np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]), np.deg2rad(135)),
        ):
            level = value[moved[name]] / largest * 30
            assert np.abs(level - np.rint(level)).max() < 1e-9
            signed = np.rint(level).astype(int)
            assert_uniform(np.where(signed < 0, signed + 30, signed + 29), 60)  # -30 .. -1 and 1 .. 30
        for tone in (Tone.BRIGHTNESS, Tone.COLOR, Tone.CONTRAST, Tone.SHARPNESS):
            level = np.rint((drawn.strength[drawn.tone == tone] - 1) / 0.99 * 30).astype(int)
            share = np.where(np.arange(61) == 30, 2, 1) / 62  # 1.0 is drawn of both signs
            assert stats.chisquare(np.bincount(level + 30, minlength=61), share * len(level)).pvalue > P

    @pytest.mark.parametrize("sign", [-1, 1])
    @pytest.mark.parametrize("size", [32, 224])
    def test_strengths_are_torchvisions(self, sign: int, size: int) -> None:
        eye = np.tile(np.eye(2), (STRENGTHS, 1, 1))
        for name in OURS:
            drawn, magnitudes = operation(name, sign, size)
            matrix, offset = eye.copy(), np.zeros((STRENGTHS, 2))
            strength = np.zeros(STRENGTHS)
            if name.startswith("shear"):
                axis = "xy".index(name[-1])
                matrix[:, axis, 1 - axis] = magnitudes
                offset[:, axis] = magnitudes * size / 2
            elif name.startswith("translate"):
                offset[:, "xy".index(name[-1])] = -np.trunc(magnitudes)
            elif name == "rotate":
                cos, sin = np.cos(np.deg2rad(magnitudes)), np.sin(np.deg2rad(magnitudes))
                matrix = np.stack([cos, -sin, sin, cos], axis=1).reshape(-1, 2, 2)
            elif name == "posterize":
                strength = 256.0 - 2.0 ** (8 - magnitudes)
            elif name == "solarize":
                strength = 255.0 * magnitudes
            elif name in ("brightness", "color", "contrast", "sharpness"):
                strength = 1.0 + magnitudes
            np.testing.assert_allclose(drawn.matrix, matrix, rtol=0, atol=1e-6, err_msg=name)
            np.testing.assert_allclose(drawn.offset, offset, rtol=0, atol=1e-6 * size, err_msg=name)
            np.testing.assert_allclose(drawn.strength, strength, rtol=0, atol=2e-5, err_msg=name)
            assert drawn.strength.dtype == np.float32
            assert set(drawn.tone) == {TONES.get(name, Tone.NONE)}


class TestTrivialAugmentPixels:
    @pytest.mark.parametrize(("sign", "size"), [(1, 32), (-1, 27)])
    @pytest.mark.parametrize("name", OURS[:6])
    def test_geometry_is_torchvisions(self, name: str, sign: int, size: int) -> None:
        """The same direction, centre and black surroundings, everywhere, the rim included."""
        images = smooth(STRENGTHS, size)
        drawn, magnitudes = operation(name, sign, size)
        found = pixels(images, parameters_of(drawn))
        for index, magnitude in enumerate(magnitudes.tolist()):
            expected = by_torchvision(images[index].astype(np.float64), name, magnitude)
            assert np.abs(found[index] - expected).max() < 0.01

    @pytest.mark.parametrize("sign", [-1, 1])
    @pytest.mark.parametrize("name", OURS[1:6])
    def test_geometry_is_pillows(self, name: str, sign: int) -> None:
        """Where all four neighbours lie in the image; Pillow fades nothing out at the rim."""
        size = 32
        images = smooth(STRENGTHS, size)
        drawn, magnitudes = operation(name, sign, size)
        todo = parameters_of(drawn)
        found = pixels(images, todo)
        places = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=-1) - (size - 1) / 2
        for index, magnitude in enumerate(magnitudes.tolist()):
            channel = Image.fromarray(images[index, :, :, 0].astype(np.float32))
            if name == "rotate":
                moved = channel.rotate(magnitude, Image.Resampling.BILINEAR)
            else:
                # The paper's own calls: output to input, from the upper left corner; its translations are the negative
                # of torchvision's.
                level = -int(magnitude) if "translate" in name else magnitude
                coefficients = {
                    "shear_x": (1, level, 0, 0, 1, 0),
                    "shear_y": (1, 0, 0, level, 1, 0),
                    "translate_x": (1, 0, level, 0, 1, 0),
                    "translate_y": (1, 0, 0, 0, 1, level),
                }[name]
                moved = channel.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
            source = places @ todo.affine[index, :, :2].T + todo.affine[index, :, 2] + (size - 1) / 2
            inside = ((source >= 0) & (source <= size - 1)).all(axis=2)
            outside = ((source <= -1.01) | (source >= size + 0.01)).any(axis=2)
            difference = np.abs(found[index, :, :, 0] - np.asarray(moved))
            assert inside.any() or "translate" in name
            assert difference[inside].max(initial=0.0) < 0.01
            assert (found[index][outside] == 0.0).all()

    @pytest.mark.parametrize(
        ("name", "sign"), [case for case in SIGNED_TONES if case[0] not in ("posterize", "equalize")]
    )
    def test_tones_are_torchvisions(self, name: str, sign: int) -> None:
        """Of images in floating point, which torchvision does not round either."""
        images = np.concatenate([smooth(STRENGTHS - 2, 32), np.full((1, 32, 32, 3), 77, np.uint8), noise(1, 32)])
        drawn, magnitudes = operation(name, sign)
        found = pixels(images, parameters_of(drawn))
        for index, magnitude in enumerate(magnitudes.tolist()):
            image = images[index].astype(np.float64)
            expected = by_torchvision(image, name, magnitude)
            # A level that is the threshold itself: 255 times a float32 falls on either side of it.
            clear = np.abs(image - 255.0 * magnitude) > 1e-3 if name == "solarize" else True
            # torchvision's luma is 0.2989, 0.587, 0.114: a sum of 0.9999.
            tolerance = 0.03 if name in ("color", "contrast") else 0.001
            assert np.abs(found[index] - expected).max(where=clear, initial=0.0) < tolerance

    @pytest.mark.parametrize(("name", "sign"), [case for case in SIGNED_TONES if case[0] != "equalize"])
    def test_tones_are_pillows(self, name: str, sign: int) -> None:
        """But for Pillow's rounding: of the grey version, the mean and the smoothed image, then truncation."""
        images = np.concatenate([smooth(STRENGTHS - 1, 32), noise(1, 32)])
        drawn, magnitudes = operation(name, sign)
        found = pixels(images, parameters_of(drawn))
        enhancers: dict[str, Any] = {
            "brightness": ImageEnhance.Brightness,
            "color": ImageEnhance.Color,
            "contrast": ImageEnhance.Contrast,
            "sharpness": ImageEnhance.Sharpness,
        }
        exact = ("posterize", "solarize")
        for index, magnitude in enumerate(magnitudes.tolist()):
            picture = Image.fromarray(images[index])
            if name in enhancers:
                changed = enhancers[name](picture).enhance(1.0 + magnitude)
            elif name == "posterize":
                changed = ImageOps.posterize(picture, int(magnitude))
            elif name == "solarize":
                changed = ImageOps.solarize(picture, round(255.0 * magnitude, 3))
            else:
                changed = ImageOps.autocontrast(picture)
            difference = np.abs(found[index] - np.asarray(changed, dtype=np.float64)).max()
            assert difference == 0.0 if name in exact else difference <= 1.5

    def test_equalize_by_its_definition(self) -> None:
        """Level v becomes 255 (up to v - lowest) / (pixels - lowest), rounded; `lowest` pixels have the least level."""
        images = np.concatenate([smooth(10, 32), noise(2, 32), np.full((1, 32, 32, 3), 77, np.uint8), two_levels(32)])
        todo = Parameters(tone=np.full(len(images), Tone.EQUALIZE), strength=np.zeros(len(images), np.float32))
        found = pixels(images, todo)
        for image, shown in zip(images, found, strict=True):
            for channel in range(3):
                before, after = image[:, :, channel], shown[:, :, channel]
                lowest = np.sum(before == before.min())
                if lowest == before.size:
                    assert (after == before).all()
                    continue
                for value in np.unique(before):
                    made = np.unique(after[before == value])
                    assert len(made) == 1
                    exact = 255 * (np.sum(before <= value) - lowest) / (before.size - lowest)
                    assert made[0] == np.floor(made[0])
                    assert abs(made[0] - exact) <= 0.5 + 1e-4
                assert after.min() == 0.0
                assert after.max() == 255.0

    def test_equalize_is_close_to_pillows(self) -> None:
        """Pillow counts in whole steps of pixels / 255: it loses up to 255**2 / pixels levels, 4 here."""
        images = smooth(3, 256)
        todo = Parameters(tone=np.full(3, Tone.EQUALIZE), strength=np.zeros(3, np.float32))
        expected = np.stack([np.asarray(ImageOps.equalize(Image.fromarray(image))) for image in images])
        assert np.abs(pixels(images, todo) - expected).max() <= 4.5

    def test_nothing_happens_at_no_strength(self) -> None:
        images = noise(1, 32)
        for name in ("identity", *OURS[1:6], "brightness", "color", "contrast", "sharpness", "posterize"):
            drawn, _ = operation(name)
            first = parameters_of(drawn).map(lambda array: array[:1])
            assert np.abs(pixels(images, first) - images).max() < 1e-3, name

    def test_changes_only_the_images_it_is_drawn_for(self) -> None:
        images = noise(9, 32)
        todo = Parameters(tone=np.arange(9), strength=np.full(9, 1.5, np.float32))
        found = pixels(images, todo)
        for index in range(9):
            row = slice(index, index + 1)
            single = pixels(images[row], Parameters(tone=todo.tone[row], strength=todo.strength[row]))
            assert np.array_equal(single[0], found[index])
        assert np.array_equal(found[0], images[0])


class TestComposition:
    """TrivialAugment comes first; then what it made is cropped, flipped or warped."""

    @pytest.mark.parametrize("geometry", GEOMETRIES[1:])
    def test_maps_are_composed(self, geometry: str) -> None:
        both = draw(Augmentation(geometry, trivial_augment=True), 5, 6, 500, 32)
        first = draw(Augmentation(trivial_augment=True), 5, 6, 500, 32)
        then = draw(Augmentation(geometry), 5, 6, 500, 32)
        assert both.padding == then.padding
        last_row = np.tile([0.0, 0.0, 1.0], (500, 1, 1))
        one, other, whole = (np.concatenate([found.affine, last_row], axis=1) for found in (first, then, both))
        np.testing.assert_allclose(whole, one @ other, rtol=0, atol=1e-5)

    def test_pixels_with_crop_and_flip(self) -> None:
        """Cropping whole pixels interpolates nothing; beyond its rim the one warp still shows the image."""
        count, size = 200, 32
        images = smooth(count, size)
        both = pixels(images, draw(Augmentation("crop_flip", trivial_augment=True), 5, 6, count, size))
        first = pixels(images, draw(Augmentation(trivial_augment=True), 5, 6, count, size))
        crop = draw(Augmentation("crop_flip"), 5, 6, count, size).affine
        for index in range(count):
            left, top = (crop[index, :, 2] + 4).astype(int)
            around = np.pad(first[index], ((4, 4), (4, 4), (0, 0)), constant_values=np.nan)
            expected = around[top : top + size, left : left + size]
            shown = both[index, :, ::-1] if crop[index, 0, 0] < 0 else both[index]
            known = ~np.isnan(expected)
            assert known.mean() >= (28 / 32) ** 2
            assert np.abs(shown[known] - expected[known]).max() < 0.01


class TestCutout:
    @pytest.mark.parametrize(("side", "size"), [(8, 32), (7, 32), (1, 32), (16, 27)])
    def test_holes(self, side: int, size: int) -> None:
        hole = draw(Augmentation(cutout=side), 0, 0, 40_000, size).hole
        assert (hole >= 0).all()
        assert (hole <= size).all()
        for axis in range(2):
            near, far = hole[:, axis], hole[:, axis + 2]
            # The pixel in the middle: `side // 2` behind the near end, unless that is cut off.
            middle = np.where(near > 0, near + side // 2, far - side + side // 2)
            assert_uniform(middle, size)
            assert np.array_equal(far, np.minimum(middle - side // 2 + side, size))
            assert np.array_equal(near, np.maximum(middle - side // 2, 0))
        assert abs(np.corrcoef(hole[:, 0], hole[:, 1])[0, 1]) < 4 / math.sqrt(40_000)
        lengths = [min(middle - side // 2 + side, size) - max(middle - side // 2, 0) for middle in range(size)]
        area = (hole[:, 2] - hole[:, 0]) * (hole[:, 3] - hole[:, 1])
        assert area.max() == side**2
        assert area.mean() == pytest.approx(np.mean(lengths) ** 2, rel=0.02)

    def test_larger_than_the_image(self) -> None:
        hole = draw(Augmentation(cutout=100), 0, 0, 100, 32).hole
        assert (hole == [0, 0, 32, 32]).all()

    def test_is_the_mean(self) -> None:
        """Zero after normalising, and nothing else is touched."""
        images = smooth(50, 32)
        kind = Augmentation("notebook", trivial_augment=True)
        todo = draw(Augmentation("notebook", trivial_augment=True, cutout=8), 0, 0, 50, 32)
        whole, cut = (pixels(images, found, 0.45, 0.25) for found in (draw(kind, 0, 0, 50, 32), todo))
        for index, (left, top, right, bottom) in enumerate(todo.hole.tolist()):
            assert (cut[index, top:bottom, left:right] == 0.0).all()
            whole[index, top:bottom, left:right] = 0.0
        assert np.array_equal(cut, whole)


def mix_draws(count: int) -> npt.NDArray[np.float64]:
    return unit_floats(random_words(4 * count, seed=0, stream=Stream.MIX)).reshape(count, 4)


class TestMix:
    @pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
    def test_mixup_is_beta(self, alpha: float) -> None:
        found = draw(Augmentation(mixup=alpha), 0, 0, 10_000, 32)
        assert stats.kstest(found.own.astype(np.float64), stats.beta(alpha, alpha).cdf).pvalue > P
        assert np.array_equal(found.own, found.blend)
        assert found.own.min() >= 0.0
        assert found.own.max() <= 1.0
        area = (found.box[:, 2] - found.box[:, 0]) * (found.box[:, 3] - found.box[:, 1])
        assert (area == 0).all()

    @pytest.mark.parametrize("alpha", [0.01, 1e-3, 100.0])
    def test_strange_alphas(self, alpha: float) -> None:
        for kind in (Augmentation(mixup=alpha), Augmentation(cutmix=alpha)):
            found = draw(kind, 0, 0, 1000, 32)
            assert np.isfinite(found.own).all()
            assert ((found.own >= 0) & (found.own <= 1)).all()
            assert ((found.box >= 0) & (found.box <= 32)).all()

    @pytest.mark.parametrize(("alpha", "size"), [(0.2, 32), (1.0, 32), (2.0, 27), (1.0, 224)])
    def test_cutmix(self, alpha: float, size: int) -> None:
        count = 10_000
        found = draw(Augmentation(cutmix=alpha), 0, 0, count, size)
        assert (found.blend == 1.0).all()
        box = found.box
        assert (box >= 0).all()
        assert (box <= size).all()
        assert (box[:, 2:] >= box[:, :2]).all()
        width, height = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
        # The label's share is what is left of the image, to the pixel.
        assert np.array_equal(found.own, (1 - width * height / size**2).astype(np.float32))
        # Before the border cuts it off, the box has the share that was drawn, rounded down to whole pixels.
        share = stats.beta(alpha, alpha).ppf(mix_draws(count)[:, 1])
        side = np.floor(size * np.sqrt(1.0 - share))
        middle = np.floor(mix_draws(count)[:, 2:] * size)
        for axis in range(2):
            near = middle[:, axis] - side // 2
            assert np.array_equal(box[:, axis], near.clip(0, size))
            assert np.array_equal(box[:, axis + 2], (near + side).clip(0, size))

    def test_both_evenly(self) -> None:
        count = 10_000
        found = draw(Augmentation(mixup=0.2, cutmix=1.0), 0, 0, count, 32)
        cut = mix_draws(count)[:, 0] < 0.5
        assert stats.binomtest(int(cut.sum()), count).pvalue > P
        for rows, kind in ((cut, Augmentation(cutmix=1.0)), (~cut, Augmentation(mixup=0.2))):
            alone = draw(kind, 0, 0, count, 32)
            for name in ("blend", "box", "own"):
                assert np.array_equal(getattr(found, name)[rows], getattr(alone, name)[rows])
        assert (found.blend[~cut] < 1.0).any()

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_mixed_pixels(self, layout: torch.memory_format) -> None:
        rng = np.random.default_rng(0)
        images, partners = rng.normal(size=(2, 40, 3, 32, 32)).astype(np.float32)
        todo = draw(Augmentation(mixup=0.4, cutmix=1.0), 0, 0, 40, 32)
        found = torch_ops.mix(
            torch.from_numpy(images).to(memory_format=layout),
            torch.from_numpy(partners).to(memory_format=layout),
            torch.from_numpy(todo.blend),
            torch.from_numpy(todo.box),
        )
        assert found.dtype == torch.float32
        assert found.is_contiguous(memory_format=torch.channels_last)
        blend = todo.blend.astype(np.float64)[:, None, None, None]
        expected = blend * images + (1.0 - blend) * partners
        for index, (left, top, right, bottom) in enumerate(todo.box.tolist()):
            expected[index, :, top:bottom, left:right] = partners[index, :, top:bottom, left:right]
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
        cut = todo.blend == 1.0  # nothing is interpolated there
        assert 10 < cut.sum() < 30
        assert np.array_equal(found.numpy()[cut], expected[cut].astype(np.float32))

    def test_mixed_targets(self) -> None:
        rng = np.random.default_rng(0)
        labels, partners = rng.integers(0, 10, (2, 200))
        own = draw(Augmentation(mixup=0.4, cutmix=1.0), 0, 0, 200, 32).own
        found = torch_ops.mixed_targets(torch.from_numpy(labels), torch.from_numpy(partners), torch.from_numpy(own), 10)
        expected = np.zeros((200, 10))
        np.add.at(expected, (np.arange(200), labels), own.astype(np.float64))
        np.add.at(expected, (np.arange(200), partners), 1.0 - own.astype(np.float64))
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-7)
        np.testing.assert_allclose(found.sum(dim=1).numpy(), 1.0, rtol=0, atol=1e-6)
        same = labels == partners
        assert same.any()
        assert np.array_equal(found.numpy()[same], np.eye(10)[labels[same]])


def noise(count: int, size: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def two_levels(size: int) -> npt.NDArray[np.uint8]:
    """One image of two levels, most of it dark."""
    return np.where(np.random.default_rng(2).random((1, size, size, 3)) < 0.9, 3, 200).astype(np.uint8)

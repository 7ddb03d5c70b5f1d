"""Splits, orders and warps are pure functions of (seed, epoch, index), and never change silently."""

import hashlib

import numpy as np
import numpy.typing as npt
import pytest

from densenet_dist.data.plan import (
    AUGMENTATIONS,
    BatchPlan,
    Stream,
    draw_affine,
    epoch_order,
    random_words,
    rank_slice,
    split_indices,
    unit_floats,
)
from densenet_dist.errors import ConfigError

LABELS = np.arange(1000) % 10
SIZES = [(1, 1), (1, 64), (7, 8), (8, 8), (9, 8), (64, 64), (65, 64), (71, 64), (72, 64), (127, 64), (1000, 96)]

WORDS = [5683752733477740539, 14118103966592500317]
SPLIT = "65b98d8fc3568378"
STRATIFIED = "4717521b493e4c9e"
ORDER = "7f67f07ddf4bfd94"
CROP_FLIP = ("85daec488d06d345", "6b8d45db91135a02")
NOTEBOOK_999 = [0.9585915, -0.2036316, 0.1992568, 0.9796378, 2.2412117, 4.5123806]


def sha(array: npt.NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


class TestGolden:
    """What the plan gave when it was first released. A difference here makes every run of old unrepeatable."""

    def test_words(self) -> None:
        assert random_words(2, seed=7, stream=Stream.ORDER, epoch=3).tolist() == WORDS

    def test_split(self) -> None:
        assert sha(split_indices(LABELS, 0.1, 42)[1]) == SPLIT
        assert sha(split_indices(LABELS, 0.1, 42, stratified=True)[1]) == STRATIFIED

    def test_order(self) -> None:
        assert sha(epoch_order(np.arange(50_000), 42, 7)) == ORDER

    def test_crop_flip(self) -> None:
        affine = draw_affine("crop_flip", 42, 7, 1000, 32)
        assert affine is not None
        assert (sha(affine.matrix), sha(affine.offset)) == CROP_FLIP

    def test_notebook(self) -> None:
        # Sines and cosines may differ in the last bit from one processor to another: not a hash.
        affine = draw_affine("notebook", 42, 7, 1000, 32)
        assert affine is not None
        found = np.concatenate([affine.matrix[999].ravel(), affine.offset[999]])
        np.testing.assert_allclose(found, NOTEBOOK_999, rtol=0, atol=1e-6)


class TestRandomWords:
    def test_streams_differ(self) -> None:
        keys = [(seed, stream, epoch) for seed in (0, 1, 2**63 - 1) for stream in Stream for epoch in (0, 1, 2**40)]
        firsts = {int(random_words(1, seed=s, stream=p, epoch=e)[0]) for s, p, e in keys}
        assert len(firsts) == len(keys)

    def test_longer_draw_begins_with_the_shorter(self) -> None:
        short, long = (random_words(count, seed=1, stream=Stream.SPLIT) for count in (5, 50))
        assert short.tolist() == long[:5].tolist()

    def test_unit_floats_are_uniform(self) -> None:
        draws = unit_floats(random_words(100_000, seed=0, stream=Stream.AUGMENTATION))
        assert 0.0 <= draws.min() < draws.max() < 1.0
        counts, _ = np.histogram(draws, bins=20, range=(0.0, 1.0))
        assert np.sum((counts - 5000) ** 2 / 5000) < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


class TestSplit:
    @pytest.mark.parametrize("stratified", [False, True])
    @pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.1, 100), (0.123, 123), (0.999, 999)])
    def test_is_a_partition(self, stratified: bool, fraction: float, expected: int) -> None:
        train, val = split_indices(LABELS, fraction, 3, stratified=stratified)
        assert len(val) == expected
        assert train.dtype == val.dtype == np.int64
        assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(1000))
        assert np.all(np.diff(train) > 0)
        assert np.all(np.diff(val) > 0)

    def test_stratified_is_exact(self) -> None:
        _, val = split_indices(LABELS, 0.1, 3, stratified=True)
        assert np.bincount(LABELS[val]).tolist() == [10] * 10

    def test_stratified_shares_out_what_does_not_divide(self) -> None:
        labels = np.repeat([0, 1, 2], [70, 20, 10])
        _, val = split_indices(labels, 0.25, 0, stratified=True)
        assert np.bincount(labels[val]).tolist() == [18, 5, 2]  # of 17.5, 5, 2.5: ties to the lower class

    def test_depends_on_the_seed_alone(self) -> None:
        first, again, other = (split_indices(LABELS, 0.1, seed)[1].tolist() for seed in (1, 1, 2))
        assert first == again
        assert first != other

    @pytest.mark.parametrize("fraction", [-0.1, 1.0, 1.5, float("nan")])
    def test_fraction_out_of_range(self, fraction: float) -> None:
        with pytest.raises(ConfigError, match="val_fraction"):
            split_indices(LABELS, fraction, 0)

    def test_nothing_left(self) -> None:
        with pytest.raises(ConfigError, match="no validation image"):
            split_indices(LABELS[:4], 0.1, 0)
        with pytest.raises(ConfigError, match="no training image"):
            split_indices(LABELS[:4], 0.9, 0)


class TestOrder:
    def test_is_a_permutation(self) -> None:
        indices = np.array([3, 5, 8, 13, 21])
        order = epoch_order(indices, 0, 0)
        assert order.dtype == np.int64
        assert sorted(order) == indices.tolist()

    def test_differs_by_seed_and_epoch(self) -> None:
        orders = {tuple(epoch_order(np.arange(20), seed, epoch)) for seed in range(3) for epoch in range(3)}
        assert len(orders) == 9

    def test_every_place_is_equally_likely(self) -> None:
        # Where image 0 of eight comes, over 4,000 epochs: chi-square, 7 degrees of freedom, p = 0.001.
        places = [int(np.flatnonzero(epoch_order(np.arange(8), 5, epoch) == 0)[0]) for epoch in range(4000)]
        assert np.sum((np.bincount(places, minlength=8) - 500) ** 2 / 500) < 24.3

    def test_epochs_are_uncorrelated(self) -> None:
        first, second = (np.argsort(epoch_order(np.arange(50_000), 0, epoch)) for epoch in (0, 1))
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


class TestBatchPlan:
    @pytest.mark.parametrize(("images", "batch"), SIZES)
    def test_covers_every_image_once(self, images: int, batch: int) -> None:
        plan = BatchPlan(images, batch)
        bounds = [plan.bounds(step) for step in range(plan.steps)]
        assert np.array_equal(np.concatenate([np.arange(*pair) for pair in bounds]), np.arange(images))
        sizes = [stop - start for start, stop in bounds]
        assert plan.smallest == min(sizes)
        assert plan.smallest >= min(images, -(-batch // 8))
        assert max(sizes) < batch + -(-batch // 8)
        assert all(start == step * batch for step, (start, _) in enumerate(bounds))

    @pytest.mark.parametrize(
        ("images", "steps", "last"), [(64, 1, 64), (71, 1, 71), (72, 2, 8), (135, 2, 71), (40, 1, 40)]
    )
    def test_tail(self, images: int, steps: int, last: int) -> None:
        plan = BatchPlan(images, 64)
        start, stop = plan.bounds(plan.steps - 1)
        assert (plan.steps, stop - start) == (steps, last)

    def test_no_such_step(self) -> None:
        with pytest.raises(IndexError, match="step 2"):
            BatchPlan(128, 64).bounds(2)

    def test_nothing_to_cut(self) -> None:
        with pytest.raises(ConfigError, match="0 images"):
            BatchPlan(0, 64)

    def test_ranks_share_a_batch(self) -> None:
        batch = np.arange(10)
        assert [rank_slice(batch, rank, 3).tolist() for rank in range(3)] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


class TestAffine:
    def test_none(self) -> None:
        assert draw_affine("none", 0, 0, 10, 32) is None

    def test_unknown(self) -> None:
        with pytest.raises(ConfigError, match=r"'mixup'.*none, notebook, crop_flip"):
            draw_affine("mixup", 0, 0, 10, 32)

    @pytest.mark.parametrize("name", AUGMENTATIONS[1:])
    def test_depends_on_seed_epoch_and_index_alone(self, name: str) -> None:
        few, many, later, other = (
            draw_affine(name, seed, epoch, count, 32)
            for seed, epoch, count in [(1, 2, 10), (1, 2, 500), (1, 3, 10), (2, 2, 10)]
        )
        assert few is not None
        assert many is not None
        assert later is not None
        assert other is not None
        assert np.array_equal(few.matrix, many.matrix[:10])
        assert np.array_equal(few.offset, many.offset[:10])
        assert not np.array_equal(few.offset, later.offset)
        assert not np.array_equal(few.offset, other.offset)

    def test_notebook_ranges(self) -> None:
        affine = draw_affine("notebook", 0, 0, 20_000, 32)
        assert affine is not None
        assert affine.padding == "border"
        assert affine.matrix.dtype == affine.offset.dtype == np.float32
        zoom = np.linalg.norm(affine.matrix, axis=1)  # columns are R (zx, 0) and R (0, zy)
        angle = np.rad2deg(np.arctan2(-affine.matrix[:, 0, 1], affine.matrix[:, 1, 1]))
        for values, low, high in ((zoom[:, 0], 0.9, 1.1), (zoom[:, 1], 0.9, 1.1), (angle, -20, 20)):
            assert low - 1e-4 <= values.min() < low + 0.01 * (high - low)
            assert high - 0.01 * (high - low) < values.max() <= high + 1e-4
        assert abs(np.corrcoef(zoom.T)[0, 1]) < 0.03
        flipped = np.linalg.det(affine.matrix) < 0
        assert abs(flipped.mean() - 0.5) < 0.015
        assert 3.9 < np.abs(affine.offset).max() <= 4.0 * np.sqrt(2.0)

    def test_crop_flip_offsets(self) -> None:
        affine = draw_affine("crop_flip", 0, 0, 20_000, 32)
        assert affine is not None
        assert affine.padding == "zeros"
        for axis in range(2):
            values, counts = np.unique(affine.offset[:, axis], return_counts=True)
            assert values.tolist() == list(range(-4, 5))
            assert np.sum((counts - 20_000 / 9) ** 2 / (20_000 / 9)) < 26.1  # 8 degrees of freedom, p = 0.001
        assert abs(np.mean(affine.matrix[:, 0, 0] < 0) - 0.5) < 0.015

    def test_dali_and_torch_say_the_same(self) -> None:
        """Both forms take the middle of each output pixel to the same place of the input."""
        affine = draw_affine("notebook", 0, 0, 50, 32)
        assert affine is not None
        pixels = np.stack(np.meshgrid(np.arange(32), np.arange(32)), axis=-1).reshape(-1, 2) + 0.5
        dali = affine.dali_matrix(32).astype(np.float64)
        by_dali = np.einsum("nij,pj->npi", dali[:, :, :2], pixels) + dali[:, None, :, 2]
        theta = affine.torch_theta(32).astype(np.float64)
        by_torch = np.einsum("nij,pj->npi", theta[:, :, :2], pixels / 16 - 1) + theta[:, None, :, 2]
        np.testing.assert_allclose(by_dali, (by_torch + 1) * 16, rtol=0, atol=1e-5)

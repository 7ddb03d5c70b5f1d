"""Splits, orders and the generated set are pure functions of (seed, epoch, index), and never change silently."""

import hashlib

import numpy as np
import numpy.typing as npt
import pytest

from densenet_dist.data import shapes
from densenet_dist.data.plan import BatchPlan, Stream, balanced_order, epoch_order, split_indices
from densenet_dist.errors import ConfigError

LABELS = np.arange(1000) % 10
MEANS = [66.648, 180.464, 149.284, 90.747, 92.508, 206.532, 174.726, 92.961, 146.889, 92.018]
SIZES = [(1, 64), (64, 64), (71, 64), (72, 64), (1000, 96)]


def sha(array: npt.NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def test_golden() -> None:
    """What the plan gave when it was first released. A difference here makes every run of old unrepeatable."""
    test_split = Stream.TEST_SPLIT
    assert sha(split_indices(LABELS, 0.1, 42)[1]) == "65b98d8fc3568378"
    assert sha(split_indices(LABELS, 0.1, 42, stratified=True)[1]) == "4717521b493e4c9e"
    assert sha(split_indices(LABELS, 0.1, 42, stream=test_split)[1]) == "87826d9dc35f1ec5"
    assert sha(split_indices(LABELS, 0.1, 42, stratified=True, stream=test_split)[1]) == "17eaa3b474f6620e"
    assert sha(epoch_order(np.arange(50_000), 42, 7)) == "7f67f07ddf4bfd94"


def test_a_balanced_epoch_has_every_class_equally_often() -> None:
    labels, indices = np.repeat([0, 1, 2], [80, 15, 5]), np.arange(100) * 7
    seen = np.zeros(3, dtype=int)
    for epoch in range(3):
        order = balanced_order(indices, labels, 42, epoch)
        assert np.array_equal(order, balanced_order(indices, labels, 42, epoch))
        found, counts = np.unique(order // 7, return_counts=True)
        per_class = np.bincount(labels[order // 7])
        assert sorted(per_class) == [33, 33, 34]
        seen += per_class
        for label in range(3):  # none twice while another is not there yet
            assert np.ptp(counts[labels[found] == label]) <= 1
        assert set(labels[found[counts == 1]]) == {0}
    assert seen.tolist() == [100, 100, 100]
    assert not np.array_equal(order, balanced_order(indices, labels, 42, 0))


def test_golden_shapes() -> None:
    """What the generated set looked like then, coarsely: a pixel may round differently elsewhere."""
    images, _ = shapes.generate(10, seed=0, part=0)
    assert images.reshape(10, -1).mean(axis=1) == pytest.approx(MEANS, abs=0.01)


def test_a_generated_image_depends_on_seed_part_and_number_alone() -> None:
    images, labels = shapes.generate(300, seed=9, part=1)
    more, more_labels = shapes.generate(700, seed=9, part=1)
    assert np.array_equal(images, more[:300])
    assert np.array_equal(labels, more_labels[:300])
    sets = [shapes.generate(20, seed=seed, part=part)[0] for seed in (0, 1) for part in (0, 1)]
    assert len({images.tobytes() for images in sets}) == 4


class TestSplit:
    @pytest.mark.parametrize("stratified", [False, True])
    @pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.123, 123)])
    def test_is_a_partition(self, stratified: bool, fraction: float, expected: int) -> None:
        train, val = split_indices(LABELS, fraction, 3, stratified=stratified)
        assert len(val) == expected
        assert train.dtype == val.dtype == np.int64
        assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(1000))
        assert np.all(np.diff(train) > 0)
        assert np.all(np.diff(val) > 0)

    def test_stratified_shares_out_what_does_not_divide(self) -> None:
        labels = np.repeat([0, 1, 2], [70, 20, 10])
        _, val = split_indices(labels, 0.25, 0, stratified=True)
        assert np.bincount(labels[val]).tolist() == [18, 5, 2]  # of 17.5, 5, 2.5: ties to the lower class

    @pytest.mark.parametrize("stratified", [False, True])
    def test_every_class_keeps_an_image_to_train_on(self, stratified: bool) -> None:
        labels = np.repeat([0, 1, 2, 3, 4], [27, 27, 1, 1, 2])
        train, val = split_indices(labels, 0.6, 6, stratified=stratified)
        assert np.bincount(labels[train], minlength=5).min() == 1
        assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(58))
        with pytest.raises(ConfigError, match=r"test_fraction=0\.5 of 4 images leaves no test"):
            split_indices(np.arange(4), 0.5, 0, stream=Stream.TEST_SPLIT)

    @pytest.mark.parametrize(
        ("fraction", "said"),
        [(-0.1, "val_fraction"), (1.0, "val_fraction"), (0.1, "no validation image"), (0.9, "no training image")],
    )
    def test_fraction_that_makes_no_sense(self, fraction: float, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            split_indices(LABELS[:4], fraction, 0)


@pytest.mark.parametrize(("images", "batch"), SIZES)
def test_batches_cover_every_image_once(images: int, batch: int) -> None:
    plan = BatchPlan(images, batch)
    bounds = [plan.bounds(step) for step in range(plan.steps)]
    assert np.array_equal(np.concatenate([np.arange(*pair) for pair in bounds]), np.arange(images))
    sizes = [stop - start for start, stop in bounds]
    assert plan.smallest == min(sizes)
    assert plan.smallest >= min(images, -(-batch // 8))
    assert max(sizes) < batch + -(-batch // 8)
    assert all(start == step * batch for step, (start, _) in enumerate(bounds))
    with pytest.raises(IndexError, match=f"step {plan.steps}"):
        plan.bounds(plan.steps)

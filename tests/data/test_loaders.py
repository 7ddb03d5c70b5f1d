"""Both engines make every batch as the plan says: for any world size, from any step on, in any order."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_loaders import MEAN, SPLIT, STD, assert_same, engine_of, eval_loader, numbered, train_loader, write_pictures

from densenet_dist.data import augment
from densenet_dist.data.augment import NO_AUGMENTATION, Augmentation
from densenet_dist.data.image_files import Split
from densenet_dist.data.loader import Batch

MIXED = Augmentation("notebook", mixup=0.4, cutmix=1.0)
EVERYTHING = Augmentation("notebook", trivial_augment=True, cutout=8, mixup=0.4, cutmix=1.0)


@pytest.fixture
def pictures(tmp_path: Path) -> Split:
    """46 pictures of several sizes in files."""
    return write_pictures(tmp_path / "pictures", 2, 23, 32)


def joined(ranks: list[list[Batch]]) -> Iterator[Batch]:
    """The global batches that the ranks have parts of."""
    for parts in zip(*ranks, strict=True):
        size = parts[0].global_size
        assert [part.global_size for part in parts] == [size] * len(parts)
        assert [len(part.images) for part in parts] == [
            len(range(size)[rank :: len(parts)]) for rank in range(len(parts))
        ]

        def whole(name: str, parts: tuple[Batch, ...] = parts, size: int = size) -> torch.Tensor:
            pieces = [getattr(part, name) for part in parts]
            out = torch.empty(size, *pieces[0].shape[1:], dtype=pieces[0].dtype)
            for rank, piece in enumerate(pieces):
                out[rank :: len(parts)] = piece
            return out

        yield Batch(whole("images"), whole("targets"), size)


class TestBatch:
    def test_does_not_touch_the_data(self, kind: str) -> None:
        split = numbered(64)
        before = split.images.copy()
        split.images.flags.writeable = False
        for augmentation in (NO_AUGMENTATION, EVERYTHING):
            for batch in train_loader(kind, split, augmentation=augmentation).epoch(0):
                assert batch.images.is_contiguous(memory_format=torch.channels_last)
                batch.images.zero_()
        for batch in eval_loader(kind, split):
            batch.images.zero_()
            batch.targets.zero_()
        assert np.array_equal(split.images, before)

    def test_threads_prefetch_and_autocast_leave_bits_alone(self, kind: str, pictures: Split) -> None:
        for split in (SPLIT, pictures):
            expected = list(train_loader(kind, split, augmentation=EVERYTHING).epoch(0))
            for options in ({"threads": 4}, {"prefetch": 0}, {"prefetch": 4}):
                assert_same(train_loader(kind, split, augmentation=EVERYTHING, **options).epoch(0), expected)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert_same(train_loader(kind, split, augmentation=EVERYTHING, prefetch=0).epoch(0), expected)

    def test_kept_batches_stay_as_they_are(self, kind: str) -> None:
        """DALI hands out views of its own memory."""
        loader = train_loader(kind, augmentation=MIXED)
        kept: list[Batch] = []
        copies: list[Batch] = []
        for batch in (batch for epoch in range(3) for batch in loader.epoch(epoch)):
            kept.append(batch)
            copies.append(Batch(batch.images.clone(), batch.targets.clone(), batch.global_size))
        assert_same(kept, copies)
        del loader
        assert_same(kept, copies)
        assert len({batch.images.data_ptr() for batch in kept}) == len(kept)


class TestTrainLoader:
    @pytest.mark.parametrize(("count", "batch"), [(203, 32), (195, 32), (20, 32)])
    def test_every_image_once_an_epoch(self, kind: str, count: int, batch: int) -> None:
        loader = train_loader(kind, numbered(count), batch=batch)
        for epoch in range(2):
            batches = list(loader.epoch(epoch))
            assert len(batches) == loader.steps_per_epoch
            assert sorted(torch.cat([found.targets for found in batches]).tolist()) == list(range(count))
            assert [len(found.images) for found in batches] == [found.global_size for found in batches]

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_same_global_batches_for_every_world_size(self, kind: str, world_size: int, pictures: Split) -> None:
        """Where images are mixed some partners are of other ranks: in even and odd batches and tails alike."""
        mixed, cropped = (
            Augmentation("none", mixup=0.4, cutmix=1.0),
            replace(EVERYTHING, geometry="random_resized_crop"),
        )
        for split, batch, augmentation in (
            (SPLIT, 32, Augmentation("notebook")),
            (SPLIT, 32, EVERYTHING),
            (numbered(195), 32, mixed),
            (numbered(64), 33, mixed),
            (pictures, 16, cropped),
        ):
            options: Any = {"split": split, "batch": batch, "augmentation": augmentation}
            options["balanced"] = split is pictures
            ranks = [
                list(train_loader(kind, **options, rank=rank, world_size=world_size).epoch(5))
                for rank in range(world_size)
            ]
            assert_same(joined(ranks), train_loader(kind, **options).epoch(5))

    def test_starts_at_any_step_and_goes_on_into_the_next_epoch(self, kind: str) -> None:
        """As a new process does that resumes a run."""
        whole = train_loader(kind, augmentation=EVERYTHING)
        expected = [batch for epoch in (2, 3) for batch in whole.epoch(epoch)]
        for step in (0, 1, 6):
            assert_same(whole.epoch(2, start_step=step), expected[step:7])
            resumed = train_loader(kind, augmentation=EVERYTHING)
            assert_same([*resumed.epoch(2, start_step=step), *resumed.epoch(3)], expected[step:])

    def test_a_repeated_image_of_a_small_class_is_augmented_anew(self, kind: str) -> None:
        split = numbered(64)
        split.labels[:] = np.arange(64) == 5
        batches = list(train_loader(kind, split, Augmentation("crop_flip"), balanced=True).epoch(0))
        labels, images = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("targets", "images"))
        assert labels.bincount().tolist() == [32, 32]
        assert len({image.numpy().tobytes() for image in images[labels == 1]}) > 20

    def test_an_abandoned_epoch_disturbs_no_other(self, kind: str) -> None:
        loader = train_loader(kind)
        expected = list(train_loader(kind).epoch(1))
        for steps in (1, 3):
            abandoned = loader.epoch(0)
            assert len(list(islice(abandoned, steps))) == steps
            del abandoned
            assert_same(loader.epoch(1), expected)

    def test_loaders_that_share_an_engine(self, kind: str) -> None:
        """Training is interrupted for validation; and two orders of the same images at a time."""
        engine = engine_of(kind)
        some = np.arange(0, 203, 5)
        train = train_loader(engine)
        other = train_loader(engine, augmentation=EVERYTHING, seed=8)
        evaluation = eval_loader(engine, indices=some, batch=10)
        expected = list(train_loader(kind).epoch(0))
        expected_other = list(train_loader(kind, augmentation=EVERYTHING, seed=8).epoch(0))
        expected_evaluation = list(eval_loader(kind, indices=some, batch=10))
        found, found_other = [], []
        for one, two in zip(train.epoch(0), other.epoch(0), strict=True):
            found.append(one)
            found_other.append(two)
            assert_same(evaluation, expected_evaluation)
        assert_same(found, expected)
        assert_same(found_other, expected_other)


@pytest.mark.parametrize("batch", [32, 31])
def test_mixing_is_its_definition(kind: str, batch: int) -> None:
    """Image p of a global batch of n is mixed with image (p + n // 2) % n, by the share that was drawn for it."""
    augmentation = Augmentation("notebook", cutout=10, mixup=1.0, cutmix=0.3)
    plain = Augmentation(augmentation.geometry, cutout=augmentation.cutout)
    drawn = augment.draw(augmentation, 3, 2, 203, 32)
    columns = np.arange(32)
    batches = zip(
        train_loader(kind, batch=batch, augmentation=augmentation).epoch(2),
        train_loader(kind, batch=batch, augmentation=plain).epoch(2),
        strict=True,
    )
    for mixed, single in batches:
        size = mixed.global_size
        targets = np.zeros((size, 203))
        for place, row in enumerate(single.targets.tolist()):
            partner = (place + size // 2) % size
            left, top, right, bottom = drawn.box[row]
            inside = ((columns >= left) & (columns < right)) & ((columns >= top) & (columns < bottom))[:, None]
            share = np.where(inside, 0.0, drawn.blend[row])
            own, other = single.images[place].numpy(), single.images[partner].numpy()
            np.testing.assert_allclose(mixed.images[place].numpy(), share * own + (1 - share) * other, atol=1e-5)
            targets[place, row] += drawn.label_share[row]
            targets[place, int(single.targets[partner])] += 1 - drawn.label_share[row]
        np.testing.assert_allclose(mixed.targets.numpy(), targets, atol=1e-6)
        np.testing.assert_allclose(mixed.targets.sum(dim=1).numpy(), 1.0, atol=1e-6)
        assert (mixed.targets >= 0.0).all()


class TestRecipes:
    """Batches to be made later, as a CUDA graph does it."""

    @pytest.mark.parametrize("augmentation", [NO_AUGMENTATION, replace(MIXED, cutout=4)], ids=str)
    def test_make_the_same_batches(self, augmentation: Augmentation) -> None:
        for rank, world_size in ((0, 1), (0, 3), (2, 3)):
            loader = train_loader("torch", augmentation=augmentation, rank=rank, world_size=world_size)
            recipes = loader.recipes(2, 1)
            assert recipes is not None
            assert_same((recipe.compute() for recipe in recipes), loader.epoch(2, 1))

    def test_there_are_none_where_the_host_has_a_part(self, pictures: Split) -> None:
        assert train_loader("torch", pictures).recipes(0) is None
        assert train_loader("dali").recipes(0) is None
        assert train_loader("torch", augmentation=Augmentation("none", trivial_augment=True)).recipes(0) is None


@pytest.mark.parametrize(("count", "batch", "world_size"), [(203, 32, 1), (203, 32, 2), (5, 32, 7), (3, 1, 2)])
def test_evaluation_shows_every_image_once_over_all_ranks(kind: str, count: int, batch: int, world_size: int) -> None:
    split = numbered(count)
    loaders = [eval_loader(kind, split, batch=batch, rank=r, world_size=world_size) for r in range(world_size)]
    ranks = [list(loader) for loader in loaders]
    assert sorted(label for rank in ranks for part in rank for label in part.targets.tolist()) == list(range(count))
    assert [len(rank) for rank in ranks] == [len(loader) for loader in loaders]
    expected = (split.images / 255.0 - MEAN) / STD
    for part in (part for rank in ranks for part in rank):
        assert 0 < len(part.targets) == len(part.images) <= batch
        assert part.targets.tolist() == sorted(part.targets.tolist())
        found = part.images.permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(found, expected[part.targets.numpy()], rtol=0, atol=1e-6)
    for step, part in enumerate(ranks[0]):
        shares = [rank[step].targets for rank in ranks if step < len(rank)]
        assert part.global_size == sum(len(share) for share in shares)

"""Pictures that become bad while a run uses them: another of the class stands in, or one message says which and why."""

import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_loaders import NOTEBOOK, assert_same, eval_loader, write_pictures
from image_loaders import engine_of as any_engine
from image_loaders import train_loader as any_loader
from PIL import Image

from densenet_dist.data.augment import Augmentation
from densenet_dist.data.engine import Engine
from densenet_dist.data.image_files import ImageFiles, Split
from densenet_dist.data.loader import Batch, TrainLoader
from densenet_dist.data.plan import epoch_order
from densenet_dist.data.substitutes import Substitutes
from densenet_dist.errors import DataError

CLASSES, OF_EACH = 3, 14
COUNT = CLASSES * OF_EACH
SEED = 7
BATCH = 6
MIXED = Augmentation("random_resized_crop", trivial_augment=True, cutout=6, mixup=0.4, cutmix=1.0)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def zeroed(path: Path) -> None:
    """Damage that leaves size and time as they were: DALI's decoder must never meet it."""
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def another(path: Path) -> None:
    Image.new("RGB", (25, 25)).save(path)


HARMS: dict[Callable[[Path], None], str] = {
    cut_short: "cut short or damaged",
    zeroed: "not an image",
    another: "no longer the image that was verified",
    Path.unlink: "cannot be read: it does not exist",
}


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Pictures of several sizes and kinds: those of class c are rows 14 c to 14 c + 13."""
    return write_pictures(tmp_path / "pictures", CLASSES, OF_EACH, image_size=24)


def path_of(split: Split, row: int) -> Path:
    assert isinstance(split.images, ImageFiles)
    return split.images.path(row)


def engine_of(kind: str, split: Split, policy: Any = "skip", **options: Any) -> Engine:
    return any_engine(kind, split, on_bad_image=policy, **options)


def train_loader(engine: Engine, split: Split, augmentation: Augmentation = NOTEBOOK, **options: Any) -> TrainLoader:
    return any_loader(engine, split, augmentation, batch=BATCH, seed=SEED, **options)


def order_of(epoch: int) -> list[int]:
    """The rows of an epoch in their order."""
    return epoch_order(np.arange(COUNT), SEED, epoch).tolist()


def stand_in(row: int, bad: Sequence[int]) -> int:
    """The next readable picture of the same class, after the last the first."""
    first = row // OF_EACH * OF_EACH
    later = (first + (row - first + step) % OF_EACH for step in range(1, OF_EACH))
    return next(other for other in later if other not in bad)


def images_of(batches: Sequence[Batch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


def assert_epoch(
    found: list[Batch], undisturbed: list[Batch], order: list[int], bad: Sequence[int], seen: Sequence[int] = ()
) -> None:
    """An epoch as it was without bad pictures, to the bit, but for their stand-ins; `seen` may yet be themselves."""
    assert [batch.global_size for batch in found] == [batch.global_size for batch in undisturbed]
    assert [len(batch.images) for batch in found] == [len(batch.images) for batch in undisturbed]
    assert torch.equal(*(torch.cat([batch.targets for batch in of]) for of in (found, undisturbed)))
    images, genuine = images_of(found), images_of(undisturbed)
    for place, row in enumerate(order):
        shown = genuine[order.index(stand_in(row, bad))] if row in bad else genuine[place]
        assert torch.equal(images[place], shown) or (row in seen and torch.equal(images[place], genuine[place]))


class TestTraining:
    def test_another_picture_of_the_class_stands_in(self, kind: str, split: Split) -> None:
        undisturbed, order = list(train_loader(engine_of(kind, split), split).epoch(0)), order_of(0)
        bad = [3, 15, 16, 33, 24, 25, 26, 27, 14]  # of every kind; stand-ins of each other, over the end of a class
        harms = dict(zip(bad, [*HARMS, *HARMS, zeroed], strict=True))
        for row, harm in harms.items():
            harm(path_of(split, row))
        engine = engine_of(kind, split)
        loader = train_loader(engine, split)
        assert_epoch(list(loader.epoch(0)), undisturbed, order, bad)
        assert sorted(engine.substitutes.unreadable) == sorted(bad)
        news = engine.substitutes.news()
        assert len(news) == len(bad)
        for row, harm in harms.items():
            assert any(line.startswith(f"{path_of(split, row)}: {HARMS[harm]}") for line in news)
        list(loader.epoch(1))
        assert engine.substitutes.news() == []

    def test_in_the_middle_of_an_epoch(self, kind: str, split: Split) -> None:
        """The engine works ahead meanwhile: what it has read by then it may show."""
        prefetch = 2
        undisturbed, order = list(train_loader(engine_of(kind, split), split).epoch(0)), order_of(0)
        engine = engine_of(kind, split, prefetch=prefetch)
        batches = train_loader(engine, split).epoch(0)
        found = list(islice(batches, 2))
        bad = [order[3], order[2 * BATCH], order[4 * BATCH], order[-1]]
        for row, harm in zip(bad, (cut_short, another, Path.unlink, zeroed), strict=True):
            harm(path_of(split, row))
        found += batches
        ahead = 2 * BATCH + (prefetch + 1) * BATCH
        # Nobody opens the first any more, so it stands in as its genuine self for nobody either.
        known = [row for row in bad[1:] if order.index(row) >= ahead]
        assert set(known) <= set(engine.substitutes.unreadable) <= set(bad)
        assert_epoch(found, undisturbed, order, sorted(engine.substitutes.unreadable), seen=order[:ahead])

    def test_ranks_agree(self, kind: str, split: Split) -> None:
        """Each finds out for itself what it is to show, and that is what one rank alone would."""
        order, world_size = order_of(0), 3
        for row in {order[0], order[1], order[9], order[10], 25, 26, order[-1]}:
            path_of(split, row).unlink()
        whole = list(train_loader(engine_of(kind, split), split, MIXED).epoch(0))
        for rank in range(world_size):
            share = slice(rank, None, world_size)
            expected = [Batch(batch.images[share], batch.targets[share], batch.global_size) for batch in whole]
            loader = train_loader(engine_of(kind, split), split, MIXED, rank=rank, world_size=world_size)
            assert_same(loader.epoch(0), expected)

    def test_goes_on_from_any_step(self, kind: str, split: Split) -> None:
        for row in (2, 18, 19, 33):
            zeroed(path_of(split, row))
        loader = train_loader(engine_of(kind, split), split, MIXED)
        expected = list(loader.epoch(1))
        for step in (1, 4):
            for resumed in (loader, train_loader(engine_of(kind, split), split, MIXED)):
                assert_same(resumed.epoch(1, start_step=step), expected[step:])


class TestEvaluation:
    @pytest.mark.parametrize(("batch", "world_size"), [(6, 1), (5, 3)])
    def test_every_other_image_once(self, kind: str, split: Split, batch: int, world_size: int) -> None:
        genuine = images_of(list(eval_loader(engine_of(kind, split), split, batch=BATCH)))
        bad = [0, 1, 17, 18, 19, 20, 21, 22, 23, 41]  # a whole batch among them
        for row, harm in zip(bad, [*HARMS] * 3, strict=False):
            harm(path_of(split, row))
        expected = [row for row in range(COUNT) if row not in bad]
        found: list[int] = []
        for rank in range(world_size):
            loader = eval_loader(engine_of(kind, split), split, batch=batch, rank=rank, world_size=world_size)
            for part in loader:
                rows = loader.batch_indices.tolist()
                assert 0 < len(part.images) == len(rows) <= batch
                assert torch.equal(part.images, genuine[rows])
                assert part.targets.tolist() == split.labels[rows].tolist()
                assert part.images.is_contiguous(memory_format=torch.channels_last)
                found += rows
        assert sorted(found) == expected

    def test_again_and_again(self, kind: str, split: Split) -> None:
        """Each pass leaves out what cannot be read by then, also where it became so between or amid passes."""
        engine = engine_of(kind, split)
        loader = eval_loader(engine, split, batch=BATCH)
        assert [len(batch.targets) for batch in loader] == [BATCH] * 7
        path_of(split, 7).unlink()
        assert [len(batch.targets) for batch in loader] == [6, 5, 6, 6, 6, 6, 6]
        batches = iter(loader)
        next(batches)
        path_of(split, 41).unlink()
        assert [len(batch.targets) for batch in batches] == [5, 6, 6, 6, 6, 5]
        assert [len(batch.targets) for batch in loader] == [6, 5, 6, 6, 6, 6, 5]
        assert len(engine.substitutes.news()) == 2


def test_training_images_are_replaced_by_training_images(split: Split) -> None:
    substitutes = Substitutes(split, "skip")
    substitutes.exclude({3: "damaged", 5: "damaged"})
    assert substitutes.resolve(np.array([2, 3, 20]), np.r_[0:4, 14:COUNT]).tolist() == [2, 0, 20]
    with pytest.raises(DataError, match="no image of class 0 can be read any more"):
        substitutes.resolve(np.array([3]), np.r_[3, 14:COUNT])


@pytest.mark.parametrize("training", [True, False])
class TestRefusal:
    def make_all(self, engine: Engine, split: Split, training: bool) -> None:
        list(train_loader(engine, split).epoch(0) if training else eval_loader(engine, split, batch=BATCH))

    def test_a_whole_class_is_unreadable(self, kind: str, split: Split, training: bool) -> None:
        for row in range(OF_EACH, 2 * OF_EACH):
            path_of(split, row).unlink()
        with pytest.raises(DataError, match=r"no image of class 1 can be read any more:\n  .*/1/.*it does not exist"):
            self.make_all(engine_of(kind, split), split, training)

    def test_error_is_the_policy(self, kind: str, split: Split, training: bool) -> None:
        path = path_of(split, 23)  # a JPEG
        path.write_bytes(path.read_bytes()[:-2] + bytes(9) + b"\xff\xd9")
        with pytest.raises(DataError) as raised:
            self.make_all(engine_of(kind, split, "error"), split, training)
        assert raised.value.exit_code == 4
        assert f"{path}: damaged: Corrupt JPEG data: " in str(raised.value)
        assert "data.on_bad_image=skip" in str(raised.value)

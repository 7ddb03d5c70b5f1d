"""Pictures that become bad while a run uses them: another of the class stands in, or one message says which and why."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from densenet_dist.data.augment import Augmentation
from densenet_dist.data.datasets import Split
from densenet_dist.data.engines import ENGINES, make_engine
from densenet_dist.data.image_files import ImageFiles
from densenet_dist.data.image_folder import read_folder
from densenet_dist.data.loader import Batch, EvalLoader, TrainLoader
from densenet_dist.data.plan import epoch_order
from densenet_dist.data.requests import Engine
from densenet_dist.errors import DataError

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
CLASSES, OF_EACH = 3, 14
COUNT = CLASSES * OF_EACH
SEED = 7
BATCH = 6
NOTEBOOK = Augmentation("notebook")
MIXED = Augmentation("random_resized_crop", trivial_augment=True, cutout=6, mixup=0.4, cutmix=1.0)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def cut_by_little(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def text(path: Path) -> None:
    path.write_text("<html>not found</html>")


def damaged(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:20] + bytes(len(data) - 20))


def another(path: Path) -> None:
    Image.new("RGB", (25, 25)).save(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARMS: dict[Callable[[Path], None], str] = {
    cut_short: "cut short or damaged",
    cut_by_little: "cut short or damaged",
    emptied: "empty file",
    zeroed: "not a picture",
    text: "not a picture",
    damaged: "cut short or damaged",
    another: "another picture than when it was verified",
    a_folder: "cannot be read",
    Path.unlink: "cannot be read: it is not there",
}
by_name = pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)


@pytest.fixture(params=ENGINES)
def kind(request: pytest.FixtureRequest) -> str:
    """Each engine's name."""
    return str(request.param)


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Split:
    """Pictures of several sizes and kinds: those of class c are rows 14 c to 14 c + 13."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(6)
    for label in range(CLASSES):
        folder = tmp_path / "pictures" / str(label)
        folder.mkdir(parents=True)
        for number in range(OF_EACH):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            width, height = (int(side) for side in rng.integers(30, 70, 2))
            coarse.resize((width, height)).save(folder / f"{number:02d}.{('jpg', 'png', 'webp')[number % 3]}")
    folder = read_folder(tmp_path / "pictures", image_size=24)
    return Split(folder.files, folder.labels)


def path_of(split: Split, row: int) -> Path:
    assert isinstance(split.images, ImageFiles)
    return split.images.path(row)


def engine_of(kind: str, split: Split, policy: Any = "skip", **options: Any) -> Engine:
    return make_engine(kind, split, mean=MEAN, std=STD, on_bad_image=policy, **options)


def train_loader(
    engine: Engine, split: Split, augmentation: Augmentation = NOTEBOOK, *, rank: int = 0, world_size: int = 1
) -> TrainLoader:
    return TrainLoader(
        split,
        np.arange(COUNT),
        engine=engine,
        global_batch_size=BATCH,
        augmentation=augmentation,
        seed=SEED,
        num_classes=CLASSES,
        rank=rank,
        world_size=world_size,
    )


def eval_loader(
    engine: Engine, split: Split, batch: int = BATCH, indices: Sequence[int] = range(COUNT), **options: Any
) -> EvalLoader:
    return EvalLoader(split, np.array(indices), engine=engine, batch_size=batch, **options)


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
    assert torch.equal(*(torch.cat([batch.labels for batch in of]) for of in (found, undisturbed)))
    images, genuine = images_of(found), images_of(undisturbed)
    for place, row in enumerate(order):
        shown = genuine[order.index(stand_in(row, bad))] if row in bad else genuine[place]
        assert torch.equal(images[place], shown) or (row in seen and torch.equal(images[place], genuine[place]))


class TestTraining:
    @by_name
    def test_another_picture_of_the_class_stands_in(
        self, kind: str, split: Split, harm: Callable[[Path], None]
    ) -> None:
        undisturbed, order = list(train_loader(engine_of(kind, split), split).epoch(0)), order_of(0)
        bad = [3, 15, 16, 33]  # a JPEG, a PNG and two WebP
        for row in bad:
            harm(path_of(split, row))
        engine = engine_of(kind, split)
        loader = train_loader(engine, split)
        assert_epoch(list(loader.epoch(0)), undisturbed, order, bad)
        assert engine.substitutes is not None
        news = engine.substitutes.news()
        assert len(news) == 4
        for row in bad:
            assert any(line.startswith(f"{path_of(split, row)}: {HARMS[harm]}") for line in news)
        assert engine.substitutes.news() == []
        list(loader.epoch(1))
        assert engine.substitutes.news() == []

    def test_the_same_picture_written_anew(self, kind: str, split: Split) -> None:
        """What has changed is looked at again; only what is bad then is replaced."""
        undisturbed = list(train_loader(engine_of(kind, split), split).epoch(0))
        for row in range(9):
            path_of(split, row).write_bytes(path_of(split, row).read_bytes())
        engine = engine_of(kind, split)
        for one, other in zip(train_loader(engine, split).epoch(0), undisturbed, strict=True):
            assert torch.equal(one.images, other.images)
        assert engine.substitutes is not None
        assert engine.substitutes.news() == []

    def test_next_epochs_and_another_order(self, kind: str, split: Split) -> None:
        undisturbed = {epoch: list(train_loader(engine_of(kind, split), split).epoch(epoch)) for epoch in (0, 1, 5)}
        bad = [0, 13, 14, 41]  # the first and the last of classes
        for row in bad:
            cut_short(path_of(split, row))
        loader = train_loader(engine_of(kind, split), split)
        for epoch, expected in undisturbed.items():
            assert_epoch(list(loader.epoch(epoch)), expected, order_of(epoch), bad)

    @pytest.mark.parametrize("prefetch", [1, 4])
    def test_in_the_middle_of_an_epoch(self, kind: str, split: Split, prefetch: int) -> None:
        """The engine works ahead meanwhile: what it has read by then it may show."""
        undisturbed, order = list(train_loader(engine_of(kind, split), split).epoch(0)), order_of(0)
        engine = engine_of(kind, split, prefetch=prefetch)
        batches = train_loader(engine, split).epoch(0)
        found = list(islice(batches, 2))
        bad = [order[3], order[2 * BATCH], order[4 * BATCH], order[-1]]
        for row, harm in zip(bad, (cut_short, emptied, Path.unlink, zeroed), strict=True):
            harm(path_of(split, row))
        found += batches
        ahead = 2 * BATCH + (prefetch + 1) * BATCH
        # Nobody opens the first any more, so it stands in as its genuine self for nobody either.
        known = [row for row in bad[1:] if order.index(row) >= ahead]
        assert engine.substitutes is not None
        assert set(known) <= set(engine.substitutes.unreadable) <= set(bad)
        assert_epoch(found, undisturbed, order, sorted(engine.substitutes.unreadable), seen=order[:ahead])

    def test_two_in_a_batch(self, kind: str, split: Split) -> None:
        undisturbed, order = list(train_loader(engine_of(kind, split), split).epoch(0)), order_of(0)
        bad = order[BATCH : BATCH + 3]
        for row in bad:
            cut_short(path_of(split, row))
        assert_epoch(list(train_loader(engine_of(kind, split), split).epoch(0)), undisturbed, order, bad)

    def test_the_stand_in_is_bad_too(self, kind: str, split: Split) -> None:
        undisturbed, order = list(train_loader(engine_of(kind, split), split).epoch(0)), order_of(0)
        bad = [24, 25, 26, 27, 14]  # stand-ins one for the other, over the end of the class
        for row in bad:
            text(path_of(split, row))
        engine = engine_of(kind, split)
        assert_epoch(list(train_loader(engine, split).epoch(0)), undisturbed, order, bad)
        assert engine.substitutes is not None
        assert sorted(engine.substitutes.unreadable) == sorted(bad)

    def test_all_but_one_of_a_class(self, kind: str, split: Split) -> None:
        undisturbed, order = list(train_loader(engine_of(kind, split), split).epoch(0)), order_of(0)
        bad = [row for row in range(OF_EACH) if row != 5]
        for row in bad:
            path_of(split, row).unlink()
        assert_epoch(list(train_loader(engine_of(kind, split), split).epoch(0)), undisturbed, order, bad)

    @pytest.mark.parametrize("augmentation", [NOTEBOOK, MIXED], ids=str)
    @pytest.mark.parametrize("world_size", [2, 3])
    def test_ranks_agree(self, kind: str, split: Split, augmentation: Augmentation, world_size: int) -> None:
        """Each finds out for itself what it is to show, and that is what one rank alone would."""
        order = order_of(0)
        for row in (order[0], order[1], order[9], order[10], 25, 26, order[-1]):
            if path_of(split, row).exists():
                path_of(split, row).unlink()
        whole = list(train_loader(engine_of(kind, split), split, augmentation).epoch(0))
        for rank in range(world_size):
            loader = train_loader(engine_of(kind, split), split, augmentation, rank=rank, world_size=world_size)
            for part, expected in zip(loader.epoch(0), whole, strict=True):
                assert part.global_size == expected.global_size
                assert torch.equal(part.labels, expected.labels[rank::world_size])
                assert torch.equal(part.images, expected.images[rank::world_size])
                if expected.targets is not None:
                    assert part.targets is not None
                    assert torch.equal(part.targets, expected.targets[rank::world_size])

    @pytest.mark.parametrize("augmentation", [NOTEBOOK, MIXED], ids=str)
    def test_goes_on_from_any_step(self, kind: str, split: Split, augmentation: Augmentation) -> None:
        for row in (2, 18, 19, 33):
            zeroed(path_of(split, row))
        loader = train_loader(engine_of(kind, split), split, augmentation)
        expected = list(loader.epoch(1))
        for step in (1, 4):
            for resumed in (loader, train_loader(engine_of(kind, split), split, augmentation)):
                found = list(resumed.epoch(1, start_step=step))
                for one, other in zip(found, expected[step:], strict=True):
                    assert torch.equal(one.labels, other.labels)
                    assert torch.equal(one.images, other.images)

    def test_found_by_the_validation_first(self, kind: str, split: Split) -> None:
        """The loaders of an engine share what is known of its files."""
        undisturbed, order = list(train_loader(engine_of(kind, split), split).epoch(1)), order_of(1)
        engine = engine_of(kind, split)
        train, evaluation = train_loader(engine, split), eval_loader(engine, split)
        list(train.epoch(0))
        bad = [1, 20]
        for row in bad:
            path_of(split, row).unlink()
        assert sum(len(batch.labels) for batch in evaluation) == COUNT - 2
        # DALI has begun the next epoch by then.
        assert_epoch(list(train.epoch(1)), undisturbed, order, bad, seen=order[: 4 * BATCH])

    def test_what_was_handed_out_stays(self, kind: str, split: Split) -> None:
        batches = train_loader(engine_of(kind, split), split).epoch(0)
        kept = list(islice(batches, 2))
        copies = [batch.images.clone() for batch in kept]
        for row in order_of(0)[-3 * BATCH :]:
            if row % 2:
                emptied(path_of(split, row))
        list(batches)
        assert all(torch.equal(batch.images, copy) for batch, copy in zip(kept, copies, strict=True))


class TestEvaluation:
    @pytest.mark.parametrize(("batch", "world_size"), [(1, 1), (6, 1), (6, 2), (5, 3), (1, 2)])
    def test_every_other_image_once(self, kind: str, split: Split, batch: int, world_size: int) -> None:
        genuine = images_of(list(eval_loader(engine_of(kind, split), split)))
        numbers = Split(split.images, np.arange(COUNT))
        classes = Split(split.images, split.labels)
        bad = [0, 1, 17, 18, 19, 20, 21, 22, 23, 41]  # a whole batch among them
        for row, harm in zip(bad, [*HARMS, cut_short], strict=True):
            harm(path_of(split, row))
        expected = [row for row in range(COUNT) if row not in bad]
        found: list[int] = []
        for rank in range(world_size):
            engine = engine_of(kind, classes)
            # Labels that tell which image it is, beside an engine that knows the classes.
            for part in eval_loader(engine, numbers, batch, rank=rank, world_size=world_size):
                assert 0 < len(part.images) == len(part.labels) <= batch
                assert torch.equal(part.images, genuine[part.labels])
                assert part.images.is_contiguous(memory_format=torch.channels_last)
                found += part.labels.tolist()
        assert sorted(found) == expected

    def test_again_and_again(self, kind: str, split: Split) -> None:
        """Each pass leaves out what cannot be read by then, also where it became so between or amid passes."""
        engine = engine_of(kind, split)
        loader = eval_loader(engine, split)
        assert [len(batch.labels) for batch in loader] == [BATCH] * 7
        path_of(split, 7).unlink()
        assert [len(batch.labels) for batch in loader] == [6, 5, 6, 6, 6, 6, 6]
        batches = iter(loader)
        next(batches)
        path_of(split, 41).unlink()
        assert [len(batch.labels) for batch in batches] == [5, 6, 6, 6, 6, 5]
        assert [len(batch.labels) for batch in loader] == [6, 5, 6, 6, 6, 6, 5]
        assert engine.substitutes is not None
        assert len(engine.substitutes.news()) == 2

    @pytest.mark.parametrize("row", range(3))  # a JPEG, a PNG, a WebP
    def test_damage_that_leaves_size_and_time_as_they_were(self, kind: str, split: Split, row: int) -> None:
        """DALI's decoder must never meet it: beside many sound pictures it would end the process."""
        path = path_of(split, row)
        before = path.stat()
        path.write_bytes(bytes(before.st_size))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        (found,) = eval_loader(engine_of(kind, split), split, batch=COUNT)
        assert len(found.labels) == COUNT - 1

    def test_labels_stay_with_their_images(self, kind: str, split: Split) -> None:
        genuine = next(iter(eval_loader(engine_of(kind, split), split, batch=COUNT)))
        for row in (3, 16, 30):
            text(path_of(split, row))
        kept = torch.tensor([row for row in range(COUNT) if row not in (3, 16, 30)])
        (found,) = eval_loader(engine_of(kind, split), split, batch=COUNT)
        assert torch.equal(found.labels, genuine.labels[kept])
        assert torch.equal(found.images, genuine.images[kept])


class TestRefusal:
    @pytest.mark.parametrize("training", [True, False])
    def test_a_whole_class_is_unreadable(self, kind: str, split: Split, training: bool) -> None:
        for row in range(OF_EACH, 2 * OF_EACH):
            path_of(split, row).unlink()
        engine = engine_of(kind, split)
        with pytest.raises(DataError, match=r"no picture of class 1 can be read any more:\n  .*/1/.*it is not there"):
            list(train_loader(engine, split).epoch(0) if training else eval_loader(engine, split))

    @by_name
    @pytest.mark.parametrize("training", [True, False])
    def test_error_is_the_policy(self, kind: str, split: Split, training: bool, harm: Callable[[Path], None]) -> None:
        harm(path_of(split, 23))
        engine = engine_of(kind, split, "error")
        with pytest.raises(DataError) as raised:
            list(train_loader(engine, split).epoch(0) if training else eval_loader(engine, split))
        assert raised.value.exit_code == 4
        assert f"{path_of(split, 23)}: {HARMS[harm]}" in str(raised.value)
        assert "data.on_bad_image=skip" in str(raised.value)

    def test_batches_before_it_are_given(self, kind: str, split: Split) -> None:
        """Torch gives all before the bad one; DALI too, but for those that it had ahead."""
        order = order_of(0)
        path_of(split, order[5 * BATCH]).unlink()
        batches = train_loader(engine_of(kind, split, "error", prefetch=1), split).epoch(0)
        assert len(list(islice(batches, 3))) == 3
        with pytest.raises(DataError, match="it is not there"):
            list(batches)


@pytest.mark.slow
def test_files_that_shrink_while_they_are_read(split: Split) -> None:
    """What is left of a file must never reach a decoder of DALI's: it can end the process."""
    code = """
        import os, sys, threading
        import numpy as np
        from pathlib import Path
        from densenet_dist.data.datasets import Split
        from densenet_dist.data.engines import make_engine
        from densenet_dist.data.image_folder import read_folder
        from densenet_dist.data.loader import TrainLoader
        from densenet_dist.errors import DataError

        folder = read_folder(Path(sys.argv[1]), image_size=24)
        split = Split(folder.files, folder.labels)

        def loader(policy):
            engine = make_engine("dali", split, mean=(0.0,) * 3, std=(1.0,) * 3, threads=2, on_bad_image=policy)
            return engine, TrainLoader(split, np.arange(42), engine=engine, global_batch_size=6)

        def shrink():
            for row in range(0, 42, 4):
                path = split.images.path(row)
                for part in range(9, -1, -1):
                    os.truncate(path, path.stat().st_size * part // 10)

        thread = threading.Thread(target=shrink)
        engine, skipping = loader("skip")
        for epoch in range(8):
            if epoch == 1:
                thread.start()
            for batch in skipping.epoch(epoch):
                assert len(batch.images) == 6
        thread.join()
        list(skipping.epoch(8))
        print("went on without", len(engine.substitutes.unreadable))
        try:
            list(loader("error")[1].epoch(0))
        except DataError as error:
            print(type(error).__name__)
    """
    assert isinstance(split.images, ImageFiles)
    done = subprocess.run(
        [sys.executable, "-c", dedent(code), split.images.root], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "went on without 11\nDataError\n"

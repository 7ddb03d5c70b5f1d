"""The same global batches for every world size, every image once, and threads that end."""

import threading
import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch

from densenet_dist.data.augment import GEOMETRIES, Augmentation
from densenet_dist.data.datasets import Split
from densenet_dist.data.loader import Batch, EvalLoader, Request, TrainLoader
from densenet_dist.data.torch_loader import TorchEngine
from densenet_dist.errors import ConfigError

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def numbered(count: int) -> Split:
    """Random images whose label is their number."""
    images = np.random.default_rng(1).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return Split(images, np.arange(count))


SPLIT = numbered(203)


def train_loader(
    split: Split = SPLIT,
    indices: np.ndarray | None = None,
    batch: int = 32,
    augmentation: str = "notebook",
    seed: int = 3,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    prefetch: int = 2,
) -> TrainLoader:
    return TrainLoader(
        split,
        np.arange(len(split.labels)) if indices is None else indices,
        engine=TorchEngine(split.images, MEAN, STD, device, prefetch=prefetch),
        global_batch_size=batch,
        augmentation=Augmentation(augmentation),
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


def eval_loader(
    split: Split = SPLIT,
    indices: np.ndarray | None = None,
    batch: int = 32,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
) -> EvalLoader:
    indices = np.arange(len(split.labels)) if indices is None else indices
    engine = TorchEngine(split.images, MEAN, STD, device)
    return EvalLoader(split, indices, engine=engine, batch_size=batch, rank=rank, world_size=world_size)


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    """Equal to the bit."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.global_size == other.global_size
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("densenet-dist-data")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert loader_threads() == []


class TestBatch:
    @pytest.mark.parametrize("augmentation", GEOMETRIES)
    def test_form(self, augmentation: str) -> None:
        batch = next(train_loader(augmentation=augmentation).epoch(0))
        assert batch.images.shape == (32, 3, 32, 32)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == torch.int64
        assert batch.global_size == 32

    def test_is_normalised(self) -> None:
        batch = next(iter(eval_loader()))
        levels = SPLIT.images[:32].astype(np.float64) / 255
        expected = (levels - MEAN) / STD
        np.testing.assert_allclose(batch.images.permute(0, 2, 3, 1).numpy(), expected, rtol=0, atol=1e-6)

    def test_black_padding_is_normalised_too(self) -> None:
        """What a crop shows of the padding is black, not the mean."""
        white = Split(np.full((64, 32, 32, 3), 255, dtype=np.uint8), np.arange(64))
        images = next(train_loader(white, batch=64, augmentation="crop_flip").epoch(0)).images
        expected = [[(level - mean) / std for level in (0.0, 1.0)] for mean, std in zip(MEAN, STD, strict=True)]
        for channel in range(3):
            values = images[:, channel].unique().tolist()
            assert values == pytest.approx(expected[channel], abs=1e-6)

    def test_does_not_touch_the_data(self) -> None:
        split = numbered(64)
        before = split.images.copy()
        for augmentation in GEOMETRIES:
            list(train_loader(split, augmentation=augmentation).epoch(0))
        list(eval_loader(split))
        assert np.array_equal(split.images, before)

    def test_takes_memory_that_cannot_be_written(self) -> None:
        split = numbered(8)
        split.images.flags.writeable = False
        indices = np.arange(8)[::-1]
        indices.flags.writeable = False
        assert next(iter(eval_loader(split, indices))).labels.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]

    def test_autocast_leaves_pixels_alone(self) -> None:
        expected = list(train_loader(prefetch=0).epoch(0))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(list(train_loader(prefetch=0).epoch(0)), expected)

    def test_thread_count_leaves_bits_alone(self) -> None:
        threads = torch.get_num_threads()
        try:
            epochs = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                epochs.append(list(train_loader(batch=101, prefetch=0).epoch(0)))
        finally:
            torch.set_num_threads(threads)
        assert_same(epochs[1], epochs[0])
        assert_same(epochs[2], epochs[0])


class TestTrainLoader:
    @pytest.mark.parametrize(("count", "batch"), [(203, 32), (200, 32), (195, 32), (20, 32), (64, 64), (33, 1)])
    def test_every_image_once_an_epoch(self, count: int, batch: int) -> None:
        loader = train_loader(numbered(count), batch=batch)
        for epoch in range(2):
            batches = list(loader.epoch(epoch))
            assert len(batches) == loader.steps_per_epoch
            assert sorted(torch.cat([found.labels for found in batches]).tolist()) == list(range(count))
            assert [len(found.labels) for found in batches] == [found.global_size for found in batches]

    def test_only_the_images_asked_for(self) -> None:
        indices = np.arange(1, 203, 3)
        labels = torch.cat([batch.labels for batch in train_loader(indices=indices).epoch(0)])
        assert sorted(labels.tolist()) == indices.tolist()

    @pytest.mark.parametrize("augmentation", GEOMETRIES)
    @pytest.mark.parametrize("world_size", [1, 2, 3, 4])
    def test_same_global_batches_for_every_world_size(self, world_size: int, augmentation: str) -> None:
        expected = list(train_loader(augmentation=augmentation).epoch(5))
        ranks = [
            list(train_loader(augmentation=augmentation, rank=rank, world_size=world_size).epoch(5))
            for rank in range(world_size)
        ]
        joined = []
        for parts, whole in zip(zip(*ranks, strict=True), expected, strict=True):
            images, labels = torch.empty_like(whole.images), torch.empty_like(whole.labels)
            for rank, part in enumerate(parts):
                assert len(part.labels) > 0
                assert part.global_size == whole.global_size
                images[rank::world_size], labels[rank::world_size] = part.images, part.labels
            joined.append(Batch(images, labels, whole.global_size))
        assert_same(joined, expected)

    def test_an_image_looks_the_same_in_every_batch(self) -> None:
        """Its warp depends on its place in the data set, not on who else is trained on."""
        some = np.arange(0, 203, 2)
        part = {int(y): x for batch in train_loader(indices=some).epoch(1) for x, y in zip(*batch[:2], strict=True)}
        whole = {int(y): x for batch in train_loader(batch=50).epoch(1) for x, y in zip(*batch[:2], strict=True)}
        assert all(torch.equal(part[index], whole[index]) for index in some.tolist())

    @pytest.mark.parametrize("step", [0, 1, 3, 6])
    def test_starts_at_any_step(self, step: int) -> None:
        loader = train_loader()
        assert_same(list(loader.epoch(2, start_step=step)), list(loader.epoch(2))[step:])

    def test_no_such_step(self) -> None:
        loader = train_loader()
        assert list(loader.epoch(0, start_step=loader.steps_per_epoch)) == []
        with pytest.raises(IndexError, match=f"step {loader.steps_per_epoch + 1}"):
            loader.epoch(0, start_step=loader.steps_per_epoch + 1)

    def test_seeds_and_epochs_differ(self) -> None:
        firsts = [next(train_loader(seed=seed).epoch(epoch)) for seed in (0, 1) for epoch in (0, 1)]
        for index, first in enumerate(firsts):
            for other in firsts[index + 1 :]:
                assert not torch.equal(first.labels, other.labels)
                assert not torch.equal(first.images, other.images)

    def test_epochs_in_any_order(self) -> None:
        loader = train_loader()
        expected = list(train_loader().epoch(3))
        list(loader.epoch(4))
        assert_same(list(loader.epoch(3)), expected)

    def test_too_many_ranks_for_a_batch(self) -> None:
        with pytest.raises(ConfigError, match=r"a batch of 4 for 5 ranks.*at least 40"):
            train_loader(numbered(36), batch=32, world_size=5)


class TestEvalLoader:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
    @pytest.mark.parametrize(("count", "batch"), [(203, 32), (203, 1), (128, 32), (5, 32), (3, 1), (1, 8)])
    def test_every_image_once_over_all_ranks(self, count: int, batch: int, world_size: int) -> None:
        split = numbered(count)
        ranks = [list(eval_loader(split, batch=batch, rank=r, world_size=world_size)) for r in range(world_size)]
        assert sorted(label for rank in ranks for part in rank for label in part.labels.tolist()) == list(range(count))
        assert all(len(part.labels) > 0 for rank in ranks for part in rank)
        for rank, parts in enumerate(ranks):
            assert len(eval_loader(split, batch=batch, rank=rank, world_size=world_size)) == len(parts)
            assert [part.labels.tolist() == sorted(part.labels.tolist()) for part in parts] == [True] * len(parts)
        for step, part in enumerate(ranks[0]):
            shares = [rank[step].labels for rank in ranks if step < len(rank)]
            assert part.global_size == sum(len(share) for share in shares)

    def test_in_the_order_asked_for(self) -> None:
        indices = np.array([5, 3, 9])
        assert [batch.labels.tolist() for batch in eval_loader(indices=indices, batch=2)] == [[5, 3], [9]]

    def test_can_be_repeated(self) -> None:
        loader = eval_loader()
        assert_same(list(loader), list(loader))

    def test_nothing_to_see(self) -> None:
        assert list(eval_loader(indices=np.arange(0))) == []


class TestThread:
    def test_makes_the_same_batches(self) -> None:
        expected = list(train_loader(prefetch=0).epoch(0))
        for prefetch in (1, 2, 100):
            assert_same(list(train_loader(prefetch=prefetch).epoch(0)), expected)

    def test_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = count_batches(monkeypatch)
        batches = train_loader(prefetch=2).epoch(0)
        next(batches)
        time.sleep(0.2)
        assert len(made) == 3  # the one taken and two ahead
        batches.close()  # type: ignore[attr-defined]

    def test_ends_when_the_consumer_stops(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = count_batches(monkeypatch, seconds=0.1)
        for _ in islice(train_loader(prefetch=3).epoch(0), 2):
            assert len(loader_threads()) == 1
        started = time.monotonic()
        while loader_threads():
            assert time.monotonic() - started < 1.0
            time.sleep(0.01)
        assert len(made) <= 4  # nothing more was made than the batch in hand

    def test_ends_when_the_consumer_raises(self) -> None:
        batches = train_loader().epoch(0)

        def consume() -> None:
            for _ in batches:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            consume()
        batches.close()  # type: ignore[attr-defined]
        assert loader_threads() == []

    def test_never_starts_unasked(self) -> None:
        train_loader().epoch(0)
        assert loader_threads() == []

    def test_errors_surface_where_the_batch_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = count_batches(monkeypatch, fail_at=3)
        batches = train_loader().epoch(0)
        assert len(list(islice(batches, 2))) == 2
        with pytest.raises(RuntimeError, match="batch 3 failed"):
            next(batches)
        assert loader_threads() == []
        assert len(made) <= 6


def count_batches(monkeypatch: pytest.MonkeyPatch, *, seconds: float = 0.0, fail_at: int | None = None) -> list[int]:
    """Notes every batch made from now on; each takes so long, and one fails."""
    made: list[int] = []
    genuine = TorchEngine._pixels

    def pixels(self: TorchEngine, request: Request) -> torch.Tensor:
        made.append(len(request.array("rows")))
        time.sleep(seconds)
        if len(made) == fail_at:
            raise RuntimeError(f"batch {fail_at} failed")
        return genuine(self, request)

    monkeypatch.setattr(TorchEngine, "_pixels", pixels)
    return made


@pytest.mark.gpu
@needs_gpu
class TestGpu:
    @pytest.mark.parametrize("augmentation", GEOMETRIES)
    def test_same_pixels_as_on_a_cpu(self, augmentation: str) -> None:
        expected = list(train_loader(augmentation=augmentation).epoch(0))
        found = list(train_loader(augmentation=augmentation, device="cuda").epoch(0))
        for one, other in zip(found, expected, strict=True):
            assert one.images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(one.labels.cpu(), other.labels)
            assert (one.images.cpu() - other.images).abs().max() < 0.01 / 255 / min(STD)

    def test_never_waits_for_the_device(self) -> None:
        train, evaluation = train_loader(device="cuda"), eval_loader(device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert len(list(train.epoch(0))) == train.steps_per_epoch
            assert len(list(evaluation)) == len(evaluation)
        finally:
            torch.cuda.set_sync_debug_mode("default")

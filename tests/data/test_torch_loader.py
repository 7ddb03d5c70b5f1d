"""What is torch's alone: a thread that works ahead and ends, a GPU that is not waited for."""

import threading
import time
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from gpu import without_waiting
from image_loaders import STD, engine_of, eval_loader, train_loader

from densenet_dist.data.augment import GEOMETRIES, Augmentation
from densenet_dist.data.engine import Request
from densenet_dist.data.torch_loader import TorchEngine

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("densenet-dist-data")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert loader_threads() == []


class TestThread:
    def test_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = count_batches(monkeypatch)
        batches = train_loader("torch", prefetch=2).epoch(0)
        next(batches)
        time.sleep(0.2)
        assert len(made) == 3  # the one taken and two ahead
        batches.close()  # type: ignore[attr-defined]

    def test_errors_surface_where_the_batch_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = count_batches(monkeypatch, fail_at=3)
        batches = train_loader("torch").epoch(0)
        assert len(list(islice(batches, 2))) == 2
        with pytest.raises(RuntimeError, match="batch 3 failed"):
            next(batches)
        assert loader_threads() == []
        assert len(made) <= 6


def count_batches(monkeypatch: pytest.MonkeyPatch, *, fail_at: int | None = None) -> list[int]:
    """Notes every batch made from now on; one fails."""
    made: list[int] = []
    genuine = TorchEngine._pixels

    def pixels(self: TorchEngine, request: Request) -> torch.Tensor:
        made.append(len(request.array("indices")))
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
        expected = list(train_loader("torch", augmentation=Augmentation(augmentation)).epoch(0))
        found = list(train_loader("torch", augmentation=Augmentation(augmentation), device="cuda").epoch(0))
        for one, other in zip(found, expected, strict=True):
            assert one.images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(one.targets.cpu(), other.targets)
            assert (one.images.cpu() - other.images).abs().max() < 0.01 / 255 / min(STD)

    def test_never_waits_for_the_device(self) -> None:
        engine = engine_of("torch", device="cuda")
        train, evaluation = train_loader(engine), eval_loader(engine)
        with without_waiting():
            assert len(list(train.epoch(0))) == train.steps_per_epoch
            assert len(list(evaluation)) == len(evaluation)

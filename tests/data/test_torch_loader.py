"""What only the torch engine has: a thread that works ahead and ends; on a GPU, no waiting for it."""

import threading

import pytest
import torch
from gpu import without_waiting
from image_loaders import STD, engine_of, eval_loader, train_loader

from densenet_dist.data.augment import GEOMETRIES, Augmentation

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("densenet-dist-data")]


def test_an_abandoned_epoch_leaves_no_thread() -> None:
    batches = train_loader("torch", prefetch=2).epoch(0)
    next(batches)
    assert len(loader_threads()) == 1
    del batches
    assert loader_threads() == []


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

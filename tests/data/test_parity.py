"""DALI shows the same pixels as torch, to a fiftieth of a gray level: on generated images, on CIFAR, on files."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_loaders import GRAY_LEVELS, eval_loader, picture_kinds, train_loader
from image_loaders import noise as noise_images
from image_loaders import smooth as smooth_images
from PIL import Image

from densenet_dist.data.augment import GEOMETRIES, NO_AUGMENTATION, Augmentation
from densenet_dist.data.datasets import load_dataset
from densenet_dist.data.engine import ENGINES
from densenet_dist.data.image_files import Split
from densenet_dist.data.image_folder import read_folder
from densenet_dist.data.loader import Batch, TrainLoader

TOLERANCE = 0.02  # gray levels of 255
SIZES = ((200, 151), (9, 7), (300, 31), (2, 3), (32, 32))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def loader(kind: str, split: Split, augmentation: Augmentation, **options: Any) -> TrainLoader:
    """Makes float gray levels, [0, 255]."""
    return train_loader(kind, split, augmentation, **{"batch": 64} | GRAY_LEVELS | options)


def smooth(count: int, size: int = 32) -> Split:
    return Split(smooth_images(count, size), np.arange(count) % 7)


def noise(count: int, size: int = 32) -> Split:
    return Split(noise_images(count, size), np.arange(count) % 7)


def pairs(split: Split, augmentation: Augmentation, *, epoch: int = 3, **options: Any) -> Iterator[tuple[Batch, Batch]]:
    """What torch and DALI make, batch by batch; labels, targets and sizes are the same to the bit."""
    torch_batches, dali_batches = (loader(kind, split, augmentation, **options).epoch(epoch) for kind in ENGINES)
    for one, other in zip(torch_batches, dali_batches, strict=True):
        assert one.global_size == other.global_size
        assert torch.equal(one.targets, other.targets)
        yield one, other


def apart(one: Batch, other: Batch) -> float:
    """The largest difference in gray levels."""
    assert one.images.shape == other.images.shape
    difference = float((one.images.cpu() - other.images.cpu()).abs().max())
    assert not math.isnan(difference)  # max() would lose it
    return difference


class TestGenerated:
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_arrays(self, geometry: str) -> None:
        """Enough images for every operation of TrivialAugment to come some forty times."""
        for options in ({}, {"cutout": 9, "mixup": 0.4}, {"trivial_augment": True, "cutmix": 1.0}):
            for split in (smooth(300), noise(300)):
                augmentation = Augmentation(geometry, **options)
                assert max(apart(*pair) for pair in pairs(split, augmentation, batch=100)) <= TOLERANCE

    def test_pictures_of_224_pixels(self) -> None:
        """On a CPU, DALI walks along a row in float32 steps, whose errors add up: noise shows it most."""
        for geometry in ("notebook", "random_resized_crop"):
            assert max(apart(*pair) for pair in pairs(smooth(30, 224), Augmentation(geometry))) <= 0.1
            assert max(apart(*pair) for pair in pairs(noise(20, 224), Augmentation(geometry))) <= 0.8


class TestCifar:
    @pytest.mark.nightly
    def test_whole_epoch(self, official: Path) -> None:
        """Every training image of CIFAR-10, as the notebook augments it."""
        split = load_dataset("cifar10", official, download=False).train
        differences = [apart(*pair) for pair in pairs(split, Augmentation("notebook"), batch=1000)]
        assert len(differences) == 50
        assert max(differences) <= TOLERANCE

    @pytest.mark.parametrize("kind", ENGINES)
    def test_a_folder_of_png_files_gives_the_same_batches(self, kind: str, official: Path, tmp_path: Path) -> None:
        arrays = load_dataset("cifar10", official, download=False, limit=150).train
        for number, (image, label) in enumerate(zip(arrays.images, arrays.labels, strict=True)):
            path = tmp_path / str(label) / f"{number:03d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
        folder = read_folder(tmp_path, image_size=32)
        files = folder.train
        order = [int(Path(name).stem) for name in files.images.names]
        in_order = Split(arrays.images[order], arrays.labels[order])
        assert np.array_equal(files.labels, in_order.labels)
        for augmentation in (NO_AUGMENTATION, Augmentation("notebook", True, 8, 0.4, 1.0), Augmentation("crop_flip")):
            made = (loader(kind, split, augmentation).epoch(0) for split in (files, in_order))
            for one, other in zip(*made, strict=True):
                assert torch.equal(one.targets, other.targets)
                assert apart(one, other) <= (0.0 if kind == "torch" else 1e-4)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Pictures of every kind that is taken, each in several sizes."""
    root = tmp_path_factory.mktemp("pictures")
    for number, (width, height) in enumerate(SIZES):
        (root / str(number % 3)).mkdir(exist_ok=True)
        image = (noise_images if number % 2 else smooth_images)(4, 300)[3, :height, :width]
        for name, data in picture_kinds(Image.fromarray(image)).items():
            (root / str(number % 3) / f"{number}-{name}").write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        folder = read_folder(root, image_size=32)
    return folder.train


class TestFiles:
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_training(self, pictures: Split, geometry: str) -> None:
        assert max(apart(*pair) for pair in pairs(pictures, Augmentation(geometry))) <= TOLERANCE

    @pytest.mark.parametrize("geometry", ["none", "random_resized_crop"])
    def test_evaluation(self, pictures: Split, geometry: str) -> None:
        one, other = (eval_loader(kind, pictures, geometry=geometry, batch=64, **GRAY_LEVELS) for kind in ENGINES)
        assert max(apart(*pair) for pair in zip(one, other, strict=True)) <= TOLERANCE

    def test_tones(self, pictures: Split) -> None:
        """Where a tone jumps, the last bit of a resampled pixel may decide; it does for one pixel in some thousands."""
        differ = pixels = 0
        for one, other in pairs(pictures, Augmentation("random_resized_crop", trivial_augment=True)):
            differ += int(((one.images - other.images).abs() > TOLERANCE).sum())
            pixels += one.images.numel()
        assert differ < 1e-4 * pixels


@pytest.mark.gpu
@needs_gpu
class TestGpu:
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_arrays(self, geometry: str) -> None:
        augmentation = Augmentation(geometry, True, 9, 0.4, 1.0)
        expected = loader("torch", noise(80), augmentation).epoch(0)
        found = loader("dali", noise(80), augmentation, device="cuda").epoch(0)
        assert max(apart(*pair) for pair in zip(found, expected, strict=True)) <= TOLERANCE

    def test_files(self, pictures: Split) -> None:
        """A GPU's JPEG decoder rounds otherwise than a CPU's: a picture may be a gray level or two off."""
        expected = loader("torch", pictures, NO_AUGMENTATION).epoch(0)
        found = loader("dali", pictures, NO_AUGMENTATION, device="cuda").epoch(0)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.targets.cpu(), other.targets)
            assert apart(one, other) <= 3.0

"""The input pipeline of one rank, built from a configuration: data set, engine, loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from densenet_dist.data.augment import Augmentation
from densenet_dist.data.datasets import Dataset, Split, load_dataset
from densenet_dist.data.engine import Engine, engine_class
from densenet_dist.data.image_folder import few
from densenet_dist.data.loader import EvalLoader, TrainLoader
from densenet_dist.data.plan import split_indices
from densenet_dist.schema import Config
from densenet_dist.train.context import RunContext

Indices: TypeAlias = npt.NDArray[np.int64]
_FEW = 30  # pictures: each is more than 3 % of a part's accuracy


def load_dataset_of(config: Config, split: Mapping[str, str] | None = None) -> Dataset:
    """The configured data set, verified; `split` as for `load_dataset`."""
    data = config.data
    return load_dataset(
        data.name,
        data.root,
        download=data.download,
        url=data.url,
        limit=data.limit,
        seed=config.seed,
        image_size=data.side,
        test_fraction=data.test_fraction,
        on_bad_image=data.on_bad_image,
        split=split,
    )


def tell_lines(tell: Callable[[str], object], lines: Sequence[str], what: str = "left out of data.root") -> None:
    """Say how many there are of something, with the first five lines; nothing where there are none."""
    if lines:
        more = [f"... and {len(lines) - 5} more"] if len(lines) > 5 else []
        tell("\n  ".join([f"{what}: {len(lines):,}", *lines[:5], *more]))


def normalisation(config: Config, dataset: Dataset) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation by which images in [0, 1] are normalised."""
    if config.data.normalize == "unit":
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return dataset.mean, dataset.std


def train_and_val(config: Config, dataset: Dataset) -> tuple[Indices, Indices]:
    """Places in the training split that are trained on and validated with, each (n,) int64 and sorted."""
    if dataset.val is not None:  # the set says so itself
        return np.setdiff1d(np.arange(len(dataset.train.labels)), dataset.val), dataset.val
    data, labels = config.data, dataset.train.labels
    return split_indices(
        labels, data.val_fraction, config.seed, stratified=data.stratified, keeps_classes=dataset.keeps_classes
    )


def part_warnings(config: Config, dataset: Dataset) -> Iterator[str]:
    """What is doubtful in the parts of a folder of pictures: classes that they lack, and few pictures."""
    train, val = (dataset.train.labels[part] for part in train_and_val(config, dataset))
    for part, labels in (("training", train), ("validation", val), ("test", dataset.test.labels)):
        lacking = sorted(set(range(dataset.num_classes)).difference(labels.tolist()))
        if dataset.name != "folder" or not len(labels):
            continue
        if lacking:
            names = few([dataset.class_names[label] for label in lacking])
            yield f"{len(lacking)} of {dataset.num_classes} classes have no {part} pictures: {names}"
        if len(labels) < _FEW:
            yield f"only {len(labels)} {part} pictures"


def engine_of(config: Config, device: torch.device, dataset: Dataset, split: Split, loader: str) -> Engine:
    """The engine of a split of the data set, for every loader that reads from it.

    Args:
        loader: torch or dali.

    Raises:
        EnvironmentProblem: `loader` is dali, and DALI cannot work here.
    """
    mean, std = normalisation(config, dataset)
    return engine_class(loader)(
        split,
        mean=mean,
        std=std,
        device=device,
        prefetch=config.data.prefetch,
        threads=torch.get_num_threads(),
        on_bad_image=config.data.on_bad_image,
    )


def train_loader(
    config: Config, context: RunContext, dataset: Dataset, engine: Engine, indices: Indices
) -> TrainLoader:
    """The loader of the training images at `indices`, augmented as configured."""
    data = config.data
    augmentation = Augmentation(
        data.augment, data.trivial_augment, data.cutout, data.mixup, data.cutmix, data.crop_scale, data.flip
    )
    return TrainLoader(
        engine,
        indices,
        global_batch_size=config.train.global_batch_size,
        augmentation=augmentation,
        seed=config.seed,
        num_classes=dataset.num_classes,
        rank=context.rank,
        world_size=context.world_size,
    )


def eval_loader(config: Config, context: RunContext, engine: Engine, indices: Indices | None = None) -> EvalLoader:
    """Return the loader of all images of the engine's split, or of those at `indices`, without augmentation."""
    return EvalLoader(
        engine,
        indices,
        batch_size=config.train.eval_batch_size,
        geometry=config.data.augment,
        rank=context.rank,
        world_size=context.world_size,
    )

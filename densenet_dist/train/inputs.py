"""The data of a run: data set, split and classes, and the loaders of one rank."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from densenet_dist.custom import is_custom
from densenet_dist.data.augment import Augmentation
from densenet_dist.data.datasets import Channels, Dataset, load_dataset
from densenet_dist.data.engine import Engine, engine_class
from densenet_dist.data.image_files import ImageFiles, Split
from densenet_dist.data.image_folder import few
from densenet_dist.data.loader import EvalLoader, TrainLoader
from densenet_dist.data.plan import split_indices
from densenet_dist.errors import CheckpointError, ConfigError, DataError, first_lines
from densenet_dist.run_folder import CLASSES_FILE, SPLIT_FILE, RunFolder
from densenet_dist.schema import Config
from densenet_dist.train.context import RunContext
from densenet_dist.train.custom_parts import custom_dataset, geometry
from densenet_dist.train.ranks import gather_objects

Indices: TypeAlias = npt.NDArray[np.int64]
_MIN_IMAGES = 30  # with fewer, each image is more than 3 % of the accuracy


def load_dataset_of(config: Config, split: Mapping[str, str] | None = None) -> Dataset:
    """Load and verify the configured data set, with the configured normalization; `split` as for `load_dataset`."""
    data = config.data
    if is_custom(data.name):
        dataset = custom_dataset(config)
    else:
        dataset = load_dataset(
            data.name,
            data.root,
            download=data.download,
            url=data.url,
            limit=data.limit,
            test_limit=data.test_limit,
            seed=config.seed,
            image_size=data.resolved_image_size,
            test_fraction=data.test_fraction,
            on_bad_image=data.on_bad_image,
            split=split,
        )
    if data.normalize == "unit":
        return replace(dataset, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return dataset


def report_lines(report: Callable[[str], object], lines: Sequence[str], what: str = "left out of data.root") -> None:
    """Call `report` with the number of lines and the first five; not if there are none."""
    if lines:
        report("\n  ".join([f"{what}: {len(lines):,}", *first_lines(lines, 5)]))


def train_and_val(config: Config, dataset: Dataset) -> tuple[Indices, Indices]:
    """Return the indices of the training and the validation images in the training split; each (n,) int64, sorted."""
    if dataset.val is not None:  # a folder with its own validation images
        return np.setdiff1d(np.arange(len(dataset.train.labels)), dataset.val), dataset.val
    data, labels = config.data, dataset.train.labels
    return split_indices(labels, data.val_fraction, config.seed, stratified=data.is_stratified)


def class_weights(config: Config, dataset: Dataset, indices: Indices, device: torch.device) -> torch.Tensor | None:
    """Return ``train.class_weights`` (classes,) float32 for training on the images at `indices`, or None.

    Raises:
        ConfigError: there is not one weight per class.
    """
    wanted = config.train.class_weights
    if wanted is None:
        return None
    if wanted == "balanced":
        counts = np.bincount(dataset.train.labels[indices], minlength=dataset.num_classes)
        return torch.from_numpy(len(indices) / (np.count_nonzero(counts) * np.maximum(counts, 1))).float().to(device)
    if len(wanted) != dataset.num_classes:
        raise ConfigError(
            f"train.class_weights: {len(wanted)} weights for {dataset.num_classes} classes; give one per class, in this"
            f" order: {few(dataset.class_names)}"
        )
    return torch.tensor(wanted, device=device)


def split_warnings(config: Config, dataset: Dataset) -> Iterator[str]:
    """Yield warnings about a folder of images: parts without images of some classes, and parts of few images."""
    if dataset.name != "folder":
        return
    train, val = (dataset.train.labels[part] for part in train_and_val(config, dataset))
    for part, labels in (("training", train), ("validation", val), ("test", dataset.test.labels)):
        missing = sorted(set(range(dataset.num_classes)).difference(labels.tolist()))
        if missing and len(labels):
            names = few([dataset.class_names[label] for label in missing])
            yield f"there are no {part} images of {len(missing)} of {dataset.num_classes} classes: {names}"
        if 0 < len(labels) < _MIN_IMAGES:
            yield f"only {len(labels)} {part} images"


def engine_of(config: Config, device: torch.device, dataset: Dataset, split: Split, loader: str) -> Engine:
    """Create the engine that produces the images of a split, torch or dali; several loaders may share it."""
    return engine_class(loader)(
        split,
        mean=dataset.mean,
        std=dataset.std,
        device=device,
        prefetch=config.data.prefetch,
        threads=torch.get_num_threads(),
    )


def train_loader(
    config: Config, context: RunContext, dataset: Dataset, engine: Engine, indices: Indices
) -> TrainLoader:
    """Create the loader of the training images at `indices`, augmented as configured."""
    data = config.data
    augmentation = Augmentation(
        geometry(config), data.trivial_augment, data.cutout, data.mixup, data.cutmix, data.crop_scale, data.flip
    )
    return TrainLoader(
        engine,
        indices,
        global_batch_size=config.train.global_batch_size,
        augmentation=augmentation,
        balanced=data.sampler == "balanced",
        seed=config.seed,
        num_classes=dataset.num_classes,
        rank=context.rank,
        world_size=context.world_size,
    )


def eval_loader(config: Config, context: RunContext, engine: Engine, indices: Indices | None = None) -> EvalLoader:
    """Create a loader without augmentation: of all images of the engine's split, or of those at `indices`."""
    return EvalLoader(
        engine,
        indices,
        batch_size=config.train.eval_batch_size,
        geometry=config.data.augment,
        rank=context.rank,
        world_size=context.world_size,
    )


@dataclass(frozen=True)
class ModelMetadata:
    """The content of classes.json: what a network needs besides weights to classify images.

    The names are by label, the size is a side in pixels, and mean and std are for images in [0, 1].
    """

    names: tuple[str, ...]
    image_size: int
    mean: Channels
    std: Channels

    @classmethod
    def of(cls, dataset: Dataset) -> ModelMetadata:
        """Return the metadata of a model that is trained on a data set."""
        return cls(dataset.class_names, dataset.image_size, dataset.mean, dataset.std)


def write_metadata(run: RunFolder, config: Config, dataset: Dataset) -> None:
    """Write classes.json and, when a run on a folder of images starts, split.json.gz."""
    files, test_files = dataset.train.images, dataset.test.images
    if isinstance(files, ImageFiles) and isinstance(test_files, ImageFiles) and not run.exists(SPLIT_FILE):
        train, val = (files[part].names for part in train_and_val(config, dataset))
        run.write(SPLIT_FILE, json.dumps({"train": train, "val": val, "test": test_files.names}))
    run.write(CLASSES_FILE, json.dumps(asdict(ModelMetadata.of(dataset)), indent=1) + "\n")


def load_run_data(config: Config, run: RunFolder) -> Dataset:
    """Load the configured data set for a run that may have started: with its split, and only if it has its classes.

    The split is read from split.json.gz, which names the part of each image of a folder. If it were drawn again after
    images were added, the test part could contain images that the run was trained on.

    Raises:
        CheckpointError: the classes, or their order, differ from those of the run; the message names both.
    """
    parts = run.read_json(SPLIT_FILE).items()
    split = {str(name): part for part, names in parts if isinstance(names, list) for name in names}
    dataset = load_dataset_of(config, split)
    before = _read_classes(run)
    if before is not None and before.names != dataset.class_names:
        pairs = list(zip_longest(before.names, dataset.class_names, fillvalue="-"))
        shown = pairs if len(pairs) <= 20 else [pair for pair in pairs if pair[0] != pair[1]][:20]
        theirs, ours = map(list, zip(*shown, strict=True))
        raise CheckpointError(
            f"the run {run.uri} has other classes than data.root={config.data.root}:\n"
            f"  the run:      {theirs}\n  the data set: {ours}\n"
            "  rename the class folders, name the run's own data set (data.root=...), or train a new run (name=NEW)"
        )
    return dataset


def read_metadata(run: RunFolder, config: Config) -> ModelMetadata:
    """Read classes.json of a run; take its content from the data set if it was deleted."""
    return _read_classes(run) or ModelMetadata.of(load_dataset_of(config))


def _read_classes(run: RunFolder) -> ModelMetadata | None:
    return run.read(CLASSES_FILE, ModelMetadata, remedy="delete it: the data set has the classes too")


def digest_of_files(dataset: Dataset) -> str | None:
    """Return a digest of the file names of a folder of images; None for images in memory."""
    train, test = dataset.train.images, dataset.test.images
    if not (isinstance(train, ImageFiles) and isinstance(test, ImageFiles)):
        return None
    names = "\n".join([*train.names, "", *test.names])
    return hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def require_same_files(dataset: Dataset) -> None:
    """Raise a DataError unless all ranks see the same files: indices refer to sorted file names. A collective call."""
    digest = digest_of_files(dataset)
    if digest is None:
        return
    found = gather_objects((os.uname().nodename, digest))
    if len({other for _, other in found}) > 1:
        raise DataError(
            "the nodes do not see the same images in data.root: "
            + ", ".join(f"rank {rank} on {node}" for rank, (node, _) in enumerate(found))
            + "\n  give data.root a folder that all nodes share, or copy the same files to each"
        )

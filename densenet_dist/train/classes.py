"""The data of a run: its classes and its split stay as they are when it begins.

``classes.json`` holds what `predict` needs besides weights. ``split.json.gz`` holds the part of each picture of a
folder: drawn again after pictures were added, the test part would have pictures that the run was trained on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import zip_longest

from densenet_dist.data.datasets import Channels, Dataset
from densenet_dist.data.image_files import ImageFiles
from densenet_dist.errors import CheckpointError
from densenet_dist.run_folder import CLASSES_FILE, SPLIT_FILE, RunFolder
from densenet_dist.schema import Config
from densenet_dist.train.inputs import load_dataset_of, normalisation, train_and_val


@dataclass(frozen=True)
class Classes:
    """What a net was trained on.

    Attributes:
        names: of the classes, by label.
        image_size: side of the square images in pixels.
        mean: of each channel, by which images in [0, 1] are normalised.
        std: likewise.
    """

    names: tuple[str, ...]
    image_size: int
    mean: Channels
    std: Channels


def classes_in(config: Config, dataset: Dataset) -> Classes:
    """Those of a data set as configured."""
    return Classes(dataset.class_names, dataset.image_size, *normalisation(config, dataset))


def note_data(run: RunFolder, config: Config, dataset: Dataset) -> None:
    """Write classes.json and, when a run on a folder of pictures begins, split.json.gz."""
    files, test_files = dataset.train.images, dataset.test.images
    if isinstance(files, ImageFiles) and isinstance(test_files, ImageFiles) and not run.exists(SPLIT_FILE):
        train, val = (files.subset(part).names for part in train_and_val(config, dataset))
        run.write(SPLIT_FILE, json.dumps({"train": train, "val": val, "test": test_files.names}))
    run.write(CLASSES_FILE, json.dumps(asdict(classes_in(config, dataset)), indent=1) + "\n")


def load_data_of(config: Config, run: RunFolder) -> Dataset:
    """The configured data set for a run that may have begun: with its split, and only if it has its classes.

    Raises:
        CheckpointError: the classes are others, or in another order, than the run began with; with the names of both.
        DataError, StorageError: the data set, or one of the run's files, cannot be used.
    """
    parts = run.read_json(SPLIT_FILE).items()
    split = {str(name): part for part, names in parts if isinstance(names, list) for name in names}
    has_begun = run.exists(CLASSES_FILE)
    dataset = load_dataset_of(config, split if split or has_begun else None)
    before = classes_of(run, config).names if has_begun else dataset.class_names
    if before != dataset.class_names:
        pairs = list(zip_longest(before, dataset.class_names, fillvalue="-"))
        shown = pairs if len(pairs) <= 20 else [pair for pair in pairs if pair[0] != pair[1]][:20]
        theirs, ours = map(list, zip(*shown, strict=True))
        raise CheckpointError(
            f"the run {run.uri} has other classes than data.root={config.data.root}:\n"
            f"  the run:      {theirs}\n  the data set: {ours}\n"
            "  rename the class folders, name the run's own data set (data.root=...), or train a new run (name=NEW)"
        )
    return dataset


def classes_of(run: RunFolder, config: Config) -> Classes:
    """Those of a run; a run from before there was ``classes.json`` has them from its data set.

    Raises:
        StorageError: the file is damaged.
        DataError: there is none, and the data set is not there either.
    """
    found = run.read(CLASSES_FILE, Classes, mend="delete it: the data set has the classes too")
    return found or classes_in(config, load_dataset_of(config))

"""What a run's net tells apart, and how its images are normalised: all that `predict` needs besides weights.

``classes.json`` holds it, so that a run can be used where its data set is not.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from densenet_dist.data.datasets import Channels, Dataset
from densenet_dist.run_folder import CLASSES_FILE, RunFolder
from densenet_dist.schema import Config
from densenet_dist.train.inputs import load_dataset_of, normalisation


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


def note_classes(run: RunFolder, config: Config, dataset: Dataset) -> None:
    """Write them into the run's folder, for `classes_of`."""
    run.write(CLASSES_FILE, json.dumps(asdict(classes_in(config, dataset)), indent=1) + "\n")


def classes_of(run: RunFolder, config: Config) -> Classes:
    """Those of a run; a run from before there was ``classes.json`` has them from its data set.

    Raises:
        StorageError: the file is damaged.
        DataError: there is none, and the data set is not there either.
    """
    found = run.read(CLASSES_FILE, Classes, mend="delete it: the data set has the classes too")
    return found or classes_in(config, load_dataset_of(config))

"""The data sets by name: verified uint8 arrays in memory."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from densenet_dist.data import archive, cifar, shapes
from densenet_dist.errors import ConfigError

DATASET_NAMES = ("shapes", "cifar10", "cifar100")

Channels = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their classes, in the data set's own order.

    Attributes:
        images: (n, H, W, 3) uint8, RGB, H = W.
        labels: (n,) int64, in [0, number of classes).
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Attributes:
        class_names: by label.
        mean: red, green, blue mean of the whole training split in [0, 1], whatever the limit or the seed.
        std: standard deviation, likewise.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    mean: Channels
    std: Channels

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return int(self.train.images.shape[1])


def load_dataset(
    name: str,
    root: str | Path,
    *,
    download: bool = True,
    url: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Dataset:
    """Loads a data set into memory, after making sure that each of its files is the official one.

    Args:
        name: one of `DATASET_NAMES`.
        root: the folder that holds the set, extracted or as the official archive, or is the extracted folder itself;
            where it goes if downloaded. "shapes" is generated and does not look at it.
        download: whether to download what is not there.
        url: where the archive comes from instead of the official address: http(s):// or file://.
        limit: keep only the first `limit` images of each split.
        seed: of the generated set; the others ignore it.
        progress: whether to show a bar while downloading.

    Raises:
        ConfigError: there is no such data set, or `limit` or `url` makes no sense.
        DataError: the files are missing, damaged, of another data set, or cannot be downloaded.
        StorageError: `root` cannot be written.
    """
    _check_name(name)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: the number of images to keep must be at least 1")
    if name == "shapes":
        return _shapes(seed, limit)
    spec = cifar.SPECS[name]
    folder = archive.obtain(spec, Path(root), download=download, url=url, progress=progress)
    class_names, train, test = cifar.read_folder(spec, folder)
    return Dataset(name, class_names, _split(*train, limit), _split(*test, limit), spec.mean, spec.std)


def prepare_dataset(
    name: str, root: str | Path, *, download: bool = True, url: str | None = None, progress: bool = True
) -> Path:
    """Downloads, extracts and verifies a data set, as far as that is not done already.

    Returns:
        The folder that holds its files; for "shapes", which has none, `root` as it is.

    Raises:
        ConfigError, DataError, StorageError: as `load_dataset`.
    """
    _check_name(name)
    if name == "shapes":
        return Path(root)
    spec = cifar.SPECS[name]
    folder = archive.obtain(spec, Path(root), download=download, url=url, progress=progress)
    cifar.read_folder(spec, folder)
    return folder


def _check_name(name: str) -> None:
    if name not in DATASET_NAMES:
        raise ConfigError(f"there is no data set {name!r}: data.name must be one of {', '.join(DATASET_NAMES)}")


def _shapes(seed: int, limit: int | None) -> Dataset:
    train = shapes.generate(min(limit or shapes.TRAIN_IMAGES, shapes.TRAIN_IMAGES), seed=seed, part=0)
    test = shapes.generate(min(limit or shapes.TEST_IMAGES, shapes.TEST_IMAGES), seed=seed, part=1)
    return Dataset("shapes", shapes.CLASS_NAMES, Split(*train), Split(*test), shapes.MEAN, shapes.STD)


def _split(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], limit: int | None) -> Split:
    if limit is None or limit >= len(labels):
        return Split(images, labels)
    return Split(images[:limit].copy(), labels[:limit].copy())  # a view would keep the whole set in memory

"""The data sets by name: verified uint8 arrays in memory, or pictures in files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from densenet_dist.data import cifar, cifar_source, image_folder, shapes, store
from densenet_dist.data.image_files import ImageFiles
from densenet_dist.data.plan import Stream, split_indices
from densenet_dist.errors import ConfigError, DataError
from densenet_dist.object_store import is_uri

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Channels = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their classes, in the data set's own order.

    Attributes:
        images: (n, H, W, 3) uint8, RGB, H = W; or pictures in files.
        labels: (n,) int64, in [0, number of classes).
    """

    images: npt.NDArray[np.uint8] | ImageFiles
    labels: npt.NDArray[np.int64]

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return self.images.image_size if isinstance(self.images, ImageFiles) else int(self.images.shape[1])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Attributes:
        class_names: by label.
        mean: red, green, blue mean of the whole training split in [0, 1], whatever the limit or the seed; ImageNet's
            for pictures in files.
        std: standard deviation, likewise.
        val: (m,) int64, places in `train` that are held out for validation, where the set itself says so; else None.
        skipped: pictures that were left out, a line each, with the reason.
        keeps_classes: as for `plan.split_indices`.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    mean: Channels
    std: Channels
    val: npt.NDArray[np.int64] | None = None
    skipped: tuple[str, ...] = ()
    keeps_classes: bool = False

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""
        return self.train.image_size


def load_dataset(
    name: str,
    root: str | Path,
    *,
    download: bool = True,
    url: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    image_size: int = 224,
    test_fraction: float = 0.1,
    on_bad_image: Literal["error", "skip"] = "error",
    split: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Dataset:
    """Loads a data set, after making sure that its files are the official ones, or pictures that can be read.

    Args:
        name: one of `DATASET_NAMES`.
        root: the folder that holds the set, extracted or as the official archive, or is the extracted folder itself;
            where it goes if downloaded. Or an object store's URI, from which it is taken into this node's cache, once,
            and onto which nothing is put: `publish_dataset` does that. Sets that are `GENERATED` do not look at it.
        download: whether to download what is not there; not where `root` is a URI: workers of many nodes never go to
            the origin then.
        url: where the archive comes from instead of the official address: https:// or file://; http:// from this
            machine alone.
        limit: keep only the first `limit` images of each split.
        seed: of the generated set; the others ignore it.
        image_size: side of the square images made of pictures in a folder.
        test_fraction: share of the pictures of a folder without a test part that become one.
        on_bad_image: what becomes of pictures in a folder that cannot be read.
        split: train, val or test for each picture of a folder that a run uses, by name; other pictures are left out.
            Where the folder has none of them, the parts are drawn; if it is empty, as older versions did.
        progress: whether to show a bar while downloading or reading.

    Raises:
        ConfigError: there is no such data set, or `limit` or `url` makes no sense.
        DataError: the files are missing, damaged, of another data set, or cannot be downloaded or read.
        StorageError: `root`, or this node's cache, cannot be written.
    """
    _check_name(name)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: the number of images to keep must be at least 1")
    if name in GENERATED:
        return GENERATED[name](seed, limit)
    if name == "folder":
        path = _pictures(root, progress)
        folder = image_folder.read_folder(path, image_size=image_size, on_bad_image=on_bad_image, progress=progress)
        # Older versions could leave a class without a training picture.
        return _folder(_keep_split(folder, split or {}, limit), limit, test_fraction, keeps_classes=split != {})
    spec = cifar.SPECS[name]
    _, contents = cifar_source.load(spec, root, download=download, url=url, progress=progress)
    class_names, train, test = contents
    return Dataset(name, class_names, _split(*train, limit), _split(*test, limit), spec.mean, spec.std)


def train_size(name: str, limit: int | None) -> int | None:
    """Count the images of a data set's training split, or return None where that is not known without reading it."""
    sizes = {"shapes": shapes.TRAIN_IMAGES} | dict.fromkeys(cifar.SPECS, cifar.TRAIN_IMAGES)
    return min(limit or sizes[name], sizes[name]) if name in sizes else None


def prepare_dataset(
    name: str,
    root: str | Path,
    *,
    download: bool = True,
    url: str | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    progress: bool = True,
) -> tuple[Path, str]:
    """Downloads, extracts and verifies a data set, as far as that is not done already.

    Where `root` is an object store's URI, it is put there too, see `publish_dataset`.

    Returns:
        The folder that holds its files, in this node's cache for a URI; `root` as it is for "folder", and for "shapes",
        which has none. And what was found in it, for people to read.

    Raises:
        ConfigError, DataError, StorageError: as `load_dataset`.
    """
    _check_name(name)
    if name in GENERATED:
        return Path(root), "generated when used"
    left_out: tuple[str, ...] = ()
    if name == "folder":
        path = _pictures(root, progress)
        folder = image_folder.read_folder(path, image_size=1, on_bad_image=on_bad_image, progress=progress)
        names, left_out = folder.class_names, folder.skipped
    else:
        if is_uri(str(root)):
            cifar_source.publish(cifar.SPECS[name], str(root), download=download, url=url, progress=progress)
        path, (names, *_) = cifar_source.load(cifar.SPECS[name], root, download=download, url=url, progress=progress)
    return path, "\n  ".join([f"{len(names):,} classes: {image_folder.few(names)}", *left_out])


def publish_dataset(
    name: str, root: str, *, download: bool = True, url: str | None = None, progress: bool = True
) -> str:
    """Makes sure that a data set is on an object store, for nodes to take it from there.

    The CIFAR sets are brought there from their origin if need be; pictures of one's own must be there.

    Args:
        root: the store's URI.
        download, url, progress: as for `load_dataset`.

    Returns:
        What is there, or has been put there, for people to read.

    Raises:
        ConfigError, DataError, StorageError: as `load_dataset`; the store cannot be written.
    """
    _check_name(name)
    if name in GENERATED:
        return f"{name} is generated when used"
    if name == "folder":
        return store.require_pictures(root)
    return cifar_source.publish(cifar.SPECS[name], root, download=download, url=url, progress=progress)


def _pictures(root: str | Path, progress: bool) -> Path:
    """The local folder with a user's own pictures, made the same as what is on an object store first."""
    return store.sync_pictures(str(root), progress=progress) if is_uri(str(root)) else Path(root)


def _check_name(name: str) -> None:
    if name not in DATASET_NAMES:
        raise ConfigError(f"there is no data set {name!r}; known: {', '.join(DATASET_NAMES)}")


def _shapes(seed: int, limit: int | None) -> Dataset:
    train = shapes.generate(min(limit or shapes.TRAIN_IMAGES, shapes.TRAIN_IMAGES), seed=seed, part=0)
    test = shapes.generate(min(limit or shapes.TEST_IMAGES, shapes.TEST_IMAGES), seed=seed, part=1)
    return Dataset("shapes", shapes.CLASS_NAMES, Split(*train), Split(*test), shapes.MEAN, shapes.STD)


def _keep_split(folder: image_folder.Folder, split: Mapping[str, str], limit: int | None) -> image_folder.Folder:
    """Divide the pictures as in `split`; a test folder that there is stays as it is."""
    files, labels = folder.files, folder.labels
    parts = np.array([split.get(name, "new") for name in files.names])
    if (parts == "new").all():
        return folder
    # A limit leaves pictures out as well: which of them are new is not known.
    new = [files.names[row] for row in np.flatnonzero(parts == "new")] if limit is None else []
    skipped = (*(f"{image_folder.printable(name)}: not in the run's split" for name in new), *folder.skipped)
    used, test = np.flatnonzero(np.isin(parts, ("train", "val"))), np.flatnonzero(parts == "test")
    val = np.flatnonzero(parts[used] == "val")
    kept = replace(folder, files=files.subset(used), labels=labels[used], val=val, skipped=skipped)
    if folder.test_files is not None:
        return kept
    if not len(test):
        raise DataError(f"{files.root} has none of the run's test pictures any more: bring them back")
    return replace(kept, test_files=files.subset(test), test_labels=labels[test])


def _folder(folder: image_folder.Folder, limit: int | None, test_fraction: float, keeps_classes: bool) -> Dataset:
    files, labels, val = folder.files, folder.labels, folder.val
    test_files, test_labels = folder.test_files, folder.test_labels
    if test_files is None or test_labels is None:
        if test_fraction == 0.0:
            raise ConfigError(f"{files.root} has no folder test, and test_fraction=0 leaves nothing to test on")
        # One test part for every seed: what is tested on must not depend on how a run was started.
        train, test = split_indices(
            labels, test_fraction, 0, stratified=True, keeps_classes=keeps_classes, stream=Stream.TEST_SPLIT
        )
        test_files, test_labels = files.subset(test), labels[test]
        files, labels = files.subset(train), labels[train]  # a validation folder would be the test part
    kept, kept_test = _evenly(len(labels), limit), _evenly(len(test_labels), limit)
    return Dataset(
        "folder",
        folder.class_names,
        Split(files.subset(kept), labels[kept]),
        Split(test_files.subset(kept_test), test_labels[kept_test]),
        IMAGENET_MEAN,
        IMAGENET_STD,
        None if val is None else np.flatnonzero(np.isin(kept, val)).astype(np.int64),
        folder.skipped,
        keeps_classes,
    )


def _evenly(count: int, limit: int | None) -> npt.NDArray[np.int64]:
    """Places of at most `limit` of `count` pictures: evenly, because the first ones are all of one class."""
    return np.arange(count) if limit is None or limit >= count else np.arange(limit) * count // limit


def _split(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], limit: int | None) -> Split:
    if limit is None or limit >= len(labels):
        return Split(images, labels)
    return Split(images[:limit].copy(), labels[:limit].copy())  # a view would keep the whole set in memory


GENERATED: Final[Mapping[str, Callable[[int, int | None], Dataset]]] = {"shapes": _shapes}
"""Sets that are made when they are used, from the seed and the number of images to keep of each split (None: all)."""

DATASET_NAMES: Final = (*GENERATED, *cifar.SPECS, "folder")

"""Load data sets by name: verified uint8 arrays in memory, or image files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from densenet_dist.data import cifar, cifar_source, image_folder, shapes, store
from densenet_dist.data.image_files import ImageFiles, Split
from densenet_dist.data.plan import Stream, split_indices
from densenet_dist.errors import ConfigError, DataError
from densenet_dist.object_store import is_uri

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Channels = tuple[float, float, float]
Limits: TypeAlias = tuple[int | None, int | None]
"""How many training and how many test images to keep; None: all of them."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set.

    Attributes:
        class_names: by label.
        mean, std: of the red, green and blue channels of the whole training split in [0, 1], whatever the limit or the
            seed; ImageNet's for image files.
        val: (m,) int64, indices into `train` that the data set itself holds out for validation, or None.
        skipped: image files that were left out, one line each, with the reason.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    mean: Channels
    std: Channels
    val: npt.NDArray[np.int64] | None = None
    skipped: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
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
    test_limit: int | None = None,
    seed: int = 0,
    image_size: int = 224,
    test_fraction: float = 0.1,
    on_bad_image: Literal["error", "skip"] = "error",
    split: Mapping[str, str] | None = None,
) -> Dataset:
    """Load a data set, and verify its files: against official checksums, or as images that can be read.

    Args:
        name: one of `DATASET_NAMES`.
        root: the folder with the data set, extracted or as the official archive, or the extracted folder itself; a
            download goes there. Or the URI of an object store, from which it is copied to this node's cache once;
            `publish_dataset` puts it there.
        download: whether to download what is missing; never if `root` is a URI, so that nodes do not all download it.
        url: of the archive, instead of the official address: https://, http:// or file://.
        limit, test_limit: use at most this many images of the training split, and of the test split.
        seed: of a generated data set.
        image_size: side of the square images made from image files.
        test_fraction: share of the images that become the test split, for a folder without one.
        on_bad_image: whether image files that cannot be read are an error, or are left out.
        split: for a folder, the part (train, val or test) that the run uses each file for, by name; other files are
            left out. If it names none of the files, the parts are drawn anew.

    Raises:
        ConfigError: the name, `limit`, `test_limit` or `url` is invalid.
        DataError: the files are missing, damaged or of another data set, or cannot be downloaded or read.
        StorageError: `root`, or this node's cache, cannot be written.
    """
    _check_name(name)
    limits = limit, test_limit
    for key, count in zip(("limit", "test_limit"), limits, strict=True):
        if count is not None and count < 1:
            raise ConfigError(f"{key}={count}: the number of images to keep must be at least 1")
    if name in GENERATED:
        return GENERATED[name](seed, limits)
    if name == "folder":
        path = _image_folder(root)
        folder = image_folder.read_folder(path, image_size=image_size, on_bad_image=on_bad_image)
        folder = _keep_split(folder, split or {}, limits)
        return _folder_dataset(folder, path.absolute(), limits, test_fraction)
    spec = cifar.SPECS[name]
    _, (class_names, train, test) = cifar_source.load(spec, root, download=download, url=url)
    return Dataset(name, class_names, take_first(train, limit), take_first(test, test_limit), spec.mean, spec.std)


def train_size(name: str, limit: int | None) -> int | None:
    """Return the size of the training split, or None if that is unknown before it is read."""
    sizes = {"shapes": shapes.TRAIN_IMAGES} | dict.fromkeys(cifar.SPECS, cifar.TRAIN_IMAGES)
    return min(limit or sizes[name], sizes[name]) if name in sizes else None


def prepare_dataset(
    name: str,
    root: str | Path,
    *,
    download: bool = True,
    url: str | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
) -> tuple[Path, str]:
    """Download, extract and verify a data set if that is not done yet; arguments and errors as for `load_dataset`.

    Returns:
        The local folder with its files, and a description of what was found.
    """
    _check_name(name)
    if name in GENERATED:
        return Path(root), "generated when used"
    skipped: tuple[str, ...] = ()
    if name == "folder":
        path = _image_folder(root)
        folder = image_folder.read_folder(path, image_size=1, on_bad_image=on_bad_image)
        class_names, skipped = folder.class_names, folder.skipped
    else:
        path, (class_names, *_) = cifar_source.load(cifar.SPECS[name], root, download=download, url=url)
    return path, "\n  ".join([f"{len(class_names):,} classes: {image_folder.few(class_names)}", *skipped])


def publish_dataset(name: str, root: str, *, download: bool = True, url: str | None = None) -> str:
    """Make sure that a data set is on the object store `root`, and return a description of what is there.

    A missing CIFAR set is downloaded and uploaded; image files must be there. Errors are those of `load_dataset`.
    """
    _check_name(name)
    if name in GENERATED:
        return f"{name} is generated when used"
    if name == "folder":
        return store.require_images(root)
    return cifar_source.publish(cifar.SPECS[name], root, download=download, url=url)


def _check_name(name: str) -> None:
    if name not in DATASET_NAMES:
        raise ConfigError(f"there is no data set {name!r}; known: {', '.join(DATASET_NAMES)}")


def _image_folder(root: str | Path) -> Path:
    """Return the local folder with the user's images; first update the copy of those on an object store."""
    return store.sync_images(str(root)) if is_uri(str(root)) else Path(root)


def _shapes(seed: int, limits: Limits) -> Dataset:
    train, test = (
        Split(*shapes.generate(min(limit or count, count), seed=seed, part=part))
        for part, (limit, count) in enumerate(zip(limits, (shapes.TRAIN_IMAGES, shapes.TEST_IMAGES), strict=True))
    )
    return Dataset("shapes", shapes.CLASS_NAMES, train, test, shapes.MEAN, shapes.STD)


def _keep_split(folder: image_folder.Folder, split: Mapping[str, str], limits: Limits) -> image_folder.Folder:
    """Divide the images as in `split`; an existing test folder stays as it is."""
    files = folder.train.images
    assert isinstance(files, ImageFiles)
    parts = np.array([split.get(name, "new") for name in files.names])
    if (parts == "new").all():
        return folder
    # A limit leaves images out as well: which of them are new is unknown.
    is_limited = limits[0] is not None or (limits[1] is not None and folder.test is None)
    new = [] if is_limited else [files.names[index] for index in np.flatnonzero(parts == "new")]
    skipped = (*(f"{image_folder.printable(name)}: not in the run's split" for name in new), *folder.skipped)
    used, test = np.flatnonzero(np.isin(parts, ("train", "val"))), np.flatnonzero(parts == "test")
    val = np.flatnonzero(parts[used] == "val")
    if folder.test is None and not len(test):
        raise DataError(f"{files.root} has none of the run's test images any more: restore them")
    test_split = folder.train[test] if folder.test is None else folder.test
    return replace(folder, train=folder.train[used], val=val, test=test_split, skipped=skipped)


def _folder_dataset(folder: image_folder.Folder, root: Path, limits: Limits, test_fraction: float) -> Dataset:
    train, test, val = folder.train, folder.test, folder.val
    if test is None:
        if test_fraction == 0.0:
            raise ConfigError(f"{root} has no folder test, and test_fraction=0 leaves nothing to test on")
        # One test split for all seeds: what is tested on must not depend on how a run was started.
        rest, held_out = split_indices(train.labels, test_fraction, 0, stratified=True, stream=Stream.TEST_SPLIT)
        train, test = train[rest], train[held_out]  # a validation folder would be the test split
    kept, kept_test = _evenly(len(train.labels), limits[0]), _evenly(len(test.labels), limits[1])
    return Dataset(
        "folder",
        folder.class_names,
        train[kept],
        test[kept_test],
        IMAGENET_MEAN,
        IMAGENET_STD,
        None if val is None else np.flatnonzero(np.isin(kept, val)).astype(np.int64),
        folder.skipped,
    )


def _evenly(count: int, limit: int | None) -> npt.NDArray[np.int64]:
    """Return indices of at most `limit` of `count` image files, evenly spaced: the first ones are all of one class."""
    return np.arange(count) if limit is None or limit >= count else np.arange(limit) * count // limit


def take_first(split: Split, limit: int | None) -> Split:
    """Return the first images of a split, at most `limit`."""
    # The rows are copied: a view would keep the whole set in memory.
    return split if limit is None or limit >= len(split.labels) else split[np.arange(limit)]


GENERATED: Final[Mapping[str, Callable[[int, Limits], Dataset]]] = {"shapes": _shapes}
"""Data sets that are generated when used, from the seed and the limits of the two splits."""

DATASET_NAMES: Final = (*GENERATED, *cifar.SPECS, "folder")

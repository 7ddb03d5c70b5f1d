"""Find a user's own images in class folders, and verify them before training starts.

`root/<class>/**/*.jpg` has no test split: the caller holds one out. `root/train/<class>/...` may have the folders
`test` and `val` beside it; `val` alone is the test split, as in ImageNet.

Every image is decoded once. The results are cached by size and modification time, so that the next start decodes only
new and changed files.
"""

import hashlib
import json
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from densenet_dist.data.background import map_ahead, progress_bar
from densenet_dist.data.image_files import (
    IMAGE_SUFFIXES,
    UNREADABLE,
    ImageFiles,
    Split,
    Verdict,
    has_image_suffix,
    verify_image,
)
from densenet_dist.environment import cache_folder
from densenet_dist.errors import DataError, StorageError, first_lines
from densenet_dist.run_folder import RunFolder

_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_IGNORED = ("__MACOSX", "Thumbs.db", "@eaDir", "lost+found")  # created by systems, as are names that begin with a dot
_SHOWN = 20
_MIN_FILES_FOR_BAR = 300
_QUEUED = 1024  # files that wait for a thread
_CACHE_VERSION = 3
_NAME_ANOTHER = "name the folder that holds your class folders: data.root=..."
_EXPECTED = f"images are looked for in <class>/, or in train/<class>/, val/<class>/ and test/<class>/; {_NAME_ANOTHER}"


@dataclass(frozen=True, eq=False)
class Folder:
    """The contents of a folder of class folders.

    Attributes:
        class_names: by label; the names of the training folders in byte order.
        train: the training images, then those of the validation folder.
        val: (m,) int64, the rows of `train` from the validation folder, or None.
        skipped: images and folders that were left out, each as "path: reason".
    """

    class_names: tuple[str, ...]
    train: Split
    val: npt.NDArray[np.int64] | None
    test: Split | None
    skipped: tuple[str, ...]


def read_folder(root: Path, *, image_size: int, on_bad_image: Literal["error", "skip"] = "error") -> Folder:
    """Find and verify the images below `root`, of which squares of `image_size` pixels a side will be made.

    Raises:
        DataError: the folder is missing, cannot be read or has another layout; a class or a part has no image that can
            be used; or an image cannot be used, unless such images are skipped.
    """
    root = Path(root).absolute()
    try:
        folders, unused = _find_parts(root)
        class_names, parts = _list_parts(root, folders)
    except OSError as error:
        remedy = f"give access to it, or {_NAME_ANOTHER}"
        raise DataError(f"cannot read {error.filename}: {error.strerror}; {remedy}") from error
    verdicts = _verify(root, [name for part in parts.values() for name in part])
    bad = tuple(f"{printable(name)}: {verdict}" for name, verdict in verdicts.items() if isinstance(verdict, str))
    if bad and on_bad_image == "error":
        remedy = "delete or convert them, or leave them out: data.on_bad_image=skip"
        first = f"{len(bad)} of {len(verdicts)} images in {root} cannot be used:"
        raise DataError("\n  ".join((first, *first_lines(bad, _SHOWN), remedy)))
    for part, labels in parts.items():
        parts[part] = {name: label for name, label in labels.items() if not isinstance(verdicts[name], str)}
        present = set(parts[part].values())
        empty = [name for label, name in enumerate(class_names) if label not in present]
        if empty and (part == "train" or not present):
            raise DataError(
                f"{folders[part]} has no image that can be used in {printable(', '.join(empty))}: "
                f"add some ({', '.join(IMAGE_SUFFIXES)}), or remove these folders"
            )

    def split(labels: dict[str, int]) -> Split:
        found = np.array([verdicts[name] for name in labels], dtype=np.int64)
        files = ImageFiles(root, tuple(labels), found[:, :2], found[:, 2], image_size)
        return Split(files, np.array(list(labels.values()), dtype=np.int64))

    train = split(parts["train"] | parts.get("val", {}))
    val = np.arange(len(parts["train"]), len(train.labels), dtype=np.int64) if "val" in parts else None
    test = split(parts["test"]) if "test" in parts else None
    skipped = (*(f"{printable(name)}: not used (no class folders, or no part)" for name in unused), *bad)
    return Folder(tuple(map(printable, class_names)), train, val, test, skipped)


def few(names: Sequence[str]) -> str:
    """Return the first five of some names, for messages."""
    return printable(", ".join([*names[:5], *["..."] * (len(names) > 5)]))


def _find_parts(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Find the folder with the class folders of each part (train, val, test), and the names of unused folders."""
    if not root.is_dir():
        what = "is not a folder (an archive must be unpacked)" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}; {_NAME_ANOTHER}")
    parts: dict[str, Path] = {}
    unused = []
    names = _subfolders(root)
    for name in names:
        part = _PARTS.get(name.lower())
        if not part or not _subfolders(root / name):
            unused.append(name)
        elif part in parts:
            raise DataError(f"{root} has more than one {part} folder: remove {name}, or {_NAME_ANOTHER}")
        else:
            parts[part] = root / name
    if "train" in parts:
        if "test" not in parts and "val" in parts:
            parts["test"] = parts.pop("val")
        return parts, [name for name in unused if _has_images(root, root / name)]
    if any("train" in name.lower() for name in names) and any("test" in name.lower() for name in names):
        raise DataError(f"{root} has {few(names)}, which are no classes and no parts: {_EXPECTED}")
    return {"train": root}, []


def _list_parts(root: Path, folders: dict[str, Path]) -> tuple[list[str], dict[str, dict[str, int]]]:
    """Return the class names; and for each part the labels of its image files, by name, in byte order."""
    train = folders["train"]
    subfolders = {name: _subfolders(train / name) for name in _subfolders(train)}
    if len(subfolders) < 2:
        raise DataError(f"{train} has {len(subfolders)} class folders, but at least 2 are needed: {_EXPECTED}")
    copies = [name for name, names in subfolders.items() if len(names) > 1]
    counts = Counter([*subfolders, *(name for copy in copies for name in subfolders[copy])])
    if len(repeated := [name for name, count in counts.items() if count > 1]) > 1:
        copies = [name for name in copies if set(subfolders[name]) & set(repeated)]
        raise DataError(
            f"{train} has more than one folder of each of these names: {few(repeated)}; look into {few(copies)}\n"
            f"  {_NAME_ANOTHER}\n  or name the two parts of one data set train and test\n"
            f"  or, if {few(copies)} are classes, move their images up into them"
        )
    label_of = {name: label for label, name in enumerate(subfolders)}
    parts = {}
    for part, folder in folders.items():
        names = _subfolders(folder)
        if unknown := [name for name in names if name not in label_of and _has_images(root, folder / name)]:
            problem = f"{folder} has classes that {train} lacks: {printable(', '.join(unknown))}"
            raise DataError(f"{problem}; rename or remove these folders")
        labels = {image: label_of[name] for name in names if name in label_of for image in _walk(root, folder / name)}
        parts[part] = dict(sorted(labels.items(), key=lambda item: os.fsencode(item[0])))
    return list(subfolders), parts


def _verify(root: Path, names: list[str]) -> dict[str, Verdict]:
    """Return the verdict on each file, by name; only those that the cache does not know are decoded."""
    cache = RunFolder(str(cache_folder()), "folders")
    cache_file = f"{hashlib.blake2b(os.fsencode(root), digest_size=16).hexdigest()}.json"
    cached: dict[str, Any] = {}  # [size, mtime_ns, [width, height, CRC-32]] or [size, mtime_ns, reason]
    with suppress(OSError, StorageError):  # without a cache, or with a damaged one, all files are verified
        match cache.read_json(cache_file):
            case {"version": version, "files": dict(files)} if version == _CACHE_VERSION:
                cached = files
    verdicts: dict[str, Verdict] = {}
    stamps: dict[str, list[int]] = {}
    for name in names:
        with suppress(OSError):  # `verify_image` reports it
            status = os.stat(root / name)
            stamps[name] = [status.st_size, status.st_mtime_ns]
        match cached.get(name):
            case [*stamp, str() | [int(), int(), int()] as verdict] if stamp == stamps.get(name):
                verdicts[name] = verdict if isinstance(verdict, str) else tuple(verdict)
    unknown = [name for name in names if name not in verdicts]
    try:
        _verify_all(root, unknown, verdicts)
    finally:  # keep what was found before an interrupt
        entries = {
            name: [*stamps[name], verdict]
            for name, verdict in verdicts.items()
            if name in stamps and not str(verdict).startswith(UNREADABLE)
        }
        if unknown or entries.keys() != cached.keys():
            with suppress(OSError, StorageError):
                cache.write(cache_file, json.dumps({"version": _CACHE_VERSION, "files": entries}))
    return {name: verdicts[name] for name in names}


def _verify_all(root: Path, names: list[str], verdicts: dict[str, Verdict]) -> None:
    """Verify files with as many threads as this process has CPUs, and add the results to `verdicts`."""
    bar = progress_bar("checking images", "files") if len(names) >= _MIN_FILES_FOR_BAR else nullcontext(lambda *_: None)
    # Pillow's warnings are ignored here, because the filters apply to all threads.
    with warnings.catch_warnings(action="ignore"), bar as advance:
        found = map_ahead(verify_image, (root / name for name in names), _QUEUED, len(os.sched_getaffinity(0)))
        for name, verdict in zip(names, found, strict=True):
            verdicts[name] = verdict
            advance(1, len(names))


def _has_images(root: Path, folder: Path) -> bool:
    return next(_walk(root, folder), None) is not None


def _walk(root: Path, folder: Path) -> Iterator[str]:
    """Yield the names, relative to `root`, of the image files below `folder`."""

    def fail(error: OSError) -> None:
        raise error

    prefix = os.path.join(root, "")
    for place, names in walk(folder, {os.path.realpath(root), os.path.realpath(folder.parent)}, fail):
        for name in names:
            yield os.path.join(place, name).removeprefix(prefix)


def walk(
    folder: str | Path, seen: set[str], on_error: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below `folder` once, links included, with the sorted names of its image files.

    Args:
        seen: real paths of folders that are skipped; those visited are added.
        on_error: called if a folder cannot be read; by default it is skipped.
    """
    for place, folders, names in os.walk(folder, onerror=on_error, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()  # reached again through a link
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        yield place, sorted(name for name in names if has_image_suffix(name) and not is_ignored(name))


def _subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`, in byte order."""
    return [entry.name for entry in _entries(folder) if _is_folder(entry)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of `folder` that are not ignored, in byte order of the names."""
    with os.scandir(folder) as entries:
        kept = [entry for entry in entries if not is_ignored(entry.name)]
    return sorted(kept, key=lambda entry: os.fsencode(entry.name))


def is_ignored(name: str) -> bool:
    """Return whether a file or folder of that name was created by a system, and not by the user."""
    return name.startswith(".") or name in _IGNORED


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # For a link to itself os.path.isdir is False, while the entry's is_dir raises.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def printable(name: str) -> str:
    """Escape what cannot be printed in a file's name: bytes that are not UTF-8, and control characters."""
    escaped = ("Cc", "Cf", "Cs", "Zl", "Zp")  # includes those that change the direction of writing
    return "".join(ascii(letter)[1:-1] if unicodedata.category(letter) in escaped else letter for letter in name)

"""A user's own pictures in class folders: found and listed before training starts.

`root/<class>/**/*.jpg` is a set whose test part the caller holds out. `root/train/<class>/...` is one that brings its
own parts: `test` and a validation folder (`val`, `valid` or `validation`) beside `train`; a validation folder alone is
the test part, as in ImageNet.
"""

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from densenet_dist.data.image_check import verify
from densenet_dist.data.image_files import IMAGE_SUFFIXES, REFUSED_SUFFIXES, ImageFiles, suffix
from densenet_dist.errors import ConfigError, DataError

VAL_FOLDERS = ("val", "valid", "validation")

_IGNORED = ("__MACOSX", "Thumbs.db", "@eaDir", "lost+found")  # made by systems, as is what begins with a dot
_SHOWN = 20
_NAME_ANOTHER = "name the folder that holds your class folders: data.root=..."


@dataclass(frozen=True, eq=False)
class Folder:
    """What a folder of class folders holds.

    Attributes:
        class_names: by label; the names of the training part's folders in byte order.
        files: the training pictures, then those of the validation folder.
        labels: (n,) int64, their classes.
        val: (m,) int64, the rows of `files` that are from the validation folder; None where there is none.
        test_files: the test pictures; None where there is no test part.
        test_labels: int64, their classes; None likewise.
        skipped: bad images that were left out, each as "path: reason".
    """

    class_names: tuple[str, ...]
    files: ImageFiles
    labels: npt.NDArray[np.int64]
    val: npt.NDArray[np.int64] | None
    test_files: ImageFiles | None
    test_labels: npt.NDArray[np.int64] | None
    skipped: tuple[str, ...]


def read_folder(root: Path, *, image_size: int, on_bad_image: str = "error", progress: bool = False) -> Folder:
    """Finds and verifies the pictures below `root`.

    Args:
        image_size: side in pixels of the square images that will be made of them.
        on_bad_image: "error", or "skip" to leave bad images out and list them.
        progress: whether to show a bar on standard error while many files are checked.

    Raises:
        ConfigError: `on_bad_image` is neither.
        DataError: the folder is missing, cannot be read or has no such layout; a class or a part has no picture that
            can be used; or there are bad images and they are not to be skipped.
    """
    if on_bad_image not in ("error", "skip"):
        raise ConfigError(f"data.on_bad_image={on_bad_image!r} must be error or skip")
    root = Path(root).absolute()
    try:
        folders = _find_parts(root)
        class_names, parts = _list_parts(root, folders)
    except OSError as error:
        mend = f"give access to it, or {_NAME_ANOTHER}"
        raise DataError(f"cannot read {error.filename}: {error.strerror}; {mend}") from error
    verdicts = verify(root, [name for part in parts.values() for name in part], progress=progress)
    bad = tuple(f"{printable(name)}: {found}" for name, found in verdicts.items() if isinstance(found, str))
    if bad and on_bad_image == "error":
        more = (f"... and {len(bad) - _SHOWN} more",) if len(bad) > _SHOWN else ()
        mend = "delete or convert them, or leave them out: data.on_bad_image=skip"
        first = f"{len(bad)} of {len(verdicts)} pictures in {root} cannot be used:"
        raise DataError("\n  ".join((first, *bad[:_SHOWN], *more, mend)))
    for part, labels in parts.items():
        parts[part] = {name: label for name, label in labels.items() if not isinstance(verdicts[name], str)}
        present = set(parts[part].values())
        lacking = [name for label, name in enumerate(class_names) if label not in present]
        if lacking and (part == "train" or not present):
            raise DataError(
                f"{root / folders[part]} has no picture that can be used in {printable(', '.join(lacking))}: "
                f"add some ({', '.join(IMAGE_SUFFIXES)}), or take these folders away"
            )

    def arrays(labels: dict[str, int]) -> tuple[ImageFiles, npt.NDArray[np.int64]]:
        found = np.array([verdicts[name] for name in labels], dtype=np.int64)
        files = ImageFiles(root, tuple(labels), found[:, :2], found[:, 2], image_size)
        return files, np.array(list(labels.values()), dtype=np.int64)

    files, labels_of_files = arrays(parts["train"] | parts.get("val", {}))
    val = np.arange(len(parts["train"]), len(files), dtype=np.int64) if "val" in parts else None
    test_files, test_labels = arrays(parts["test"]) if "test" in parts else (None, None)
    names = tuple(map(printable, class_names))
    return Folder(names, files, labels_of_files, val, test_files, test_labels, skipped=bad)


def _find_parts(root: Path) -> dict[str, str]:
    """The folders of the parts that there are (train, val, test), relative to `root`; train's is "." if flat."""
    if not root.is_dir():
        what = "is not a folder (an archive must be unpacked)" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}; {_NAME_ANOTHER}")
    # Who writes Train and Test means the parts too, and not two classes.
    found = {name.lower(): name for name in _subfolders(root) if name.lower() in ("train", "test", *VAL_FOLDERS)}
    found = {part: name for part, name in found.items() if _subfolders(root / name)}
    if "train" not in found:
        return {"train": "."}
    val = [found[name] for name in VAL_FOLDERS if name in found]
    if len(val) > 1:
        raise DataError(f"{root} has {len(val)} validation folders, {', '.join(val)}: keep one of them")
    parts = {"train": found["train"]}
    if val:
        parts["val" if "test" in found else "test"] = val[0]
    if "test" in found:
        parts["test"] = found["test"]
    return parts


def _list_parts(root: Path, folders: dict[str, str]) -> tuple[list[str], dict[str, dict[str, int]]]:
    """The class names; and by part the labels of the files that look like pictures, by name, in byte order."""
    train = root / folders["train"]
    class_names = _subfolders(train)
    if len(class_names) < 2:
        raise DataError(
            f"{train} has {len(class_names)} class folders, but at least 2 are needed: pictures are looked for in "
            f"{root}/<class>/, or in {root}/train/<class>/ and {root}/test/<class>/; {_NAME_ANOTHER}"
        )
    label_of = {name: label for label, name in enumerate(class_names)}
    parts = {}
    for part, folder in folders.items():
        present = _subfolders(root / folder)
        if unknown := [name for name in present if name not in label_of]:
            lacks = f"{root / folder} has classes that {train} lacks: {printable(', '.join(unknown))}"
            raise DataError(f"{lacks}; rename these folders, or take them away")
        labels = {name: label_of[of] for of in present for name in _walk(root, root / folder / of)}
        parts[part] = dict(sorted(labels.items(), key=lambda item: os.fsencode(item[0])))
    return class_names, parts


def _walk(root: Path, folder: Path) -> Iterator[str]:
    """Names, relative to `root`, of the files below `folder` that look like pictures; every folder is seen once."""
    prefix = os.path.join(root, "")
    seen = {os.path.realpath(root), os.path.realpath(folder.parent)}
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        if (real := os.path.realpath(place)) in seen:
            continue  # a link back to where we have been
        seen.add(real)
        for entry in _entries(place):
            if _is_folder(entry):
                waiting.append(Path(entry.path))
            elif suffix(entry.name) in (*IMAGE_SUFFIXES, *REFUSED_SUFFIXES):
                yield entry.path.removeprefix(prefix)


def _subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, in byte order."""
    return [entry.name for entry in _entries(folder) if _is_folder(entry)]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What people put into `folder`, in byte order of the names."""
    with os.scandir(folder) as entries:
        kept = [entry for entry in entries if not is_ignored(entry.name)]
    return sorted(kept, key=lambda entry: os.fsencode(entry.name))


def is_ignored(name: str) -> bool:
    """Whether a file or folder of that name was made by a system, and not by the people whose pictures these are."""
    return name.startswith(".") or name in _IGNORED


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # os.path.isdir says no to a link that leads to itself, where the entry's own is_dir raises.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def printable(name: str) -> str:
    """A file's name as text that can be printed, also where it is not UTF-8, or would tell a terminal what to do."""
    unseen = ("Cc", "Cf", "Cs", "Zl", "Zp")  # with those that turn the direction of writing
    return "".join(ascii(letter)[1:-1] if unicodedata.category(letter) in unseen else letter for letter in name)

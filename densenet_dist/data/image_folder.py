"""A user's own pictures in class folders: found and listed before training starts.

`root/<class>/**/*.jpg` is a set whose test part the caller holds out. `root/train/<class>/...` is one that brings its
own parts: folders for test and validation beside that for training, by the names that public data sets use (`_PARTS`);
a validation folder alone is the test part, as in ImageNet. A folder that alone holds everything is looked through, and
`images`, beside which data sets keep annotations or masks.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from densenet_dist.data.image_check import verify
from densenet_dist.data.image_files import IMAGE_SUFFIXES, ImageFiles, named_as_picture
from densenet_dist.errors import ConfigError, DataError

_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_IMAGES = ("images", "image", "imgs", "img", "jpg", "jpegimages")
_IGNORED = ("__MACOSX", "Thumbs.db", "@eaDir", "lost+found")  # made by systems, as is what begins with a dot
_SHOWN = 20
_NAME_ANOTHER = "name the folder that holds your class folders: data.root=..."
_EXPECTED = f"pictures are looked for in <class>/, or in train/<class>/ and test/<class>/; {_NAME_ANOTHER}"


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
        skipped: bad images and folders that were left out, each as "path: reason".
    """

    class_names: tuple[str, ...]
    files: ImageFiles
    labels: npt.NDArray[np.int64]
    val: npt.NDArray[np.int64] | None
    test_files: ImageFiles | None
    test_labels: npt.NDArray[np.int64] | None
    skipped: tuple[str, ...]


def read_folder(root: Path, *, image_size: int, on_bad_image: str = "error") -> Folder:
    """Finds and verifies the pictures below `root`.

    Args:
        image_size: side in pixels of the square images that will be made of them.
        on_bad_image: "error", or "skip" to leave bad images out and list them.

    Raises:
        ConfigError: `on_bad_image` is neither.
        DataError: the folder is missing, cannot be read or has no such layout; a class or a part has no picture that
            can be used; or there are bad images and they are not to be skipped.
    """
    if on_bad_image not in ("error", "skip"):
        raise ConfigError(f"data.on_bad_image={on_bad_image!r} must be error or skip")
    root = Path(root).absolute()
    try:
        folders, unused = _find_parts(root)
        class_names, parts = _list_parts(root, folders)
    except OSError as error:
        mend = f"give access to it, or {_NAME_ANOTHER}"
        raise DataError(f"cannot read {error.filename}: {error.strerror}; {mend}") from error
    verdicts = verify(root, [name for part in parts.values() for name in part])
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
                f"{folders[part]} has no picture that can be used in {printable(', '.join(lacking))}: "
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
    skipped = (*(f"{printable(name)}: not used (no class folders, or no part)" for name in unused), *bad)
    return Folder(names, files, labels_of_files, val, test_files, test_labels, skipped)


def few(names: Sequence[str]) -> str:
    """The first of some names, for people to read."""
    return printable(", ".join([*names[:5], *["..."] * (len(names) > 5)]))


def _find_parts(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folder of each part (train, val, test) that holds its class folders, and the names of unused folders."""
    if not root.is_dir():
        what = "is not a folder (an archive must be unpacked)" if root.exists() else "does not exist"
        raise DataError(f"{root} {what}; {_NAME_ANOTHER}")
    for place, inside in ((root, _subfolders(root)), _look_through(root, root)):
        parts: dict[str, Path] = {}
        unused = []
        for name in inside:
            part = _part_of(name)
            folder, classes = _look_through(root, place / name) if part else (place, [])
            if not part or not classes:
                unused.append(name)
            elif part in parts:
                raise DataError(f"{place} has more than one {part} folder: remove {name}, or {_NAME_ANOTHER}")
            else:
                parts[part] = folder
        if "train" in parts:
            if "test" not in parts and "val" in parts:
                parts["test"] = parts.pop("val")
            return parts, [name for name in unused if _has_pictures(root, place / name)]
    named = set(map(_part_of, inside))
    if None not in named and {"train"} < named:
        raise DataError(f"{place} has no class folders in {few(inside)}: {_EXPECTED}")
    return {"train": place}, []


def _part_of(name: str) -> str | None:
    """The part that a folder's name means by its first or last word: train for Training, seg_train, trainSet."""
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+", name)
    return next((_PARTS[word.lower()] for word in (*words[:1], *words[-1:]) if word.lower() in _PARTS), None)


def _look_through(root: Path, folder: Path) -> tuple[Path, list[str]]:
    """The folder inside of folders that only wrap another one, and the names of its subfolders."""
    while True:
        inside = _subfolders(folder)
        images = [name for name in inside if name.lower() in _IMAGES]
        filled = list(islice((name for name in images or inside if _has_pictures(root, folder / name)), 2))
        wraps = len(filled) == 1 and (images or filled[0] == folder.name or _subfolders(folder / filled[0]))
        if not wraps or any(named_as_picture(entry.name) for entry in _entries(folder)):
            return folder, inside
        folder = folder / filled[0]


def _list_parts(root: Path, folders: dict[str, Path]) -> tuple[list[str], dict[str, dict[str, int]]]:
    """The class names; and by part the labels of the files that look like pictures, by name, in byte order."""
    found = {
        part: {name: _look_through(root, folder / name) for name in _subfolders(folder)}
        for part, folder in folders.items()
    }
    train, inside = folders["train"], {name: names for name, (_, names) in found["train"].items()}
    if len(inside) < 2:
        raise DataError(f"{train} has {len(inside)} class folders, but at least 2 are needed: {_EXPECTED}")
    copies = [name for name, names in inside.items() if len(names) > 1]
    counts = Counter([*inside, *(name for copy in copies for name in inside[copy])])
    if len(again := [name for name, count in counts.items() if count > 1]) > 1:
        copies = [name for name in copies if set(inside[name]) & set(again)]
        raise DataError(
            f"{train} has more than one folder of each of these names: {few(again)}; look into {few(copies)}\n"
            f"  {_NAME_ANOTHER}\n  or call the parts of one data set train and test\n"
            f"  or, if {few(copies)} are classes, move their pictures up into them"
        )
    label_of = {name: label for label, name in enumerate(inside)}
    parts = {}
    for part, folder in folders.items():
        if unknown := [name for name in found[part] if name not in label_of and _has_pictures(root, folder / name)]:
            lacks = f"{folder} has classes that {train} lacks: {printable(', '.join(unknown))}"
            raise DataError(f"{lacks}; rename these folders, or take them away")
        classes = {name: place for name, (place, _) in found[part].items() if name in label_of}
        labels = {name: label_of[of] for of, place in classes.items() for name in _walk(root, place)}
        parts[part] = dict(sorted(labels.items(), key=lambda item: os.fsencode(item[0])))
    return list(inside), parts


def _has_pictures(root: Path, folder: Path) -> bool:
    return next(_walk(root, folder), None) is not None


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
            elif named_as_picture(entry.name):
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

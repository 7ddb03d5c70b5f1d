"""Pictures on an object store, kept the same in a folder of the node: only what changed there is taken again.

A copy gets the time of change of its original, so that size and time tell one from another, as rsync does it: there is
no list beside the files that could say something else than they do.
"""

import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from densenet_dist.data.image_files import named_as_picture
from densenet_dist.data.image_folder import is_ignored
from densenet_dist.data.progress import progress_bar
from densenet_dist.data.store import DataStore, Stamp, locked_cache
from densenet_dist.errors import DataError

_THREADS = 8
_AT_A_TIME = 256  # files that wait for a thread


def sync(uri: str, *, progress: bool) -> Path:
    """The node's folder with the pictures as they are on the store now.

    Processes of a node that ask at the same time wait for the one that asked first, and take what it found.

    Raises:
        DataError: the store cannot be read, holds no pictures, or names that lead out of the folder.
        StorageError: the cache cannot be written, or the address cannot be used.
    """
    asked = time.time()
    store = DataStore(uri)
    with locked_cache(uri) as entry:
        folder, stamp = entry / "files", entry / ".compared"
        if not (stamp.is_file() and stamp.stat().st_mtime > asked):  # else somebody compared while we waited
            wanted = _pictures(store)
            _take(store, wanted, folder, entry / ".partial", progress)
            stamp.touch()
            os.utime(stamp)
    return folder


def require(uri: str) -> str:
    """Makes sure that there is something at an address, without taking it.

    Returns:
        What is there, for people to read.

    Raises:
        DataError: there is not, or the store cannot be read.
    """
    store = DataStore(uri)
    folders = [name for name, size in store.entries().items() if size is None and not is_ignored(name)]
    if not folders:
        raise DataError(_nothing(store))
    return f"{len(folders)} folders are in {store.place}"


def _nothing(store: DataStore) -> str:
    return (
        f"there are no pictures in data.root={store.place}: they are looked for in <class>/ or train/<class>/ there; "
        "put them there, or name the place that holds your class folders"
    )


def _pictures(store: DataStore) -> dict[str, Stamp]:
    """What looks like a picture on the store."""
    found = {}
    for name, stamp in store.listing().items():
        parts = name.split("/")
        if not named_as_picture(name) or any(map(is_ignored, parts)):
            # What begins with a dot is ignored, and so a name that leads out by way of "..".
            continue
        if "" in parts or "\0" in name:
            raise DataError(f"{name!r} in {store.place} cannot be the name of a file here: rename it there")
        found[name] = stamp
    if not found:
        raise DataError(_nothing(store))
    return found


def _take(store: DataStore, wanted: dict[str, Stamp], folder: Path, aside: Path, progress: bool) -> None:
    """Makes `folder` hold the wanted files and no others. The caller holds the cache."""
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
    aside.mkdir()
    present = dict(_present(folder))
    for name in present.keys() - wanted.keys():
        (folder / name).unlink()
    _drop_empty(folder)
    missing = [name for name, stamp in wanted.items() if present.get(name) != stamp]
    for parent in {os.path.dirname(name) for name in missing}:
        (folder / parent).mkdir(parents=True, exist_ok=True)

    def take(number: int, name: str) -> int:
        size, changed = wanted[name]
        partial = aside / str(number)
        store.copy(name, partial)
        os.utime(partial, ns=(changed, changed))
        partial.replace(folder / name)
        return size

    total = sum(wanted[name][0] for name in missing)
    title = f"downloading {len(missing)} pictures"
    with progress_bar(title, progress and bool(missing)) as advance, ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(missing), _AT_A_TIME):
            some = missing[start : start + _AT_A_TIME]
            for size in pool.map(take, range(start, start + len(some)), some):
                advance(size, total)
    shutil.rmtree(aside, ignore_errors=True)


def _present(folder: Path) -> Iterable[tuple[str, Stamp]]:
    """The files in a folder and below, by name."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            status = os.stat(path)
            yield os.path.relpath(path, folder), (status.st_size, status.st_mtime_ns)


def _drop_empty(folder: Path) -> None:
    """Deletes folders without files: a class that is gone from the store is none any more."""
    for place, folders, names in os.walk(folder, topdown=False):
        if not names and not any(os.path.isdir(os.path.join(place, one)) for one in folders):
            os.rmdir(place)

"""Copy data sets from an object store to each node's cache.

A node keeps one folder per address in ``data`` below `cache_folder`, from run to run. A lock lets one process at a
time change it.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from filelock import FileLock

from densenet_dist.data.background import map_ahead, progress_bar
from densenet_dist.data.image_files import has_image_suffix
from densenet_dist.data.image_folder import is_ignored
from densenet_dist.environment import CACHE_ENV, cache_folder, unique_suffix
from densenet_dist.errors import DataError, StorageError
from densenet_dist.object_store import explain_storage_error, open_filesystem

if TYPE_CHECKING:
    from pyarrow import fs

Stamp: TypeAlias = tuple[int, int]
"""Size in bytes and modification time in nanoseconds since 1970."""

_CHUNK = 16 << 20  # each is a request of its own
_THREADS = 8
_QUEUED = 256  # files that wait for a thread


class DataStore:
    """The folder at an address of an object store; `place` is the address without its query, for messages.

    Raises:
        ConfigError, StorageError: the address cannot be used, see `open_filesystem`.
    """

    def __init__(self, uri: str) -> None:
        self.uri, self.place = uri, uri.partition("?")[0].rstrip("/")
        self._files: fs.FileSystem
        self._files, self._prefix = open_filesystem(uri)

    def list(self, *, recursive: bool = False) -> dict[str, Stamp | None]:
        """Return the stamp of each file, and None for each folder, by name.

        Raises:
            DataError: it cannot be read, or there is no such bucket.
        """
        from pyarrow import fs

        with self._reading():
            try:
                infos = self._files.get_file_info(fs.FileSelector(self._prefix, recursive=recursive))
            except FileNotFoundError:  # a missing bucket raises another error
                return {}
        start = len(self._prefix) + 1
        return {info.path[start:]: None if info.size is None else (info.size, info.mtime_ns) for info in infos}

    def copy(self, name: str, target: Path, advance: Callable[[int], object] = lambda size: None) -> None:
        """Copy a file to the local file `target`, and flush it to the disk; call `advance` with each chunk's size.

        Raises:
            DataError: the file cannot be read.
            OSError: `target` cannot be written.
        """
        with open(target, "wb") as file:
            for chunk in self._chunks(name):
                file.write(chunk)
                advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())

    def put(self, source: Path, name: str) -> None:
        """Copy a local file to the store atomically.

        Raises:
            StorageError: it cannot be written.
        """
        data = source.read_bytes()  # first: closing the stream of a source that fails would publish a part of it
        path, local = f"{self._prefix}/{name}", self._files.type_name == "local"
        # An object appears when it is complete.
        partial = f"{path}.{unique_suffix()}.partial" if local else path
        try:
            if local:
                self._files.create_dir(path.rpartition("/")[0], recursive=True)
            with self._files.open_output_stream(partial, compression=None) as stream:
                stream.write(data)
            if local:
                self._files.move(partial, path)
        except OSError as error:
            raise StorageError(f"cannot write {name} to {self.place}: {explain_storage_error(error)}") from error

    def _chunks(self, name: str) -> Iterator[bytes]:
        path = f"{self._prefix}/{name}"
        # Without compression=None, pyarrow decompresses names that end in .gz.
        with self._reading(f"{name} in "), self._files.open_input_stream(path, compression=None) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk

    @contextmanager
    def _reading(self, what: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"cannot read {what}data.root={self.place}: {explain_storage_error(error)}") from error


def cache_of(uri: str) -> Path:
    """Return this node's folder for an address; it may not exist yet."""
    address, _, query = uri.partition("?")
    address = address.rstrip("/")
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", address.partition("://")[2]).strip("-.")[-60:]
    digest = hashlib.blake2b(f"{address}?{query}".encode(), digest_size=8).hexdigest()
    return cache_folder() / "data" / f"{readable}-{digest}"


@contextmanager
def locked_folder(folder: Path, lock_name: str, remedy: str) -> Iterator[None]:
    """Create `folder` if it is missing, and hold its lock; raise StorageError if something in it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / lock_name
        lock.touch()  # fail here: FileLock may wait forever for a file that cannot be created
        with FileLock(lock):
            yield
    except OSError as error:
        raise StorageError(f"cannot store the data set in {folder}: {error}; {remedy}") from error


@contextmanager
def locked_cache(uri: str) -> Iterator[Path]:
    """Hold this node's folder for an address, see `locked_folder`."""
    folder = cache_of(uri)
    with locked_folder(folder, ".lock", f"make room there, or choose a folder on another disk: {CACHE_ENV}=FOLDER"):
        yield folder


def sync_images(uri: str) -> Path:
    """Bring this node's copy of the images at an address up to date, and return its folder.

    Only files whose size or modification time differs are copied; a copy gets the time of its original, as in rsync.
    Processes of a node that start at once wait for the first one, and use its result.

    Raises:
        DataError: the store cannot be read, has no images, or has a name that is no valid file name.
        StorageError: the cache cannot be written, or the address cannot be used.
    """
    asked = time.time()
    store = DataStore(uri)
    with locked_cache(uri) as entry:
        folder, synced = entry / "files", entry / ".compared"
        if not (synced.is_file() and synced.stat().st_mtime > asked):  # else another process synced while we waited
            _copy_changed(store, _list_images(store), folder)
            synced.touch()
    return folder


def require_images(uri: str) -> str:
    """Check that an address has folders, without copying anything; return a description of what was found."""
    store = DataStore(uri)
    folders = [name for name, stamp in store.list().items() if stamp is None and not is_ignored(name)]
    if not folders:
        raise DataError(_no_images(store))
    return f"{len(folders)} folders are in {store.place}"


def _no_images(store: DataStore) -> str:
    return (
        f"there are no images in data.root={store.place}: they are looked for in <class>/ or train/<class>/ there; "
        "put them there, or name the place that holds your class folders"
    )


def _list_images(store: DataStore) -> dict[str, Stamp]:
    """List the files that have the name of an image."""
    found = {}
    for name, stamp in store.list(recursive=True).items():
        parts = name.split("/")
        # Ignoring what begins with a dot also ignores names that lead out of the folder through "..".
        if stamp is None or not has_image_suffix(name) or any(map(is_ignored, parts)):
            continue
        if "" in parts or "\0" in name:
            raise DataError(f"{name!r} in {store.place} is not a valid file name on this machine: rename it there")
        found[name] = stamp
    if not found:
        raise DataError(_no_images(store))
    return found


def _copy_changed(store: DataStore, wanted: dict[str, Stamp], folder: Path) -> None:
    """Make `folder` hold the wanted files and no others. The caller holds the lock."""
    missing = dict(wanted)
    for place, _, names in os.walk(folder, topdown=False):
        for path in (os.path.join(place, name) for name in names):
            name, status = os.path.relpath(path, folder), os.stat(path)
            if name not in wanted:  # or left by a process that was killed
                os.unlink(path)
            elif wanted[name] == (status.st_size, status.st_mtime_ns):
                del missing[name]
        with suppress(OSError):
            os.rmdir(place)  # only if it is empty: a class without images would be an error
    for parent in {os.path.dirname(name) for name in missing}:
        (folder / parent).mkdir(parents=True, exist_ok=True)
    if not missing:
        return

    def copy(numbered: tuple[int, str]) -> int:
        number, name = numbered
        size, modified = wanted[name]
        partial = folder / f".{number}.partial"
        store.copy(name, partial)
        os.utime(partial, ns=(modified, modified))
        partial.replace(folder / name)
        return size

    total = sum(size for size, _ in missing.values())
    with progress_bar(f"downloading {len(missing)} images") as advance:
        for size in map_ahead(copy, enumerate(missing), _QUEUED, _THREADS):
            advance(size, total)

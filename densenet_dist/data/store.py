"""Data sets on an object store: what is there, its bytes, and what is put there; and where a node keeps its copies.

A node has a folder for each address in ``data`` in `cache_folder`, with a lock in it, and keeps it from run to run.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from filelock import FileLock

from densenet_dist.cache_folder import CACHE_ENV, cache_folder
from densenet_dist.errors import DataError, StorageError
from densenet_dist.object_store import explain, open_filesystem

if TYPE_CHECKING:
    from pyarrow import fs

Stamp: TypeAlias = tuple[int, int]
"""Size in bytes and time of change in nanoseconds since 1970."""

_CHUNK = 16 << 20  # each is a request of its own


class DataStore:
    """The folder at an address.

    Args:
        uri: any that pyarrow knows; with its query.

    Attributes:
        uri: as given, for commands that people repeat.
        place: without the query, for people to read.

    Raises:
        ConfigError, StorageError: the address cannot be used, see `open_filesystem`.
    """

    def __init__(self, uri: str) -> None:
        self.uri, self.place = uri, uri.partition("?")[0].rstrip("/")
        self._files: fs.FileSystem
        self._files, self._prefix = open_filesystem(uri)

    def entries(self, folder: str = "") -> dict[str, int | None]:
        """What lies directly in a folder of it: the size in bytes of each file by name, and None for each folder.

        Raises:
            DataError: that cannot be told, or there is no such bucket.
        """
        return {info.base_name: info.size for info in self._list(folder, recursive=False)}

    def listing(self) -> dict[str, Stamp]:
        """Every file in it and below, by its name relative to it.

        Raises:
            DataError: that cannot be told, or there is no such bucket.
        """
        infos = self._list("", recursive=True)
        start = len(self._prefix) + 1
        return {info.path[start:]: (info.size, info.mtime_ns) for info in infos if info.size is not None}

    def copy(self, name: str, target: Path, advance: Callable[[int], object] = lambda size: None) -> None:
        """Copy a file to the local file `target`, through to the disk.

        Args:
            advance: called with the size of every piece that has come.

        Raises:
            DataError: it cannot be read.
            OSError: `target` cannot be written.
        """
        with open(target, "wb") as file:
            for chunk in self._chunks(name):
                file.write(chunk)
                advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())

    def put(self, source: Path, name: str) -> None:
        """Copy a local file there, whole or not at all.

        Raises:
            StorageError: it cannot be written.
        """
        data = source.read_bytes()  # before: a stream whose source fails would be closed, and so complete
        path, local = self._path(name), self._files.type_name == "local"
        beside = f"{path}.{os.getpid()}.partial" if local else path  # an object appears when it is complete
        try:
            if local:
                self._files.create_dir(path.rpartition("/")[0], recursive=True)
            with self._files.open_output_stream(beside, compression=None) as stream:
                stream.write(data)
            if local:
                self._files.move(beside, path)
        except OSError as error:
            raise StorageError(f"cannot write {name} to {self.place}: {explain(error)}") from error

    def _list(self, folder: str, *, recursive: bool) -> list[fs.FileInfo]:
        from pyarrow import fs

        selector = fs.FileSelector(self._path(folder).rstrip("/"), recursive=recursive)
        with self._reading():
            try:
                return list(self._files.get_file_info(selector))
            except FileNotFoundError:  # another error than that of a bucket that does not exist
                return []

    def _chunks(self, name: str) -> Iterator[bytes]:
        source = self._path(name)
        # Otherwise a name that ends in .gz is unpacked on the way.
        with self._reading(f"{name} in "), self._files.open_input_stream(source, compression=None) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    @contextmanager
    def _reading(self, what: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"cannot read {what}data.root={self.place}: {explain(error)}") from error


def cache_of(uri: str) -> Path:
    """The folder on this node for what lies at an address; it need not exist.

    Raises:
        StorageError: there is no place for a cache.
    """
    folder = cache_folder()
    address = uri.partition("?")[0].rstrip("/")
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", address.partition("://")[2]).strip("-.")[-60:]
    digest = hashlib.blake2b(f"{address}?{uri.partition('?')[2]}".encode(), digest_size=8).hexdigest()
    return folder / "data" / f"{readable}-{digest}"


@contextmanager
def locked_cache(uri: str) -> Iterator[Path]:
    """The folder for what lies at an address, made if need be, held by one process of the node at a time.

    Raises:
        StorageError: it, or something in it, cannot be written.
    """
    entry = cache_of(uri)
    try:
        entry.mkdir(parents=True, exist_ok=True)
        lock = entry / ".lock"
        lock.touch()  # where no file can be made FileLock may wait for ever: fail here
        with FileLock(lock):
            yield entry
    except OSError as error:
        raise StorageError(
            f"cannot keep the data set in {entry}: {error}; make room there, or name a folder on another disk: "
            f"{CACHE_ENV}=FOLDER"
        ) from error

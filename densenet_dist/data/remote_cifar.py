"""A CIFAR set on an object store: put there once from its origin, taken from there once a node.

What is on the store is the official archive or the extracted folder, as in a local root. A node keeps the extracted
folder in its cache; every file is checked against the SHA-256 of the official one, there as everywhere.
"""

import shutil
from contextlib import suppress
from pathlib import Path

from densenet_dist.data import archive, cifar
from densenet_dist.data.cifar import Arrays, CifarSpec
from densenet_dist.data.progress import progress_bar
from densenet_dist.data.store import DataStore, cache_of, locked_cache
from densenet_dist.errors import DataError

Contents = tuple[tuple[str, ...], Arrays, Arrays]
"""Class names, training and test records, as `cifar.read_folder` gives them."""


def read(spec: CifarSpec, uri: str, *, progress: bool) -> tuple[Path, Contents]:
    """The node's folder with the data set, and what is in it; taken from the store first if need be.

    The store is asked for nothing where the cache has it. What became damaged in the cache is taken anew.

    Raises:
        DataError: it is not on the store, is damaged there, or the store cannot be read.
        StorageError: the cache cannot be written, or the address cannot be used.
    """
    folder = cache_of(uri) / spec.folder
    found = _sound(spec, folder)
    if found is None:
        with locked_cache(uri):
            found = _sound(spec, folder)  # by whoever had it before us
            if found is None:
                shutil.rmtree(folder, ignore_errors=True)
                _take(spec, DataStore(uri), folder, progress)
    return folder, found or cifar.read_folder(spec, folder)


def publish(spec: CifarSpec, uri: str, *, download: bool, url: str | None, progress: bool) -> str:
    """Makes sure that the data set is on the store: brought there from its origin by way of the cache if need be.

    Returns:
        What is there, or has been put there, for people to read.

    Raises:
        ConfigError: `url` is no address that can be fetched.
        DataError: it is not there and may not be downloaded, or the download failed, or the store cannot be read.
        StorageError: the store or the cache cannot be written.
    """
    store = DataStore(uri)
    names = find(spec, store)
    if names:
        return f"{_told(names)} is in {store.place}"
    if not download:
        raise DataError(_not_there(spec, store))
    with locked_cache(uri) as entry:
        folder, packed = entry / spec.folder, entry / spec.archive
        if _sound(spec, folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            mend = f"put {spec.archive} from {spec.url} into {store.place}"
            archive.make(spec, entry, url=url, mend=mend, progress=progress)
        members = {f"{spec.folder}/{name}": folder / name for name in spec.members}
        files = {spec.archive: packed} if packed.is_file() else members
        with progress_bar(f"uploading {spec.title}", progress) as advance:
            total = sum(path.stat().st_size for path in files.values())
            for name, path in files.items():
                store.put(path, name)
                advance(path.stat().st_size, total)
        packed.unlink(missing_ok=True)
    return f"{_told(files)} has been put into {store.place}"


def find(spec: CifarSpec, store: DataStore) -> dict[str, int]:
    """The files on the store that make up the data set, with their sizes in bytes; none where it is not whole.

    Raises:
        DataError: the store cannot be read.
    """
    there = store.entries()
    if (size := there.get(spec.archive)) is not None:
        return {spec.archive: size}
    found = {"": there, f"{spec.folder}/": store.entries(spec.folder) if spec.folder in there else {}}
    for prefix, entries in found.items():
        sizes = {f"{prefix}{name}": size for name in spec.members if (size := entries.get(name)) is not None}
        if len(sizes) == len(spec.members):
            return sizes
    return {}


def _take(spec: CifarSpec, store: DataStore, folder: Path, progress: bool) -> None:
    """Makes `folder` of what is on the store. The caller holds the cache."""
    names = find(spec, store)
    if not names:
        raise DataError(_not_there(spec, store))
    mend = (
        f"delete it there and run `densenet-dist data prepare {spec.name} --root '{store.uri}'`, "
        "or name a place with a sound copy: data.root=..."
    )
    total = sum(names.values())
    if total > archive.MAX_ARCHIVE_BYTES:
        raise DataError(f"{_told(names)} in {store.place} has {total} bytes, so it is something else; {mend}")
    with progress_bar(f"downloading {spec.title}", progress) as advance:
        if spec.archive not in names:
            with archive.appearing(folder) as aside:
                for name in names:
                    target = aside / name.rpartition("/")[2]
                    store.copy(name, target, lambda size: advance(size, total))
                    cifar.read_member(spec, target, source=f"{name} in {store.place}", mend=mend)
            return
        partial = folder.with_name(f".{spec.archive}.partial")
        try:
            store.copy(spec.archive, partial, lambda size: advance(size, total))
            source = f"{spec.archive} in {store.place}"
            archive.extract(spec, partial, folder.parent, source=source, mend=mend)
        finally:
            partial.unlink(missing_ok=True)


def _sound(spec: CifarSpec, folder: Path) -> Contents | None:
    """What is in an extracted folder; None where it is missing, or not what it should be."""
    with suppress(DataError):
        if folder.is_dir():
            return cifar.read_folder(spec, folder)
    return None


def _told(names: dict[str, int] | dict[str, Path]) -> str:
    """What some files on the store are, in a word."""
    first = next(iter(names))
    return first if len(names) == 1 else first.rpartition("/")[0] or f"the set in {len(names)} files"


def _not_there(spec: CifarSpec, store: DataStore) -> str:
    return (
        f"{spec.title} is not in data.root={store.place}: there is neither {spec.archive} nor all of {spec.folder}; "
        f"put it there, once for all nodes: densenet-dist data prepare {spec.name} --root '{store.uri}'"
    )

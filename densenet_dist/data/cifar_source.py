"""Obtain the files of a CIFAR data set: from a local folder, the official archive, a download, or an object store.

Only regular files with the names, sizes and SHA-256 of the official ones are extracted, whatever else an archive
holds. They are written to a temporary folder, which is renamed when all of them are complete and correct. A lock lets
one process do so while others wait; a complete folder is used without the lock.
"""

import gzip
import os
import shlex
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from densenet_dist.data import cifar
from densenet_dist.data.background import progress_bar
from densenet_dist.data.cifar import CifarSpec, Contents
from densenet_dist.data.download import fetch
from densenet_dist.data.store import DataStore, cache_of, locked_cache, locked_folder
from densenet_dist.errors import DataError
from densenet_dist.object_store import is_uri
from densenet_dist.run_folder import sync

_MAX_ARCHIVE_BYTES = 256 << 20  # the official ones have 170 MB
_MAX_EXTRACTED_BYTES = 256 << 20  # and contain 184 MB


def load(spec: CifarSpec, root: str | Path, *, download: bool, url: str | None) -> tuple[Path, Contents]:
    """Return the local folder with the files of a data set, and what they contain; obtain them first if missing.

    Args:
        root: a folder, in which `root/<folder>`, the files themselves and `root/<archive>` are looked for, in this
            order; else the archive is downloaded to it. Or the URI of an object store, whose archive is copied to this
            node's cache and extracted once; a damaged copy is replaced, and `download` and `url` are ignored.
        download: whether a missing archive may be downloaded.
        url: where from, instead of the official address.

    Raises:
        ConfigError: `url` cannot be used.
        DataError: the data set is missing, damaged or unsafe to extract, or the download failed.
        StorageError: `root`, or this node's cache, cannot be written.
    """
    if not is_uri(str(root)):
        folder = _find_or_make(spec, Path(root), download=download, url=url)
        return folder, cifar.read_folder(spec, folder)
    uri = str(root)
    folder = cache_of(uri) / spec.folder
    if contents := _read_cached(spec, folder):
        return folder, contents
    with locked_cache(uri):
        contents = _read_cached(spec, folder)  # another process may have copied it while we waited
        if contents is None:
            shutil.rmtree(folder, ignore_errors=True)
            _copy_from_store(spec, DataStore(uri), folder.parent)
    return folder, contents or cifar.read_folder(spec, folder)


def _read_cached(spec: CifarSpec, folder: Path) -> Contents | None:
    """Return the contents of an extracted folder; None if it is missing or damaged."""
    with suppress(DataError):
        if os.path.isdir(folder):
            return cifar.read_folder(spec, folder)
    return None


def _find_or_make(spec: CifarSpec, root: Path, *, download: bool, url: str | None) -> Path:
    if folder := _find_folder(spec, root):
        return folder
    if not download and not os.path.isfile(root / spec.archive):
        there = f"there is neither {root / spec.folder} nor {root / spec.archive}, nor {spec.test} in {root}"
        missing = f"{spec.title} is not in {root}: {there if os.path.exists(root) else f'{root} does not exist'}"
        raise DataError(f"{missing}; {_ways_to_get(spec, root)}")
    with locked_folder(root, f".{spec.name}.lock", "choose a folder that can be written: data.root=..."):
        # Another process may have made the folder while we waited.
        folder = _find_folder(spec, root)
        return folder or _make_folder(spec, root, url=url, remedy=_ways_to_get(spec, root))


def _find_folder(spec: CifarSpec, root: Path) -> Path | None:
    """Return the folder with the extracted data set, or None."""
    if os.path.isdir(root / spec.folder):
        return root / spec.folder
    if sum(os.path.isfile(root / name) for name in spec.members) > 1:  # one alone may be another's train.bin
        return root
    return None


def _ways_to_get(spec: CifarSpec, root: Path) -> str:
    """Return how to get the data set, as the end of an error message."""
    folder, archive = (name.replace("-binary", "-python") for name in (spec.folder, spec.archive))
    pickled = [name for name in (folder.replace("-bin", "-py"), archive) if os.path.exists(root / name)]
    hint = f"{pickled[0]} is the pickled version, which is never read; " if pickled else ""
    return (
        f"{hint}run `densenet-dist data prepare {spec.name} --root {shlex.quote(str(root))}`, "
        f"put {spec.archive} from {spec.url} into {root}, or name a folder that has it: data.root=..."
    )


def _make_folder(spec: CifarSpec, root: Path, *, url: str | None, remedy: str) -> Path:
    """Extract the archive in `root`, which is downloaded first if missing. The caller holds the lock."""
    archive = root / spec.archive
    if os.path.isfile(archive):
        if not os.access(archive, os.R_OK):
            raise DataError(f"cannot read {archive}: Permission denied; give access to it")
        return _extract(spec, archive, root, source=str(archive), remedy=cifar.how_to_replace(spec, archive))
    url = url or spec.url
    with _partial(archive) as partial:
        fetch(url, partial, title=spec.title, limit=_MAX_ARCHIVE_BYTES, remedy=remedy)
        folder = _extract(spec, partial, root, source=url.partition("?")[0], remedy=remedy)
        partial.replace(archive)  # only now: the next run must not find a damaged download
    return folder


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """Yield the name for an incomplete file, and delete the file at the end if it is still there."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _extract(spec: CifarSpec, archive: Path, root: Path, *, source: str, remedy: str) -> Path:
    """Extract the official files of an archive into `root/<folder>`, all or none. The caller holds the lock.

    Args:
        source: what messages call the archive.
        remedy: what to do if it is damaged, for messages.

    Raises:
        DataError: it is damaged, unsafe, or another archive.
        OSError: `root` cannot be written.
    """
    with _new_folder(root / spec.folder) as partial:
        try:
            with _BoundedGzip(archive) as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
                for member in tar:
                    if member.issparse():  # may declare any size without holding it
                        raise tarfile.ReadError(f"{member.name!r} is a sparse file")
                    tarfile.data_filter(member, str(partial))  # also refuses unsafe members that are not needed
                    folder, _, name = member.name.partition("/")
                    if folder == spec.folder and name in spec.members and member.isreg():
                        official = member.replace(name=name, mtime=0, mode=0o644, deep=False)
                        tar.extract(official, partial, filter="data")
        except tarfile.FilterError as error:
            raise DataError(
                f"{source} is not safe to extract: {error}; nothing was extracted. "
                "Delete the archive and get it from a source you trust"
            ) from error
        except (tarfile.TarError, gzip.BadGzipFile, EOFError, RecursionError, ValueError, zlib.error) as error:
            raise DataError(f"{source} is damaged or truncated ({error}); {remedy}") from error
        missing = [name for name in spec.members if not (partial / name).exists()]
        if missing:
            raise DataError(f"{source} is not the {spec.title} archive: it lacks {', '.join(missing)}; {remedy}")
        for name in spec.members:
            cifar.read_member(spec, partial / name, source=f"{name} in {source}", remedy=remedy)
    return root / spec.folder


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `folder` when the block ends without an error."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _BoundedGzip(gzip.GzipFile):
    """Fails at the end of the data, and past a limit: a small archive may unpack to any size, or declare any.

    `tarfile` does not notice the end while it skips a member, but reads nothing after the end of a sound archive.
    """

    _left = _MAX_EXTRACTED_BYTES

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if not data:
            raise EOFError("it ends within a member")
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.ReadError(f"it unpacks to more than {_MAX_EXTRACTED_BYTES} bytes")
        return data


def publish(spec: CifarSpec, uri: str, *, download: bool, url: str | None) -> str:
    """Make sure that the archive is on an object store; otherwise download it to this node's cache, and upload it.

    Returns:
        A description of what is on the store.

    Raises:
        ConfigError, DataError, StorageError: as for `load`; or the store cannot be read or written.
    """
    store = DataStore(uri)
    if spec.archive in store.list():
        return f"{spec.archive} is in {store.place}"
    if not download:
        raise DataError(_not_on_store(spec, store))
    with locked_cache(uri) as entry:
        archive = entry / spec.archive
        if not archive.is_file():  # else an earlier upload failed
            shutil.rmtree(entry / spec.folder, ignore_errors=True)
            _make_folder(spec, entry, url=url, remedy=f"put {spec.archive} from {spec.url} into {store.place}")
        with progress_bar(f"uploading {spec.title}") as advance:
            store.put(archive, spec.archive)
            advance(size := archive.stat().st_size, size)
        archive.unlink()
    return f"{spec.archive} has been put into {store.place}"


def _copy_from_store(spec: CifarSpec, store: DataStore, cache: Path) -> None:
    """Copy the archive from the store and extract it to `cache`. The caller holds the lock."""
    stamp = store.list().get(spec.archive)
    if stamp is None:
        raise DataError(_not_on_store(spec, store))
    source, size = f"{spec.archive} in {store.place}", stamp[0]
    remedy = (
        f"delete it there and run `densenet-dist data prepare {spec.name} --root {shlex.quote(store.uri)}`, "
        "or name a place with an intact copy: data.root=..."
    )
    if size > _MAX_ARCHIVE_BYTES:
        raise DataError(f"{source} has {size} bytes, too many for this archive; {remedy}")
    with _partial(cache / spec.archive) as archive:
        with progress_bar(f"downloading {spec.title}") as advance:
            store.copy(spec.archive, archive, lambda received: advance(received, size))
        _extract(spec, archive, cache, source=source, remedy=remedy)


def _not_on_store(spec: CifarSpec, store: DataStore) -> str:
    return (
        f"{spec.title} is not in data.root={store.place}: there is no {spec.archive}; "
        f"put it there, once for all nodes: densenet-dist data prepare {spec.name} --root {shlex.quote(store.uri)}"
    )

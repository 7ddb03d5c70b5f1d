"""Obtain the files of a CIFAR data set: from a local folder, the official archive, a download, or an object store.

They are written to a temporary folder, which is renamed when all of them are complete and correct. A lock lets one
process do so while others wait; a complete folder is used without the lock.
"""

import os
import random
import shlex
import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, InvalidURL
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from densenet_dist.credentials import without_credentials
from densenet_dist.data import cifar
from densenet_dist.data.background import Advance, progress_bar
from densenet_dist.data.cifar import CifarSpec, Contents
from densenet_dist.data.store import DataStore, cache_of, locked_cache, locked_folder
from densenet_dist.errors import ConfigError, DataError
from densenet_dist.object_store import is_uri
from densenet_dist.run_folder import sync

_MAX_ARCHIVE_BYTES = 256 << 20  # the official ones have 170 MB
_TIMEOUT_S = 30.0  # without any data, not for the whole transfer
_CHUNK = 1 << 18
_ATTEMPTS = 6
_FIRST_WAIT_S = 1.0  # doubled after each attempt
_RETRIED_4XX = (408, 425, 429)
_FINAL = (ValueError, InvalidURL, socket.gaierror, ssl.SSLCertVerificationError)
"""Not retried: a file that is too large, an invalid address, an unknown host, a certificate of another host."""
_FAILURES = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError, ValueError)


def load(spec: CifarSpec, root: str | Path, *, download: bool, url: str | None) -> tuple[Path, Contents]:
    """Return the local folder with the files of a data set, and what they contain; obtain them first if missing.

    In a local folder, `root/<folder>`, the files themselves and `root/<archive>` are looked for, in this order. The
    archive on an object store is copied to this node's cache and extracted once; a damaged copy is replaced.
    Arguments and errors are those of `datasets.load_dataset`.
    """
    if not is_uri(str(root)):
        folder = _find_or_make(spec, Path(root), download=download, url=url)
        return folder, cifar.read_folder(spec, folder)
    uri = str(root)
    folder = cache_of(uri) / spec.folder
    with suppress(DataError):
        return folder, cifar.read_folder(spec, folder)
    with locked_cache(uri):
        with suppress(DataError):  # another process may have copied it while we waited
            return folder, cifar.read_folder(spec, folder)
        shutil.rmtree(folder, ignore_errors=True)
        _copy_from_store(spec, DataStore(uri), folder)
    return folder, cifar.read_folder(spec, folder)


def _find_or_make(spec: CifarSpec, root: Path, *, download: bool, url: str | None) -> Path:
    if folder := _find_folder(spec, root):
        return folder
    if not download and not os.path.isfile(root / spec.archive):
        there = f"there is neither {root / spec.folder} nor {root / spec.archive}, nor {spec.test} in {root}"
        missing = f"{spec.title} is not in {root}: {there if os.path.exists(root) else f'{root} does not exist'}"
        raise DataError(f"{missing}; {_ways_to_get(spec, root)}")
    with locked_folder(root, f".{spec.name}.lock", "choose a folder that can be written: data.root=..."):
        folder = _find_folder(spec, root)  # another process may have made it while we waited
        return folder or _make_folder(spec, root, url=url, remedy=_ways_to_get(spec, root))


def _find_folder(spec: CifarSpec, root: Path) -> Path | None:
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
    archive, folder = root / spec.archive, root / spec.folder
    with _new_folder(folder) as partial:
        if os.path.isfile(archive):
            if not os.access(archive, os.R_OK):
                raise DataError(f"cannot read {archive}: Permission denied; give access to it")
            remedy = cifar.how_to_replace(spec, archive)
            cifar.extract(spec, archive, partial, source=str(archive), remedy=remedy)
        else:
            url = url or spec.url
            downloaded = partial / spec.archive
            fetch(url, downloaded, title=spec.title, limit=_MAX_ARCHIVE_BYTES, remedy=remedy)
            cifar.extract(spec, downloaded, partial, source=url.partition("?")[0], remedy=remedy)
            downloaded.replace(archive)  # only now: the next run must not find a damaged download
    return folder


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


def publish(spec: CifarSpec, uri: str, *, download: bool, url: str | None) -> str:
    """Upload the archive to an object store unless it is there, see `datasets.publish_dataset`."""
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


def _copy_from_store(spec: CifarSpec, store: DataStore, folder: Path) -> None:
    """Copy the archive from the store, and extract it to `folder`. The caller holds the lock."""
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
    with _new_folder(folder) as partial:
        archive = partial / spec.archive
        with progress_bar(f"downloading {spec.title}") as advance:
            store.copy(spec.archive, archive, lambda received: advance(received, size))
        cifar.extract(spec, archive, partial, source=source, remedy=remedy)
        archive.unlink()


def _not_on_store(spec: CifarSpec, store: DataStore) -> str:
    return (
        f"{spec.title} is not in data.root={store.place}: there is no {spec.archive}; "
        f"put it there, once for all nodes: densenet-dist data prepare {spec.name} --root {shlex.quote(store.uri)}"
    )


def fetch(url: str, target: Path, *, title: str, limit: int, remedy: str) -> None:
    """Download `url` to the file `target`, with a progress bar; retry after growing random waits.

    A refusal (status 4xx) is final, and so are failures of other addresses than http:// and https://.

    Args:
        title: what is downloaded, for messages and the progress bar.
        limit: the maximum size in bytes.
        remedy: what else the user can do, for messages.

    Raises:
        ConfigError: the address contains credentials, which logs would show.
        DataError: the download failed, or the file is larger than `limit`.
        OSError: `target` cannot be written.
    """
    address = url.partition("?")[0]  # the query may contain a signature, which must not appear in logs
    if without_credentials(address) != address:
        raise ConfigError("data.url: holds credentials, which logs would show; remove them")
    failed = f"cannot download {title} from {address}"
    attempts = _ATTEMPTS if url.lower().startswith("http") else 1
    for attempt in range(1, attempts + 1):
        try:
            with progress_bar(f"downloading {title}") as advance:
                _transfer(url, target, limit, advance)
            return
        except _FAILURES as error:
            reason = error.reason if isinstance(error, URLError) else error
            final = isinstance(reason, _FINAL) and getattr(reason, "errno", None) != socket.EAI_AGAIN
            if isinstance(error, HTTPError):
                error.close()  # it holds the connection
                final = 400 <= error.code < 500 and error.code not in _RETRIED_4XX
            if final or attempt == attempts:
                raise DataError(f"{failed} (attempt {attempt} of {attempts}): {error}; {remedy}") from error
        # Not the seeded generator of the training: all nodes would retry at the same moment.
        time.sleep(random.SystemRandom().uniform(0.5, 1) * _FIRST_WAIT_S * 2 ** (attempt - 1))


def _transfer(url: str, target: Path, limit: int, advance: Advance) -> None:
    # Of any scheme: the files must have the official SHA-256.
    request = Request(url, headers={"User-Agent": "densenet-dist"})  # noqa: S310
    with urlopen(request, timeout=_TIMEOUT_S) as response, open(target, "wb") as file:  # noqa: S310
        length = response.headers["Content-Length"]
        total = int(length) if length else None
        received = 0
        while chunk := response.read(_CHUNK):
            received += len(chunk)
            if received > limit:
                raise ValueError(f"it has more than {limit} bytes, too many for the expected file")
            file.write(chunk)
            advance(len(chunk), total)
        if total is not None and received != total:
            raise ConnectionError(f"the transfer broke off after {received} of {total} bytes")

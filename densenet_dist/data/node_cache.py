"""Where a node keeps what it has taken from object stores: a folder for each address, and a lock for each folder.

All of it is in ``data`` in `cache_folder`, and kept from run to run.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from densenet_dist.cache_folder import CACHE_ENV, cache_folder
from densenet_dist.errors import StorageError


def entry_of(uri: str) -> Path:
    """The folder for what lies at an address; it need not exist.

    Raises:
        StorageError: there is no place for a cache.
    """
    folder = cache_folder()
    address = uri.partition("?")[0].rstrip("/")
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", address.partition("://")[2]).strip("-.")[-60:]
    digest = hashlib.blake2b(f"{address}?{uri.partition('?')[2]}".encode(), digest_size=8).hexdigest()
    return folder / "data" / f"{readable}-{digest}"


@contextmanager
def held(uri: str) -> Iterator[Path]:
    """The folder for what lies at an address, made if need be; one process of the node has it at a time.

    Raises:
        StorageError: it, or something in it, cannot be written.
    """
    entry = entry_of(uri)
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

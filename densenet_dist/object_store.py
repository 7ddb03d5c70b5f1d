"""Addresses of object stores, for `storage` and `data.root`.

An address is a URI that pyarrow knows: ``s3://bucket/path?endpoint_override=HOST:PORT&scheme=http&region=...``,
``gs://...``, ``abfs://...``, ``file:///...``. Credentials come from the environment only.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from densenet_dist.credentials import held_credentials
from densenet_dist.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from pyarrow import fs

_JUST_MADE_S: Final = 60.0
"""A folder younger than this may not be locked yet: its lock file is created before it is locked."""
_HINTS: Final = {
    "NO_SUCH_BUCKET": "there is no such bucket: create it, or use another",
    "NETWORK_CONNECTION": "it cannot be reached from this machine: check endpoint_override and scheme in the address, "
    "and the network",
    "ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|EXPIRED_TOKEN": "the "
    "credentials do not allow this: they come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "AWS_PROFILE, or the machine's role)",
}


def is_uri(place: str) -> bool:
    """Return whether a place is an address such as ``s3://bucket/path`` rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def open_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """Open the file system of an address; return it and the path on it, without a trailing slash.

    Raises:
        ConfigError: it contains credentials, which configurations, logs and error messages would show.
        StorageError: it cannot be opened.
    """
    import pyarrow
    from pyarrow import fs

    for problem in held_credentials("an address", uri):
        raise ConfigError(problem)
    try:
        filesystem, prefix = fs.FileSystem.from_uri(uri)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise StorageError(f"the storage {uri} cannot be opened: {error}") from error
    return filesystem, prefix.rstrip("/")


def fetch_file(uri: str) -> Path:
    """Copy a file from an object store to a local one, which is deleted when this process ends.

    Raises the errors of `open_filesystem`, and StorageError if the file cannot be read.
    """
    from pyarrow import fs

    filesystem, place = open_filesystem(uri)
    local = temporary_folder() / PurePosixPath(place).name
    try:
        fs.copy_files(place, str(local), filesystem, fs.LocalFileSystem())
    except OSError as error:
        raise StorageError(f"{uri.partition('?')[0]} cannot be read: {explain_storage_error(error)}") from error
    return local


_temporary: Final[dict[Path, int]] = {}
"""The folder of this process, if there is one, with the descriptor of its lock."""
_creation_lock: Final = threading.Lock()
_LOCK: Final = ".lock"
_PREFIX: Final = "densenet_dist-files-"


def temporary_folder() -> Path:
    """Make an empty folder that is deleted when this process ends.

    If the process is killed, the next process on this machine that makes such a folder deletes it, since nobody holds
    its lock.
    """
    with _creation_lock:
        if not _temporary:
            _delete_left_behind()
            atexit.register(delete_temporary_folders)
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
            fcntl.flock(lock, fcntl.LOCK_EX)
            _temporary[folder] = lock
        return Path(tempfile.mkdtemp(dir=next(iter(_temporary))))


def is_downloaded(folder: Path) -> bool:
    """Return whether a folder is one of `temporary_folder`."""
    return any(each in folder.parents for each in _temporary)


def delete_temporary_folders() -> None:
    """Delete the temporary folders of this process now, for processes that will be killed without running atexit."""
    for folder in list(_temporary):
        shutil.rmtree(folder, ignore_errors=True)
        os.close(_temporary.pop(folder))


def _delete_left_behind() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        # Fails for folders of other users, of living processes, and those that another process has just deleted.
        with suppress(OSError), open(folder / _LOCK, "r+") as lock:
            if time.time() - os.fstat(lock.fileno()).st_mtime > _JUST_MADE_S:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


def explain_storage_error(error: OSError) -> str:
    """Describe an object store's error in one line, with a hint if one is known."""
    text = " ".join((error.strerror or str(error)).split())
    text = re.sub(r" ?\(Request ID: [^)]*\)", "", text)
    for names, hint in _HINTS.items():
        if re.search(rf"AWS Error (?:{names})\b", text):
            return f"{text}; {hint}"
    return text

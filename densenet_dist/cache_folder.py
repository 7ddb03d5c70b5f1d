"""Where this machine keeps what it would otherwise make, check or fetch again."""

import os
from pathlib import Path

from densenet_dist.errors import StorageError

CACHE_ENV = "DENSENET_DIST_CACHE"


def cache_folder() -> Path:
    """``$DENSENET_DIST_CACHE``, else ``densenet_dist`` under ``$XDG_CACHE_HOME`` or ``~/.cache``; it need not exist.

    What lies there may be deleted whenever nothing runs.

    Raises:
        StorageError: there is no such place: this user has no home folder.
    """
    own, base = os.environ.get(CACHE_ENV), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(own).expanduser() if own else Path(base or Path.home() / ".cache") / "densenet_dist"
    except RuntimeError as error:
        raise StorageError(f"there is no folder for a cache: {error}; name one: {CACHE_ENV}=FOLDER") from error
    return folder.absolute()

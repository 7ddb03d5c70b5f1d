"""The cache of this machine: compiled kernels, verified and downloaded data."""

import getpass
import os
import tempfile
from contextlib import suppress
from pathlib import Path

CACHE_ENV = "DENSENET_DIST_CACHE"


def cache_folder() -> Path:
    """Return ``$DENSENET_DIST_CACHE``, else ``densenet_dist`` under ``$XDG_CACHE_HOME`` or ``~/.cache``.

    It is created with permissions for this user only, if possible. It may be deleted when nothing runs.
    """
    own, base = os.environ.get(CACHE_ENV), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own).expanduser() if own else Path(base or Path.home() / ".cache") / "densenet_dist"
    with suppress(OSError):  # a later write reports the error
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder.absolute()


def provide_user() -> None:
    """Give this process and its children a user name and a home folder if the system has none.

    Containers may run under an unknown user id (OpenShift), without a home folder or with ``/``, where PyTorch, Triton
    and Ray fail.
    """
    user_id = os.getuid()
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        os.environ["USER"] = f"uid-{user_id}"
    home = os.path.expanduser("~")
    if (home == "/" or not os.path.isdir(home)) and not os.access(home, os.W_OK):
        made = Path(tempfile.gettempdir(), f"densenet_dist-home-{user_id}")
        with suppress(FileExistsError):
            made.mkdir(mode=0o700)
        # A folder of another user must not be trusted.
        os.environ["HOME"] = str(made) if made.lstat().st_uid == user_id else tempfile.mkdtemp(prefix=made.name)

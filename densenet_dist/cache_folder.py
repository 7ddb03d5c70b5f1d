"""Where this machine keeps what it would otherwise make, check or fetch again."""

import getpass
import os
import tempfile
from contextlib import suppress
from pathlib import Path

CACHE_ENV = "DENSENET_DIST_CACHE"


def cache_folder() -> Path:
    """Return ``$DENSENET_DIST_CACHE``, else ``densenet_dist`` under ``$XDG_CACHE_HOME`` or ``~/.cache``.

    A missing one is made, for this user alone, if possible. What lies there may be deleted whenever nothing runs.
    """
    own, base = os.environ.get(CACHE_ENV), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own).expanduser() if own else Path(base or Path.home() / ".cache") / "densenet_dist"
    with suppress(OSError):  # whoever writes there will say so
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder.absolute()


def provide_user() -> None:
    """Give this process and its children a user name and a home folder where the system has none.

    Containers may run under a user id that nobody knows (OpenShift), with no home folder or with ``/``. PyTorch, Triton
    and Ray fail there.
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
        # What another user has put there must not be trusted.
        os.environ["HOME"] = str(made) if made.lstat().st_uid == user_id else tempfile.mkdtemp(prefix=made.name)

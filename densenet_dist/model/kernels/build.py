"""Builds ``native.cpp`` once a machine and user, and loads it.

PyTorch's own extension loader is not used: it compiles PyTorch's headers along, and a build that is killed leaves a
lock on which every later one waits for ever.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

from densenet_dist.cache_folder import CACHE_ENV, cache_folder
from densenet_dist.errors import StorageError

SOURCE: Final = Path(__file__).with_name("native.cpp")
FLAGS: Final = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
COMPILERS: Final = ("c++", "g++", "clang++")
TIMEOUT_S: Final = 300


class BuildError(Exception):
    """The library cannot be built or loaded here; the message says why, on one line."""


@cache
def native_library() -> ctypes.CDLL:
    """The library for this processor, from the cache or compiled anew.

    It is kept in `cache_folder`, named by what it was made of and for; one that cannot be loaded is made anew. The
    compiler is the one named by ``CXX``, or the first of `COMPILERS` in the path; it gets `FLAGS`, then ``CXXFLAGS``.

    Raises:
        BuildError: there is no compiler, it fails, or other users can write to the folder.
    """
    command = compiler()
    try:
        library = cache_folder() / f"native-{_fingerprint(command)}.so"
        if not _is_own(library.parent):
            raise BuildError(f"other users can write to {library.parent}: chmod go-w it, or set {CACHE_ENV}")
        if library.exists() and _is_own(library):
            with suppress(OSError):  # damaged, or made for another C library
                return ctypes.CDLL(str(library))
        _compile(command, library)
        return ctypes.CDLL(str(library))
    except StorageError as error:
        raise BuildError(str(error)) from error
    except OSError as error:
        raise BuildError(f"{library} cannot be written or loaded: {error}") from error


def _is_own(path: Path) -> bool:
    """Whether only this user and root can write to it."""
    found = path.stat()
    return found.st_uid in (os.geteuid(), 0) and not found.st_mode & 0o022


def _words(variable: str) -> list[str]:
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildError(f"{variable}={os.environ[variable]} cannot be split into words: {error}") from error


def flags() -> list[str]:
    """Return `FLAGS` and what ``CXXFLAGS`` adds to them or overrides, such as ``-march=haswell``."""
    return [*FLAGS, *_words("CXXFLAGS")]


def compiler() -> list[str]:
    """Return the words of the compiler's command.

    Raises:
        BuildError: there is none.
    """
    named = _words("CXX")
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler is found ({named[0] if named else ', '.join(COMPILERS)})")


def _fingerprint(compiler: list[str]) -> str:
    """A name for the library: other sources, compilers and processors have others (home folders may be shared)."""
    version = _run([*compiler, "--version"]).stdout
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    parts = [*sources, *flags(), *compiler, version, platform.machine(), _processor()]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=10).hexdigest()


def _processor() -> str:
    """The instruction sets of this processor, as far as Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder, "native.so")
        done = _run([*compiler, *flags(), str(SOURCE), "-o", str(made)])
        if done.returncode != 0:
            said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
            first = next((line for line in said if "error" in line), said[0])
            raise BuildError(f"{' '.join(compiler)} cannot compile {SOURCE.name}: {first}")
        made.chmod(0o700)
        made.rename(library)  # atomic: another process may be doing the same


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error

"""Compile ``native.cpp``, once per machine and user, and load it.

PyTorch's extension loader is not used: it compiles PyTorch's headers, and a build that is killed leaves a lock for
which all later builds wait forever.
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

from densenet_dist.environment import CACHE_ENV, cache_folder

SOURCE: Final = Path(__file__).with_name("native.cpp")
FLAGS: Final = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
COMPILERS: Final = ("c++", "g++", "clang++")
TIMEOUT_S: Final = 300


class BuildError(Exception):
    """The library cannot be built or loaded. The message is the reason, on one line."""


@cache
def native_library() -> ctypes.CDLL:
    """Return the library for this processor, from `cache_folder` or newly compiled.

    Its name is a hash of its sources, compiler and processor. It is recompiled if it cannot be loaded. The compiler is
    ``CXX``, or the first of `COMPILERS` on the PATH; its options are `FLAGS`, then ``CXXFLAGS``.

    Raises:
        BuildError: there is no compiler, it fails, or other users can write to the folder.
    """
    command = compiler()
    try:
        library = cache_folder() / f"native-{_fingerprint(command)}.so"
        if not _is_own(library.parent):
            raise BuildError(f"other users can write to {library.parent}: chmod go-w it, or set {CACHE_ENV}")
        if library.exists() and _is_own(library):
            with suppress(OSError):  # damaged, or linked with another C library
                return ctypes.CDLL(str(library))
        _compile(command, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"the cache of compiled kernels cannot be used: {error}") from error


def _is_own(path: Path) -> bool:
    """Return whether only this user and root can write to a file or folder."""
    status = path.stat()
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022


def _words(variable: str) -> list[str]:
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildError(f"{variable}={os.environ[variable]} cannot be split into words: {error}") from error


def flags() -> list[str]:
    """Return `FLAGS` and ``CXXFLAGS``, which may override them, such as ``-march=haswell``."""
    return [*FLAGS, *_words("CXXFLAGS")]


def compiler() -> list[str]:
    """Return the compiler's command as a list of words.

    Raises:
        BuildError: there is none.
    """
    named = _words("CXX")
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler is found ({named[0] if named else ', '.join(COMPILERS)})")


def _fingerprint(compiler: list[str]) -> str:
    """Return a hash of sources, compiler and processor: machines may share a home folder."""
    version = _run([*compiler, "--version"]).stdout
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    parts = [*sources, *flags(), *compiler, version, platform.machine(), _processor()]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=10).hexdigest()


def _processor() -> str:
    """Return the instruction sets of this processor, as listed by Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        output = Path(folder, "native.so")
        result = _run([*compiler, *flags(), str(SOURCE), "-o", str(output)])
        if result.returncode != 0:
            lines = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()
            first = next((line for line in lines if "error" in line), lines[0])
            raise BuildError(f"{' '.join(compiler)} cannot compile {SOURCE.name}: {first}")
        output.chmod(0o700)
        output.rename(library)  # atomic: another process may compile it at the same time


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error

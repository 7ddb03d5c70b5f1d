"""Makes sure that pictures can be read, before training starts: each is opened and decoded once.

What was found is remembered by size and time of change in the user's cache folder, so that the next start opens only
what is new.
"""

import hashlib
import json
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from densenet_dist.cache_folder import cache_folder
from densenet_dist.data.background import map_ahead, progress_bar
from densenet_dist.data.image_files import (
    REFUSED_SUFFIXES,
    UNREADABLE,
    Verdict,
    examine,
    not_supported,
    suffix,
    unreadable,
)
from densenet_dist.errors import StorageError
from densenet_dist.run_folder import RunFolder

_BAR_FROM = 300
_QUEUED = 1024  # files that wait for a thread
_CACHE_VERSION = 3


def verify(root: Path, names: list[str], *, progress: bool) -> dict[str, Verdict]:
    """What each file is found to be, by name; only those that the cache does not know as they are now are opened."""
    remembered = _load_cache(root)
    verdicts: dict[str, Verdict] = {}
    stamps: dict[str, list[int]] = {}
    unknown = []
    for name in names:
        if suffix(name) in REFUSED_SUFFIXES:
            verdicts[name] = not_supported(suffix(name)[1:])
            continue
        try:
            status = os.stat(root / name)
        except OSError as error:
            verdicts[name] = unreadable(error)
            continue
        stamps[name] = [status.st_size, status.st_mtime_ns]
        match remembered.get(name):
            case [*stamp, str() | [int(), int(), int()] as verdict] if stamp == stamps[name]:
                verdicts[name] = verdict if isinstance(verdict, str) else tuple(verdict)
            case _:
                unknown.append(name)
    try:
        _open_all(root, unknown, verdicts, progress=progress)
    finally:  # what was found before an interrupt is worth keeping
        entries = {
            name: [*stamps[name], verdicts[name]]
            for name in stamps
            if name in verdicts and not str(verdicts[name]).startswith(UNREADABLE)
        }
        if unknown or entries.keys() != remembered.keys():
            _save_cache(root, entries)
    return {name: verdicts[name] for name in names}


def _open_all(root: Path, names: list[str], verdicts: dict[str, Verdict], *, progress: bool) -> None:
    """Opens files with as many threads as this process has CPUs, and adds what they are to `verdicts`."""
    if not names:
        return
    with (
        warnings.catch_warnings(action="ignore"),  # Pillow's; out here because filters are those of all threads
        progress_bar("checking pictures", progress and len(names) >= _BAR_FROM, unit="files") as advance,
    ):
        paths = (root / name for name in names)
        found = map_ahead(examine, paths, _QUEUED, len(os.sched_getaffinity(0)))
        for name, verdict in zip(names, found, strict=True):
            verdicts[name] = verdict
            advance(1, len(names))


def _cache(root: Path) -> tuple[RunFolder, str]:
    """The folder of the cache, and the name of the file in it for pictures below `root`."""
    digest = hashlib.blake2b(os.fsencode(root), digest_size=16).hexdigest()
    return RunFolder(str(cache_folder()), "folders"), f"{digest}.json"


def _load_cache(root: Path) -> dict[str, Any]:
    """What earlier starts found: by name [size, mtime_ns, [width, height, CRC-32]] or [size, mtime_ns, reason]."""
    with suppress(OSError, StorageError):  # without a cache, or with a damaged one, all is done again
        folder, name = _cache(root)
        match folder.read_json(name):
            case {"version": version, "files": dict(files)} if version == _CACHE_VERSION:
                return files
    return {}


def _save_cache(root: Path, entries: dict[str, list[int | Verdict]]) -> None:
    """Keeps what was found, if that is possible: whole or not at all, whoever else does the same."""
    with suppress(OSError, StorageError):
        folder, name = _cache(root)
        folder.write(name, json.dumps({"version": _CACHE_VERSION, "files": entries}))

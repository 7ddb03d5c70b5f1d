"""Verify image files before training starts, by decoding each of them once.

The results are cached by size and modification time, so that the next start decodes only new and changed files.
"""

import hashlib
import json
import os
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from densenet_dist.data.background import map_ahead, progress_bar
from densenet_dist.data.image_files import UNREADABLE, Verdict, examine
from densenet_dist.environment import cache_folder
from densenet_dist.errors import StorageError
from densenet_dist.run_folder import RunFolder

_MIN_FILES_FOR_BAR = 300  # files
_QUEUED = 1024  # files that wait for a thread
_CACHE_VERSION = 3


def verify(root: Path, names: list[str]) -> dict[str, Verdict]:
    """Return the verdict on each file, by name; only those that the cache does not know are decoded."""
    cached = _load_cache(root)
    verdicts: dict[str, Verdict] = {}
    stamps: dict[str, list[int]] = {}
    for name in names:
        with suppress(OSError):  # `examine` reports it
            status = os.stat(root / name)
            stamps[name] = [status.st_size, status.st_mtime_ns]
        match cached.get(name):
            case [*stamp, str() | [int(), int(), int()] as verdict] if stamp == stamps.get(name):
                verdicts[name] = verdict if isinstance(verdict, str) else tuple(verdict)
    unknown = [name for name in names if name not in verdicts]
    try:
        _examine_all(root, unknown, verdicts)
    finally:  # keep what was found before an interrupt
        entries = {
            name: [*stamps[name], verdict]
            for name, verdict in verdicts.items()
            if name in stamps and not str(verdict).startswith(UNREADABLE)
        }
        if unknown or entries.keys() != cached.keys():
            _save_cache(root, entries)
    return {name: verdicts[name] for name in names}


def _examine_all(root: Path, names: list[str], verdicts: dict[str, Verdict]) -> None:
    """Examine files with as many threads as this process has CPUs, and add the results to `verdicts`."""
    bar = progress_bar("checking images", "files") if len(names) >= _MIN_FILES_FOR_BAR else nullcontext(lambda *_: None)
    with (
        warnings.catch_warnings(action="ignore"),  # Pillow's; here, because the filters apply to all threads
        bar as advance,
    ):
        paths = (root / name for name in names)
        found = map_ahead(examine, paths, _QUEUED, len(os.sched_getaffinity(0)))
        for name, verdict in zip(names, found, strict=True):
            verdicts[name] = verdict
            advance(1, len(names))


def _cache(root: Path) -> tuple[RunFolder, str]:
    """Return the cache folder, and the name of the file in it for `root`."""
    digest = hashlib.blake2b(os.fsencode(root), digest_size=16).hexdigest()
    return RunFolder(str(cache_folder()), "folders"), f"{digest}.json"


def _load_cache(root: Path) -> dict[str, Any]:
    """Load earlier results: by name [size, mtime_ns, [width, height, CRC-32]] or [size, mtime_ns, reason]."""
    with suppress(OSError, StorageError):  # without a cache, or with a damaged one, all files are examined
        folder, name = _cache(root)
        match folder.read_json(name):
            case {"version": version, "files": dict(files)} if version == _CACHE_VERSION:
                return files
    return {}


def _save_cache(root: Path, entries: dict[str, list[int | Verdict]]) -> None:
    """Save the results atomically if possible."""
    with suppress(OSError, StorageError):
        folder, name = _cache(root)
        folder.write(name, json.dumps({"version": _CACHE_VERSION, "files": entries}))

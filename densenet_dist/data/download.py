"""One file from an address to disk: bounded in size, whole or an error, with a bar to look at."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from densenet_dist.errors import ConfigError, DataError

_SCHEMES = ("https", "http", "file")
_TIMEOUT_S = 30.0  # of silence, not of the whole transfer
_CHUNK = 1 << 18


def fetch(url: str, target: Path, *, title: str, limit: int, mend: str, progress: bool) -> None:
    """Downloads `url` to the file `target`, through to the disk.

    Args:
        title: what is being downloaded, for messages and the bar.
        limit: bytes that it may have at most.
        mend: what else the user can do, for messages.
        progress: whether to show a bar on standard error.

    Raises:
        ConfigError: the address is not of a kind that can be fetched.
        DataError: the server refused or broke off, or there is more than `limit`. What came is left in `target`.
        OSError: `target` cannot be written.
    """
    if urlsplit(url).scheme not in _SCHEMES:
        raise ConfigError(f"cannot download from {url!r}: data.url must begin with https://, http:// or file://")
    with open(target, "wb") as file, _bar(title, progress) as advance:
        for chunk, total in _chunks(url, title=title, limit=limit, mend=mend):
            file.write(chunk)
            advance(len(chunk), total)
        file.flush()
        os.fsync(file.fileno())


def _chunks(url: str, *, title: str, limit: int, mend: str) -> Iterator[tuple[bytes, int | None]]:
    """What lies at `url`, piece by piece, each with the size of the whole if the server tells it."""
    failed = f"cannot download {title} from {url}"
    received, total = 0, None
    try:
        with urlopen(Request(url, headers={"User-Agent": "densenet-dist"}), timeout=_TIMEOUT_S) as response:
            declared = response.headers.get("Content-Length")
            total = int(declared) if declared is not None and declared.isdecimal() else None
            while chunk := response.read(_CHUNK):
                received += len(chunk)
                if received > limit:
                    raise DataError(f"{failed}: it has more than {limit} bytes, so it is something else; {mend}")
                yield chunk, total
    except (OSError, HTTPException) as error:
        raise DataError(f"{failed}: {error}; {mend}") from error
    if total is not None and received != total:
        raise DataError(f"{failed}: the transfer broke off after {received} of {total} bytes; run it again, or {mend}")


@contextmanager
def _bar(title: str, enabled: bool) -> Iterator[Callable[[int, int | None], object]]:
    """A progress bar on standard error, advanced by (bytes, size of the whole); or nothing at all."""
    if not enabled:
        yield lambda size, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        task = bars.add_task(f"downloading {title}", total=None)
        yield lambda size, total: bars.update(task, advance=size, total=total)

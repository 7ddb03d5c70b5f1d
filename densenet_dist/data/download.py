"""Download one file: bounded in size, whole or an error, tried again where the server or the network fails.

What comes is not trusted: `archive` takes files with the official SHA-256 only, wherever they came from.
"""

import os
import random
import socket
import ssl
import time
from http.client import HTTPException, InvalidURL
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, build_opener

from densenet_dist.data.progress import Advance, progress_bar
from densenet_dist.errors import ConfigError, DataError

_TIMEOUT_S = 30.0  # of silence, not of the whole transfer
_CHUNK = 1 << 18
_TRIES = 6
_FIRST_WAIT_S = 1.0  # doubled for every further try
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_FAILURES = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def fetch(url: str, target: Path, *, title: str, limit: int, mend: str, progress: bool) -> None:
    """Download `url` to the file `target`, through to the disk.

    A failure that may pass (of the connection, or status 408, 425, 429, 500, 502, 503, 504) is tried again, up to five
    times, after about 1, 2, 4, 8 and 16 seconds.

    Args:
        title: what is being downloaded, for messages and the bar.
        limit: bytes that it may have at most.
        mend: what else the user can do, for messages.
        progress: whether to show a bar on standard error.

    Raises:
        ConfigError: the address is not of a kind that can be fetched.
        DataError: the server refused or broke off, or there is more than `limit`.
        OSError: `target` cannot be written.
    """
    require_safe(url)
    # What follows a ? may be a signature, which no log should show.
    failed = f"cannot download {title} from {url.partition('?')[0]}"
    for attempt in range(1, _TRIES + 1):
        try:
            with progress_bar(f"downloading {title}", progress) as advance:
                _transfer(url, target, limit, advance)
            return
        except _FAILURES as error:
            if isinstance(error, HTTPError):
                error.close()  # it holds the connection
            if not _may_pass(error):
                raise DataError(f"{failed}: {error}; {mend}") from error
            if attempt == _TRIES:
                raise DataError(f"{failed}: {error}; tried {_TRIES} times; {mend}") from error
        except _TooLarge as error:
            raise DataError(f"{failed}: it has more than {limit} bytes, so it is something else; {mend}") from error
        # Not the generator that training seeds: all nodes would wait for the same time.
        time.sleep(random.SystemRandom().uniform(0.5, 1) * _FIRST_WAIT_S * 2 ** (attempt - 1))


class _TooLarge(Exception):
    """There is more than may come."""


def _transfer(url: str, target: Path, limit: int, advance: Advance) -> None:
    request = Request(url, headers={"User-Agent": "densenet-dist"})
    with build_opener().open(request, timeout=_TIMEOUT_S) as response, open(target, "wb") as file:
        declared = response.headers["Content-Length"]
        total = int(declared) if declared is not None and declared.isdecimal() else None
        received = 0
        while chunk := response.read(_CHUNK):
            received += len(chunk)
            if received > limit:
                raise _TooLarge
            file.write(chunk)
            advance(len(chunk), total)
        if total is not None and received != total:
            raise ConnectionError(f"the transfer broke off after {received} of {total} bytes")
        file.flush()
        os.fsync(file.fileno())


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HTTPError):
        return error.code in _BUSY
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, socket.gaierror):
        return reason.errno == socket.EAI_AGAIN
    final = (ssl.SSLCertVerificationError, InvalidURL, FileNotFoundError, PermissionError, IsADirectoryError, str)
    return not isinstance(reason, final)


def require_safe(url: str) -> None:
    """Refuse an address that is neither encrypted nor on this machine.

    Raises:
        ConfigError: the address is such a one, or holds a password.
    """
    try:
        parts = urlsplit(url)
        host, user = parts.hostname, parts.username
    except ValueError as error:
        raise ConfigError(f"data.url is no address: {error}") from None
    shown = url.rpartition("@")[2].partition("?")[0]
    if user is not None:
        raise ConfigError(f"data.url holds credentials for {shown}, which logs would show; take them out")
    if parts.scheme not in ("https", "file") and not (parts.scheme == "http" and host in _THIS_MACHINE):
        raise ConfigError(
            f"cannot download from {shown!r}: data.url must begin with https:// or file://; "
            "http:// is for servers on this machine alone"
        )

"""Download one file, with a size limit and retries.

Downloaded bytes are not trusted: `cifar_source` accepts only files with the official SHA-256.
"""

import random
import socket
import ssl
import time
from http.client import HTTPException, InvalidURL
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from densenet_dist.data.background import Advance, progress_bar
from densenet_dist.errors import ConfigError, DataError

_TIMEOUT_S = 30.0  # without any data, not for the whole transfer
_CHUNK = 1 << 18
_ATTEMPTS = 6
_FIRST_WAIT_S = 1.0  # doubled after each attempt
_LOCALHOST = ("localhost", "127.0.0.1", "::1")
_RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
_FAILURES = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError, ValueError)
_PERMANENT = (
    *(ssl.SSLCertVerificationError, FileNotFoundError, PermissionError, IsADirectoryError, InvalidURL, ValueError),
    str,  # the reason of an URLError may be a text
)


def fetch(url: str, target: Path, *, title: str, limit: int, remedy: str) -> None:
    """Download `url` to the file `target`, with a progress bar.

    Connection failures and the statuses 408, 425, 429, 500, 502, 503 and 504 are retried up to five times, after random
    waits of at most 1, 2, 4, 8 and 16 seconds.

    Args:
        title: what is downloaded, for messages and the progress bar.
        limit: the maximum size in bytes.
        remedy: what else the user can do, for messages.

    Raises:
        ConfigError: the address has no supported scheme or contains credentials.
        DataError: the download failed, or the file is larger than `limit`.
        OSError: `target` cannot be written.
    """
    require_safe(url)
    # The query may contain a signature, which must not appear in logs.
    failed = f"cannot download {title} from {url.partition('?')[0]}"
    for attempt in range(_ATTEMPTS):
        try:
            with progress_bar(f"downloading {title}") as advance:
                _transfer(url, target, limit, advance)
            return
        except _FAILURES as error:
            if isinstance(error, HTTPError):
                error.close()  # it holds the connection
            if not _is_temporary(error):
                raise DataError(f"{failed}: {error}; {remedy}") from error
            if attempt == _ATTEMPTS - 1:
                raise DataError(f"{failed}: {error}; tried {_ATTEMPTS} times; {remedy}") from error
        # Not the seeded generator of the training: all nodes would retry at the same moment.
        time.sleep(random.SystemRandom().uniform(0.5, 1) * _FIRST_WAIT_S * 2**attempt)


def _transfer(url: str, target: Path, limit: int, advance: Advance) -> None:
    request = Request(url, headers={"User-Agent": "densenet-dist"})
    with urlopen(request, timeout=_TIMEOUT_S) as response, open(target, "wb") as file:
        length = response.headers["Content-Length"]
        total = int(length) if length else None
        received = 0
        while chunk := response.read(_CHUNK):
            received += len(chunk)
            if received > limit:
                raise ValueError(f"it has more than {limit} bytes, too many for the expected file")
            file.write(chunk)
            advance(len(chunk), total)
        if total is not None and received != total:
            raise ConnectionError(f"the transfer broke off after {received} of {total} bytes")


def _is_temporary(error: Exception) -> bool:
    """Return whether a retry may succeed."""
    if isinstance(error, HTTPError):
        return error.code in _RETRIED_STATUS
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, socket.gaierror):
        return reason.errno == socket.EAI_AGAIN  # else there is no such host
    return not isinstance(reason, _PERMANENT)


def require_safe(url: str) -> None:
    """Check that an address is encrypted, or on this machine.

    Raises:
        ConfigError: it is neither, or contains credentials.
    """
    try:
        parts = urlsplit(url)
        host, user = parts.hostname, parts.username
    except ValueError as error:
        raise ConfigError(f"data.url is not a valid address: {error}") from None
    shown = url.rpartition("@")[2].partition("?")[0]
    if user is not None:
        raise ConfigError(f"data.url holds credentials for {shown}, which logs would show: remove them")
    if parts.scheme not in ("https", "file") and not (parts.scheme == "http" and host in _LOCALHOST):
        raise ConfigError(
            f"cannot download from {shown!r}: data.url must begin with https:// or file://; "
            "http:// is allowed for this machine only"
        )

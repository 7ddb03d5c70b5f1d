"""One file from an address to disk: bounded in size, whole or an error, with a bar to look at.

A server that is busy or breaks off is asked again, later each time and for no more than what is still missing. Many
nodes that want the same file do not ask in the same second.
"""

import errno
import os
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage, InvalidURL
from ipaddress import ip_address
from pathlib import Path
from typing import IO, TypeAlias
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from densenet_dist.errors import ConfigError, DataError

_TIMEOUT_S = 30.0  # of silence, not of the whole transfer
_CHUNK = 1 << 18
_TRIES = 6
_FIRST_WAIT_S = 1.0  # doubled for every further try
_LONGEST_WAIT_S = 120.0  # that a server may ask for
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_SPREAD_S_PER_NODE, _LONGEST_SPREAD_S = 0.5, 30.0
# Not the generator that training seeds: it would give the same on all nodes.
_lot = random.SystemRandom()

Advance: TypeAlias = Callable[[int, int | None], object]
"""Called with how many bytes have come since, and the size of the whole if it is known."""


class _Again(Exception):
    """A failure that may pass: why, and for how many seconds the server wants to be left alone, if it says so."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _Refused(Exception):
    """A failure that asking again does not mend; says why."""


@dataclass
class _Transfer:
    """How far a file has come.

    Attributes:
        received: bytes that lie in the file.
        validator: what tells this state of the file from another, if the server says so (RFC 9110, section 13.1.5).
    """

    received: int = 0
    validator: str | None = None


def fetch(url: str, target: Path, *, title: str, limit: int, mend: str, progress: bool) -> None:
    """Downloads `url` to the file `target`, through to the disk.

    Tried six times: after a failure that may pass (of the connection, or status 408, 425, 429, 500, 502, 503, 504) it
    waits as long as the server asks for, up to 120 s, or else up to 1, 2, 4, 8 and 16 s.

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
    require_safe(url)
    # What follows a ? may be a signature, which no log should show.
    failed, transfer = f"cannot download {title} from {url.partition('?')[0]}", _Transfer()
    opener = build_opener(_Redirects(url))
    with open(target, "wb") as file, bar(f"downloading {title}", progress) as advance:
        for number in range(1, _TRIES + 1):
            try:
                _transfer(opener, url, file, transfer, limit, advance)
                break
            except _Again as error:
                backoff_s = _lot.uniform(0.5, 1) * _FIRST_WAIT_S * 2 ** (number - 1)
                wait_s = backoff_s if error.wait_s is None else error.wait_s
                if wait_s > _LONGEST_WAIT_S:
                    raise DataError(f"{failed}: {error}; the server is busy for {wait_s:.0f} s more; {mend}") from error
                if number == _TRIES:
                    raise DataError(f"{failed}: {error}; tried {_TRIES} times; {mend}") from error
                time.sleep(wait_s)
            except _Refused as error:
                raise DataError(f"{failed}: {error}; {mend}") from error
        file.flush()
        os.fsync(file.fileno())


def require_safe(url: str) -> None:
    """Whether an address is one that may be fetched: encrypted, or on this machine.

    Raises:
        ConfigError: it is not, or holds a password.
    """
    try:
        parts = urlsplit(url)
        host, user = parts.hostname, parts.username
    except ValueError as error:
        raise ConfigError(f"data.url is no address: {error}") from None
    shown = url.rpartition("@")[2].partition("?")[0]
    if user is not None:
        raise ConfigError(f"data.url holds credentials for {shown}, which logs would show; take them out")
    if parts.scheme not in ("https", "file") and not (parts.scheme == "http" and _is_here(host or "")):
        raise ConfigError(
            f"cannot download from {shown!r}: data.url must begin with https:// or file://; "
            "http:// is for servers on this machine alone"
        )


def _is_here(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class _Redirects(HTTPRedirectHandler):
    """Follows a server to its own other pages, and over https to public addresses; nowhere else.

    A server outside must not have this machine ask services inside its network, such as a cloud's metadata.
    """

    def __init__(self, url: str) -> None:
        self._first = urlsplit(url)

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        parts = urlsplit(newurl)
        host = parts.hostname or ""
        refused = None
        if (parts.scheme, parts.netloc) != (self._first.scheme, self._first.netloc):
            if parts.scheme != "https":
                refused = f"it leads on to {parts.scheme}://{host}, which is not https://"
            elif private := _private_address(host, parts.port or 443):
                refused = f"it leads on to {host}, which is {private}, an address inside a network"
        if refused is not None:
            fp.close()
            raise _Refused(refused)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _private_address(host: str, port: int) -> str | None:
    """The first address of a host that is not a public one."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError:
        return None  # behind a proxy names need not be known here; else connecting says so
    return next((one for one in sorted(found) if not ip_address(one.partition("%")[0]).is_global), None)


def spread_over_nodes() -> None:
    """Waits for a random time where a run has several nodes, so that its nodes do not ask a server at once.

    Up to half a second a node, 30 s at most. How many there are is in the environment, as torchrun sets it and Ray too.
    """
    world_size, local = (int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = -(-world_size // max(local, 1))
    if nodes > 1:
        time.sleep(_lot.uniform(0, min(_SPREAD_S_PER_NODE * nodes, _LONGEST_SPREAD_S)))


def _transfer(
    opener: OpenerDirector, url: str, file: IO[bytes], transfer: _Transfer, limit: int, advance: Advance
) -> None:
    """One try: asks for what is still missing, and appends it to the file; all of it anew where the server wants so."""
    headers = {"User-Agent": "densenet-dist"}
    if transfer.received:
        headers["Range"] = f"bytes={transfer.received}-"
        if transfer.validator:
            headers["If-Range"] = transfer.validator
    with _asking(transfer):
        response = opener.open(Request(url, headers=headers), timeout=_TIMEOUT_S)
    with response:
        rest = response.status == 206
        if rest and not (response.headers["Content-Range"] or "").startswith(f"bytes {transfer.received}-"):
            raise _Refused("the server answered with another part than it was asked for")
        if file.tell() and not rest:
            advance(-file.tell(), None)
            file.seek(0)
            file.truncate()
            transfer.received = 0
        transfer.validator = _validator(response.headers)
        declared = response.headers["Content-Length"]
        total = transfer.received + int(declared) if declared is not None and declared.isdecimal() else None
        while True:
            with _asking(transfer):
                chunk = response.read(_CHUNK)
            if not chunk:
                break
            if transfer.received + len(chunk) > limit:
                raise _Refused(f"it has more than {limit} bytes, so it is something else")
            file.write(chunk)
            transfer.received += len(chunk)
            advance(len(chunk), total)
    if total is not None and transfer.received != total:
        raise _Again(f"the transfer broke off after {transfer.received} of {total} bytes")


@contextmanager
def _asking(transfer: _Transfer) -> Iterator[None]:
    """Tells failures of a server that may pass from those that do not."""
    try:
        yield
    except HTTPError as error:
        with error:
            if error.code in _BUSY:
                raise _Again(str(error), _retry_after(error.headers)) from error
            if error.code == 416 and transfer.received:  # there is no such part: the file has changed
                transfer.received, transfer.validator = 0, None
                raise _Again(str(error)) from error
        raise _Refused(str(error)) from error
    except (OSError, HTTPException) as error:
        raise (_Again if _may_pass(error) else _Refused)(str(error)) from error


def _may_pass(error: OSError | HTTPException) -> bool:
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError | InvalidURL):
        return False
    if isinstance(reason, socket.gaierror):
        return reason.errno == socket.EAI_AGAIN
    if isinstance(reason, HTTPException | ConnectionError | TimeoutError | ssl.SSLError):
        return True
    return isinstance(reason, OSError) and reason.errno in (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH)


def _validator(headers: Message) -> str | None:
    tag = headers["ETag"]
    return tag if tag and not tag.startswith("W/") else headers["Last-Modified"]


def _retry_after(headers: Message) -> float | None:
    """Seconds that a server asks to be left alone for (RFC 9110, section 10.2.3)."""
    asked = (headers["Retry-After"] or "").strip()
    if asked.isdecimal():
        return float(asked)
    try:
        return max((parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError):  # not said, or no date; a date without a zone cannot be subtracted
        return None


@contextmanager
def bar(title: str, enabled: bool) -> Iterator[Advance]:
    """A progress bar on standard error, advanced by (bytes, size of the whole); or nothing at all."""
    if not enabled:
        yield lambda size, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True, force_jupyter=False)) as bars:
        task = bars.add_task(title, total=None)
        yield lambda size, total: bars.update(task, advance=size, total=total)

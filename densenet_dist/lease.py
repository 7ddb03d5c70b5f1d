"""One job per run folder: lease.json names the process that holds the folder, which renews it while it runs.

Clocks of different machines are never compared. A lease is stale if another process observes no renewal for `STALE_S`
by its own clock, or finds on the same machine that the holder has ended.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final
from uuid import uuid4

from pydantic import Field, TypeAdapter

from densenet_dist.errors import StorageError
from densenet_dist.run_folder import RunFolder, split_location

LEASE_FILE: Final = "lease.json"
RENEW_S = 5.0
STALE_S = 15.0
_SETTLE_S: Final = 0.2
"""After this delay, two processes that took a stale lease at the same time both see which one has it."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder: the content of lease.json.

    Attributes:
        key: identifies this lease.
        machine: identifies the machine, its boot and the container.
        start_time: of the process, in ticks since boot, because process ids are reused.
        renewals: their number.
    """

    key: str
    host: str
    machine: str
    pid: int
    start_time: Annotated[str, Field(alias="born")]
    renewals: Annotated[int, Field(alias="beat")] = 0

    @classmethod
    def here(cls) -> Holder:
        """Return the holder for this process."""
        return cls(uuid4().hex, os.uname().nodename, _machine_id(), os.getpid(), _start_time(os.getpid()))

    @property
    def alive(self) -> bool | None:
        """Whether the process is running; None if it is on another machine or this cannot be determined."""
        if self.machine != _machine_id():
            return None
        start_time = _start_time(self.pid)
        return (start_time != "" or None) if start_time == self.start_time else False

    def to_json(self) -> str:
        """Return the content of lease.json."""
        return TypeAdapter(Holder).dump_json(self, by_alias=True).decode()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """A lease of a folder, see `hold`.

    Attributes:
        held: location of the folder and key of the lease, for other processes of the job that write to the folder or
            below it, see `fence`.
        lost: why the lease was lost; None while it is held.
    """

    def __init__(self, held: tuple[str, str]) -> None:
        self.held = held
        self.lost: StorageError | None = None
        self._on_loss: Callable[[], None] = lambda: None

    def when_lost(self, on_loss: Callable[[], None]) -> None:
        """Set a function to call, perhaps in a thread, when the lease is lost: nothing more may be written."""
        self._on_loss = on_loss
        if self.lost is not None:
            on_loss()

    def lose(self, error: StorageError) -> None:
        """Set why the lease was lost, and call the function of `when_lost`."""
        self.lost = error
        self._on_loss()

    def check(self) -> None:
        """Raise `lost`, if the lease was lost."""
        if self.lost is not None:
            raise self.lost


def fence(folder: RunFolder, held: tuple[str, str] | None) -> None:
    """Make `folder.guard` check that the job still has the lease; it is called before a checkpoint becomes visible.

    A job that is frozen for longer than `STALE_S` does not notice it when it continues. Without this check it would
    overwrite the list of checkpoints and delete those of the job that took over.

    Args:
        folder: the folder that this process writes to.
        held: `Lease.held` of the job, of this folder or of the sweep around it; None for a folder without a lease.
    """
    if held is None:
        return
    location, key = held
    leased = RunFolder(*split_location(location))

    def guard() -> None:
        lost = None
        with suppress(StorageError):  # lease.json cannot be read: writing will report it
            lost = _loss(leased, key)
        if lost is not None:
            raise lost

    folder.guard = guard


@contextmanager
def hold(folder: RunFolder, listener: Callable[[dict[str, Any]], None]) -> Iterator[Lease]:
    """Take the lease of an existing folder, renew it in a thread, and release it at the end.

    `listener` is called with a ``note`` event before waiting to see whether a holder on another machine is alive.

    Raises:
        StorageError: another running job has the lease.
    """
    _wait_until_free(folder, listener)
    holder = Holder.here()
    folder.write(LEASE_FILE, holder.to_json())
    time.sleep(_SETTLE_S)
    found = _read(folder)
    if found is None or found.key != holder.key:
        raise _in_use(folder, found)
    lease = Lease((folder.location, holder.key))
    fence(folder, lease.held)
    end = threading.Event()

    def renew() -> None:
        renewals = 0
        while not end.wait(RENEW_S):
            with suppress(StorageError):  # if it is not temporary, writing a checkpoint will report it
                lost = _loss(folder, holder.key)
                if lost is not None:
                    lease.lose(lost)
                    return
                renewals += 1
                folder.write(LEASE_FILE, replace(holder, renewals=renewals).to_json())

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        end.set()
        thread.join()
        with suppress(StorageError):
            if lease.lost is None and _loss(folder, holder.key) is None:
                folder.remove(LEASE_FILE)


def _wait_until_free(folder: RunFolder, listener: Callable[[dict[str, Any]], None]) -> None:
    first = _read(folder)
    if first is None or first.alive is False:
        return
    if first.alive:
        raise _in_use(folder, first)
    text = f"{folder.uri} was held by {first}: waiting {STALE_S:g} s to see whether that job still runs"
    listener({"kind": "note", "text": text})
    end = time.monotonic() + STALE_S
    while time.monotonic() < end:
        time.sleep(min(1.0, STALE_S / 4))
        now = _read(folder)
        if now is None:
            return
        if now != first:
            raise _in_use(folder, now)


def _loss(folder: RunFolder, key: str) -> StorageError | None:
    """Return an error if the folder is no longer held under `key`."""
    found = _read(folder)
    if found is not None and found.key != key:
        return StorageError(
            f"{folder.uri} was taken over by {found} while this job was frozen\n"
            "  nothing is lost: the other job resumes from the last checkpoint"
        )
    if found is not None or folder.exists(LEASE_FILE):  # a damaged file is replaced at the next renewal
        return None
    # Do not write it again: another job may have taken the folder over, finished, and deleted the file.
    return StorageError(
        f"{folder.uri}/{LEASE_FILE}, which says that this job holds the folder, was deleted\n"
        "  what was saved is kept: resume from the last checkpoint with --resume"
    )


def _in_use(folder: RunFolder, holder: Holder | None) -> StorageError:
    return StorageError(
        f"{folder.uri} is in use by {holder or 'another job'}\n  wait for it, stop it, or choose another name: name=NEW"
    )


def _read(folder: RunFolder) -> Holder | None:
    """Return the holder; None if there is none or the file is damaged."""
    return folder.read(LEASE_FILE, Holder, strict=False)


def _machine_id() -> str:
    """Return what process ids are unique in: the machine, its boot and the container."""
    parts = [os.uname().nodename]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _start_time(pid: int) -> str:
    """Return the start time of a process in ticks since boot; empty if it is not running or this cannot be read."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state == "Z" else fields[18]

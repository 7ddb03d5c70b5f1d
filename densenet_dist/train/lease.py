"""One job to a folder: a file in it that says whose it is, and that its holder renews as long as it lives.

No clock of one machine is compared with that of another: a lease is stale when the one who waits has seen it unchanged
for `STALE_S` of its own time, or when it can see that the holder's process, on its own machine, is gone.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from densenet_dist.errors import StorageError
from densenet_dist.run_folder import RunFolder

LEASE_FILE: Final = "lease.json"
BEAT_S = 5.0
STALE_S = 15.0
_SETTLE_S: Final = 0.2
"""Two that take a stale lease at the same time both see whose it became after this."""


@dataclass(frozen=True)
class Holder:
    """Who holds a folder.

    Attributes:
        key: of this hold alone.
        host: the name of its machine, and ``machine`` what tells that from every other, and from its own restart.
        pid: its process, and ``born`` when that began, in the machine's own count: numbers are used again.
        beat: counts up while it lives.
    """

    key: str
    host: str
    machine: str
    pid: int
    born: str
    beat: int = 0

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        return cls(uuid4().hex, os.uname().nodename, _machine(), os.getpid(), _born(os.getpid()))

    @property
    def gone(self) -> bool:
        """Whether it was a process of this machine, and is no more."""
        return self.machine == _machine() and _born(self.pid) != self.born

    @property
    def here_and_alive(self) -> bool:
        """Whether it is a process of this machine that lives."""
        return self.machine == _machine() and self.born != "" and _born(self.pid) == self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """A hold on a folder; `hold` gives it.

    Attributes:
        lost: why the folder is no longer held; None while it is.
        guard: for whoever else writes to the folder on behalf of this process.
    """

    def __init__(self, folder: RunFolder, holder: Holder) -> None:
        self.lost: StorageError | None = None
        self._folder, self._holder = folder, holder
        self._leave: Callable[[], None] = lambda: None
        folder.guard = self.guard = Guard(folder, holder.key)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def when_lost(self, leave: Callable[[], None]) -> None:
        """What to call, in a thread, once the folder is no longer held: nothing more may be written to it."""
        self._leave = leave

    def check(self) -> None:
        """Check that the folder was held all the time.

        Raises:
            StorageError: saying who has taken it over, or that lease.json is gone.
        """
        if self.lost is not None:
            raise self.lost

    def release(self) -> None:
        """Give the folder back."""
        self._end.set()
        self._thread.join()
        with suppress(StorageError):
            if self.lost is None and _loss(self._folder, self._holder.key) is None:
                self._folder.remove(LEASE_FILE)

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            with suppress(StorageError):  # of the moment, or the checkpoints will say so
                self.lost = _loss(self._folder, self._holder.key)
                if self.lost is not None:
                    self._leave()
                    return
                self._holder = replace(self._holder, beat=self._holder.beat + 1)
                _write(self._folder, self._holder)


class Guard:
    """Asked before a checkpoint is listed: whether the folder is still that job's for which this process writes.

    A job that is frozen for longer than `STALE_S` may be in the middle of anything when it wakes up, and a worker does
    not even notice that its driver is frozen. Without this it would list its own checkpoints once more, and delete
    those of the job that goes on.

    Args:
        folder: that is written to.
        key: of the hold; None for a folder that nobody holds.
    """

    def __init__(self, folder: RunFolder, key: str | None) -> None:
        self.key = key
        self._folder = folder

    def __call__(self) -> None:
        """Check that the folder is still held; passes if lease.json cannot be read now.

        Raises:
            StorageError: saying who has taken it over, or that lease.json is gone.
        """
        lost = None
        if self.key is not None:
            with suppress(StorageError):  # writing will say so
                lost = _loss(self._folder, self.key)
        if lost is not None:
            raise lost


@contextmanager
def hold(folder: RunFolder, listener: Callable[[dict[str, Any]], None]) -> Iterator[Lease]:
    """Hold a folder for this process alone.

    Args:
        folder: it exists.
        listener: called with a ``note`` event if it has to wait: a holder on another machine may be dead.

    Raises:
        StorageError: where a job that lives holds it.
    """
    _wait_until_free(folder, listener)
    holder = Holder.here()
    _write(folder, holder)
    time.sleep(_SETTLE_S)
    found = _read(folder)
    if found is None or found.key != holder.key:
        raise _taken(folder, found)
    lease = Lease(folder, holder)
    try:
        yield lease
    finally:
        lease.release()


def _wait_until_free(folder: RunFolder, listener: Callable[[dict[str, Any]], None]) -> None:
    first = _read(folder)
    if first is None or first.gone:
        return
    if first.here_and_alive:
        raise _taken(folder, first)
    text = f"{folder.uri} was held by {first}: waiting {STALE_S:g} s to see whether it still is"
    listener({"kind": "note", "text": text})
    end = time.monotonic() + STALE_S
    while time.monotonic() < end:
        time.sleep(min(1.0, STALE_S / 4))
        now = _read(folder)
        if now is None:
            return
        if now != first:
            raise _taken(folder, now)


def _loss(folder: RunFolder, key: str) -> StorageError | None:
    """The error if the folder is no longer held under that key."""
    found = _read(folder)
    if found is not None and found.key != key:
        return StorageError(
            f"{folder.uri} was taken over by {found}, while this one stood still for long\n"
            "  nothing is lost: that one goes on from the last checkpoint"
        )
    if found is not None or folder.exists(LEASE_FILE):  # a damaged file is replaced at the next beat
        return None
    # Not written again: a job that took the folder over, and has finished since, leaves it like this, too.
    return StorageError(
        f"{folder.uri}/{LEASE_FILE}, which says that this job holds the folder, was deleted\n"
        "  what was saved is kept: go on from the last checkpoint with --resume"
    )


def _taken(folder: RunFolder, holder: Holder | None) -> StorageError:
    return StorageError(
        f"{folder.uri} is in use by {holder or 'another job'}\n  wait for it, stop it, or choose another name: name=NEW"
    )


def _read(folder: RunFolder) -> Holder | None:
    """The holder; None where there is none, or where the file is damaged."""
    return folder.read(LEASE_FILE, Holder, strict=False)


def _write(folder: RunFolder, holder: Holder) -> None:
    folder.write(LEASE_FILE, json.dumps(asdict(holder)) + "\n")


def _machine() -> str:
    """This boot of this machine, and the container in it: process numbers mean something within that only."""
    parts = [os.uname().nodename]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _born(pid: int) -> str:
    """When a process began, in ticks since the boot; empty where there is none, or where that cannot be known."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state == "Z" else fields[18]

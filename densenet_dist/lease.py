"""One job per run folder: lease.json names the process that holds the folder, and is renewed while it lives.

Clocks of different machines are never compared. A lease is stale if whoever waits for it sees no renewal for `STALE_S`
of its own time, or sees that the process is gone from its own machine.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from densenet_dist.errors import StorageError
from densenet_dist.run_folder import RunFolder

LEASE_FILE: Final = "lease.json"
RENEW_S = 5.0
STALE_S = 15.0
_SETTLE_S: Final = 0.2
"""After this, two processes that take a stale lease at the same time both see whose it became."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a folder.

    Attributes:
        key: of this hold alone.
        host: the name of its machine; ``machine`` also tells a container, and one boot of the machine from another.
        pid: its process; ``born`` is when that started, in the machine's own count, because numbers are reused.
        beat: number of renewals.
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
    def alive(self) -> bool | None:
        """Whether the process lives; None where it is on another machine, or that cannot be known."""
        if self.machine != _machine():
            return None
        born = _born(self.pid)
        return (born != "" or None) if born == self.born else False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """A hold on a folder, see `hold`; a thread renews it.

    Attributes:
        key: of the hold, for other processes that write to the folder, see `fence`.
        lost: why the folder is no longer held; None while it is.
    """

    def __init__(self, folder: RunFolder, holder: Holder) -> None:
        self.key = holder.key
        self.lost: StorageError | None = None
        self._folder, self._holder = folder, holder
        self._on_loss: Callable[[], None] = lambda: None
        fence(folder, holder.key)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def when_lost(self, on_loss: Callable[[], None]) -> None:
        """Set what to call, in a thread, once the folder is no longer held: nothing more may be written to it."""
        self._on_loss = on_loss

    def check(self) -> None:
        """Check that the folder was held all the time.

        Raises:
            StorageError: naming who took it over, or saying that lease.json is gone.
        """
        if self.lost is not None:
            raise self.lost

    def release(self) -> None:
        """Give the folder back."""
        self._end.set()
        self._thread.join()
        with suppress(StorageError):
            if self.lost is None and _loss(self._folder, self.key) is None:
                self._folder.remove(LEASE_FILE)

    def _renew(self) -> None:
        while not self._end.wait(RENEW_S):
            with suppress(StorageError):  # a passing fault, or writing a checkpoint will report it
                self.lost = _loss(self._folder, self.key)
                if self.lost is not None:
                    self._on_loss()
                    return
                self._holder = replace(self._holder, beat=self._holder.beat + 1)
                _write(self._folder, self._holder)


def fence(folder: RunFolder, key: str | None) -> None:
    """Have `folder.guard`, which is called before a checkpoint is listed, check that a job still holds the folder.

    A job that is frozen for longer than `STALE_S` may wake up anywhere, and its workers do not even notice. Without
    this, it would list its own checkpoints once more, and delete those of the job that took over.

    Args:
        folder: that this process writes to.
        key: of the job's hold; None for a folder that nobody holds.
    """
    folder.guard = partial(_require_held, folder, key)


def _require_held(folder: RunFolder, key: str | None) -> None:
    lost = None
    if key is not None:
        with suppress(StorageError):  # if lease.json cannot be read, writing will report it
            lost = _loss(folder, key)
    if lost is not None:
        raise lost


@contextmanager
def hold(folder: RunFolder, listener: Callable[[dict[str, Any]], None]) -> Iterator[Lease]:
    """Hold an existing folder for this process alone.

    Args:
        folder: the run's or sweep's folder.
        listener: called with a ``note`` event before waiting: a holder on another machine may be dead.

    Raises:
        StorageError: another living job holds it.
    """
    _wait_until_free(folder, listener)
    holder = Holder.here()
    _write(folder, holder)
    time.sleep(_SETTLE_S)
    found = _read(folder)
    if found is None or found.key != holder.key:
        raise _in_use(folder, found)
    lease = Lease(folder, holder)
    try:
        yield lease
    finally:
        lease.release()


def _wait_until_free(folder: RunFolder, listener: Callable[[dict[str, Any]], None]) -> None:
    first = _read(folder)
    if first is None or first.alive is False:
        return
    if first.alive:
        raise _in_use(folder, first)
    text = f"{folder.uri} was held by {first}: waiting {STALE_S:g} s to see whether it still is"
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
    """The error if the folder is no longer held under that key."""
    found = _read(folder)
    if found is not None and found.key != key:
        return StorageError(
            f"{folder.uri} was taken over by {found} while this job was frozen\n"
            "  nothing is lost: the other job resumes from the last checkpoint"
        )
    if found is not None or folder.exists(LEASE_FILE):  # a damaged file is replaced at the next renewal
        return None
    # Not written again: a job that took the folder over and has finished since also leaves it without the file.
    return StorageError(
        f"{folder.uri}/{LEASE_FILE}, which says that this job holds the folder, was deleted\n"
        "  what was saved is kept: resume from the last checkpoint with --resume"
    )


def _in_use(folder: RunFolder, holder: Holder | None) -> StorageError:
    return StorageError(
        f"{folder.uri} is in use by {holder or 'another job'}\n  wait for it, stop it, or choose another name: name=NEW"
    )


def _read(folder: RunFolder) -> Holder | None:
    """The holder; None where there is none, or where the file is damaged."""
    return folder.read(LEASE_FILE, Holder, strict=False)


def _write(folder: RunFolder, holder: Holder) -> None:
    folder.write(LEASE_FILE, json.dumps(asdict(holder)) + "\n")


def _machine() -> str:
    """Identify this boot of this machine, and the container: process numbers mean something only within it."""
    parts = [os.uname().nodename]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _born(pid: int) -> str:
    """When a process started, in ticks since the boot; empty where there is none, or where that cannot be known."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state == "Z" else fields[18]

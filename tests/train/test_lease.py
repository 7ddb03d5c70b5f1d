"""One job to a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from densenet_dist.errors import StorageError
from densenet_dist.run_folder import RunFolder
from densenet_dist.train import lease as module
from densenet_dist.train.checkpoint import CheckpointStore, Position, Snapshot
from densenet_dist.train.lease import LEASE_FILE, Guard, Holder, NoLease, hold
from densenet_dist.train.logs import RunLog


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(str(tmp_path), "run")
    run.create()
    return run


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    monkeypatch.setattr(module, "STALE_S", 0.8)


def elsewhere(**changes: object) -> Holder:
    return replace(Holder.here(), key="other", host="far", machine="another", **changes)  # type: ignore[arg-type]


def put(folder: RunFolder, holder: Holder) -> None:
    folder.write(LEASE_FILE, json.dumps(asdict(holder)))


def silence(text: str) -> None:
    raise AssertionError(f"nothing to wait for: {text}")


HOLDER = """
import sys, time
from densenet_dist.train.lease import hold
from densenet_dist.run_folder import RunFolder
with hold(RunFolder(sys.argv[1], "run"), print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(folder: RunFolder):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder.storage], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_job_is_refused_at_once_and_told_whose_it_is(folder, other):
    began = time.monotonic()
    words = rf"is in use by process {other.pid} on {os.uname().nodename}"
    with pytest.raises(StorageError, match=words) as caught, hold(folder, silence):
        pass
    assert caught.value.exit_code == 5
    assert time.monotonic() - began < 2


def test_the_lease_of_a_killed_job_is_taken_at_once(folder, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    with hold(folder, silence) as lease:
        lease.check()
        assert json.loads((folder.path / LEASE_FILE).read_text())["pid"] == os.getpid()


def test_it_is_given_back(folder):
    for _ in range(2):
        with hold(folder, silence):
            assert folder.exists(LEASE_FILE)
        assert not folder.exists(LEASE_FILE)


@pytest.mark.usefixtures("hasty")
def test_a_holder_elsewhere_that_does_not_beat_is_gone(folder):
    put(folder, elsewhere())
    told: list[str] = []
    began = time.monotonic()
    with hold(folder, told.append):
        assert 0.8 <= time.monotonic() - began < 3
    assert told == [f"{folder.uri} was held by process {os.getpid()} on far: waiting 0.8 s to see whether it still is"]


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("hours", [-1, 1])
def test_clocks_of_machines_do_not_matter(folder, hours):
    """Neither those that stamp the file nor those of holders: a live one is refused, whatever the time is."""
    put(folder, elsewhere())
    beats = 0

    def beat(text: str) -> None:
        nonlocal beats
        beats += 1
        put(folder, elsewhere(beat=beats))
        os.utime(folder.path / LEASE_FILE, times=(time.time() + hours * 3600,) * 2)

    def tell(text: str) -> None:
        threading.Timer(0.2, beat, [text]).start()

    with pytest.raises(StorageError, match=r"is in use by process .* on far"), hold(folder, tell):
        pass


@pytest.mark.usefixtures("hasty")
def test_one_that_stood_still_until_another_took_over_finds_out_and_leaves(folder):
    left: list[bool] = []
    with hold(folder, silence) as lease:
        lease.when_lost(lambda: left.append(True))
        put(folder, elsewhere())
        deadline = time.monotonic() + 5
        while not left and time.monotonic() < deadline:
            time.sleep(0.02)
        assert left == [True]
        with pytest.raises(StorageError, match=r"was taken over by process .* on far"):
            lease.check()
    assert json.loads((folder.path / LEASE_FILE).read_text())["key"] == "other"  # not ours to remove


def test_nothing_is_listed_or_recorded_in_a_folder_that_another_job_took_over(folder):
    store = CheckpointStore(folder)
    snapshot = Snapshot({"w": torch.zeros(3)}, None, {}, Position(0, 1, 1), {})
    with hold(folder, silence):
        store.save(snapshot)
        log = RunLog(folder, 1)
        log.record({"epoch": 1}, 1)
        put(folder, elsewhere())
        before = contents(folder)
        with pytest.raises(StorageError, match=r"was taken over by process .* on far"):
            store.save(replace(snapshot, position=Position(0, 2, 2)))
        with pytest.raises(StorageError, match=r"was taken over by process .* on far"):
            log.record({"epoch": 2}, 2)
        assert contents(folder) == before
        log.abandon()


def test_a_worker_asks_for_the_process_that_holds_the_folder(folder):
    with hold(folder, silence) as lease:
        guard = Guard(RunFolder(str(folder.path.parent), "run"), lease.guard.key)
        guard()
        put(folder, elsewhere())
        with pytest.raises(StorageError, match="was taken over"):
            guard()
        folder.remove(LEASE_FILE)
        guard()  # given back: nobody else writes
    Guard(folder, None)()


def contents(folder: RunFolder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("hasty")
def test_it_beats(folder):
    with hold(folder, silence):
        time.sleep(0.5)
        assert json.loads((folder.path / LEASE_FILE).read_text())["beat"] >= 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 1}', "\x00"])
def test_a_torn_lease_is_no_lease(folder, text):
    (folder.path / LEASE_FILE).write_text(text)
    with hold(folder, silence):
        pass


def test_a_number_that_another_process_has_now_is_not_that_process():
    holder = Holder.here()
    assert holder.here_and_alive
    assert not holder.gone
    reused = replace(holder, born="1")
    assert reused.gone
    assert not reused.here_and_alive


def test_without_a_lease_nothing_is_lost():
    lease = NoLease()
    lease.when_lost(lambda: None)
    lease.check()

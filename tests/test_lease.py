"""One job to a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import save

from densenet_dist import lease as module
from densenet_dist.errors import StorageError
from densenet_dist.lease import LEASE_FILE, Holder, fence, hold
from densenet_dist.run_folder import RunFolder
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.logs import RunLog
from densenet_dist.train.snapshot import Position, Snapshot

TAKEN_OVER = r"was taken over by process .* on far"
HOLDER = """
import sys, time
from densenet_dist.lease import hold
from densenet_dist.run_folder import RunFolder
with hold(RunFolder(sys.argv[1], "run"), print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(str(tmp_path), "run")
    run.create()
    return run


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_S", 0.1)
    monkeypatch.setattr(module, "STALE_S", 0.8)


def give_to_another_machine(folder: RunFolder, renewals: int = 0) -> None:
    holder = replace(Holder.here(), key="other", host="far", machine="another", renewals=renewals)
    folder.write(LEASE_FILE, holder.to_json())


def no_wait(event: dict[str, Any]) -> None:
    raise AssertionError(f"nothing to wait for: {event}")


def test_a_second_job_is_refused_while_the_first_lives_and_takes_over_once_it_is_killed(folder):
    command = [sys.executable, "-c", HOLDER, folder.storage]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        words = rf"is in use by process {other.pid} on {os.uname().nodename}"
        with pytest.raises(StorageError, match=words) as caught, hold(folder, no_wait):
            pass
        assert caught.value.exit_code == 5
        other.kill()
    with hold(folder, no_wait) as lease:
        lease.check()
        time.sleep(0.5)
        found = json.loads((folder.path / LEASE_FILE).read_text())
        assert found["pid"] == os.getpid()
        assert found["beat"] >= 2  # it is renewed
    assert not folder.exists(LEASE_FILE)
    holder = Holder.here()
    assert holder.alive
    assert replace(holder, start_time="1").alive is False  # a process number that was used again is another process


def test_a_trial_may_write_only_while_its_sweep_has_the_lease(folder):
    trial = RunFolder(folder.location, "trial-000")
    with hold(folder, no_wait) as lease:
        fence(trial, lease.held)
        trial.guard()
        give_to_another_machine(folder)
        with pytest.raises(StorageError, match=TAKEN_OVER):
            trial.guard()


def test_a_torn_lease_is_no_lease(folder):
    for text in ("", "{", "[]", '{"key": 1}', "\x00"):
        (folder.path / LEASE_FILE).write_text(text)
        with hold(folder, no_wait):
            pass


def test_a_job_on_another_machine_that_does_not_renew_its_lease_is_gone(folder):
    give_to_another_machine(folder)
    told: list[dict[str, Any]] = []
    began = time.monotonic()
    with hold(folder, told.append):
        assert 0.8 <= time.monotonic() - began < 3
    text = f"{folder.uri} was held by process {os.getpid()} on far: waiting 0.8 s to see whether that job still runs"
    assert told == [{"kind": "note", "text": text}]


def test_one_that_renews_it_is_alive_whatever_its_clock_says(folder):
    give_to_another_machine(folder)

    def renew() -> None:
        give_to_another_machine(folder, renewals=1)
        os.utime(folder.path / LEASE_FILE, times=(time.time() + 3600,) * 2)

    def tell(event: dict[str, Any]) -> None:
        threading.Timer(0.2, renew).start()

    with pytest.raises(StorageError, match=r"is in use by process .* on far"), hold(folder, tell):
        pass


def test_a_job_whose_lease_is_deleted_leaves_and_blames_no_other_job(folder):
    left = threading.Event()
    with hold(folder, no_wait) as lease:
        lease.when_lost(left.set)
        while not left.wait(0.2):
            (folder.path / LEASE_FILE).unlink(missing_ok=True)
        for check in (lease.check, folder.guard):
            with pytest.raises(StorageError, match=r"lease\.json, .* was deleted\n.*--resume"):
                check()
    assert not folder.exists(LEASE_FILE)


def test_a_job_that_slept_until_another_took_over_leaves_and_lists_or_records_nothing(folder):
    store = CheckpointStore(folder)
    snapshot = Snapshot({"w": torch.zeros(3)}, None, {}, Position(0, 1, 1), {})
    left = threading.Event()
    with hold(folder, no_wait) as lease:
        lease.when_lost(left.set)
        worker = RunFolder(folder.storage, "run")  # in another process, without a lease
        fence(worker, lease.held)
        worker.guard()
        save(store, snapshot)
        log = RunLog(folder, 1)
        log.record({"epoch": 1}, 1)
        give_to_another_machine(folder)
        assert left.wait(5)
        before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
        for write in (
            lambda: save(store, replace(snapshot, position=Position(0, 2, 2))),
            lambda: log.record({"epoch": 2}, 2),
            worker.guard,
            lease.check,
        ):
            with pytest.raises(StorageError, match=TAKEN_OVER):
                write()
        assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
        log.close_after_error()
    assert json.loads((folder.path / LEASE_FILE).read_text())["key"] == "other"  # not ours to remove

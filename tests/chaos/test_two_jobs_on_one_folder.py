"""Two jobs on one run's folder, and the lease that tells them apart."""

import json
import os
import signal
import time

import pytest
from chaos_lab import LOCAL, Lab, Started, cases, manifest


@pytest.mark.fault("a second job resumes a run that is being trained", "exit 5, naming the first job, which continues")
def test_second_job(lab: Lab) -> None:
    first = lab.begin(*LOCAL, "train.epochs=12")
    first.wait_for_step(5)
    lab.begin(resume=first.folder).fail(5, f"is in use by process {first.process.pid}")
    first.finish_like(lab.undisturbed(*LOCAL, "train.epochs=12"))
    lab.observe("exit 5; the first run is equal")


def give_lease_to_another_machine(run: Started, clock_error: float = 0.0) -> None:
    """As that machine would have written it, with a clock that is so many seconds off."""
    path = run.folder / "lease.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "another", "host": "far", "key": "far"}))
    stamp = time.time() + clock_error
    os.utime(path, (stamp, stamp))


@pytest.mark.parametrize(
    "clock_error",
    cases(
        "waits 15 s for a sign of life, then takes over; equal",
        ("same-clock", "a job was lost with its machine; the run is resumed on another one: their clocks agree", 0),
        ("fast-clock", "a job was lost with its machine; the run is resumed on another one: an hour fast", 3600),
        ("slow-clock", "a job was lost with its machine; the run is resumed on another one: an hour slow", -3600),
    ),
)
def test_stale_lease(lab: Lab, clock_error: float) -> None:
    run = lab.begin_and_kill(10)
    give_lease_to_another_machine(run, clock_error)
    again = lab.begin(resume=run.folder)
    seconds = again.wait_for("resumed after step")
    again.require_said("was held by process")
    assert seconds > 14, f"it waited for {seconds:.0f} s only"
    again.finish_like(lab.undisturbed(*LOCAL))
    lab.observe(f"took over after {seconds:.0f} s; equal")


@pytest.mark.fault(
    "a job is frozen (SIGSTOP), another machine takes the lease, the job wakes up",
    "exits 5 within 10 s; no checkpoint, record or lease changes",
)
def test_lease_lost(lab: Lab) -> None:
    # As a laptop that sleeps, or a virtual machine that is paused.
    run = lab.begin(*LOCAL, "train.epochs=400", "checkpoint.every_steps=20")
    run.wait_for_step(20)
    time.sleep(0.3)  # until it is listed too
    run.process.send_signal(signal.SIGSTOP)
    give_lease_to_another_machine(run)
    before = content(run)
    run.process.send_signal(signal.SIGCONT)
    began = time.monotonic()
    run.fail(5, "was taken over by process")
    seconds = time.monotonic() - began
    assert seconds < 10, f"it took {seconds:.0f} s"
    assert content(run) == before, "it has changed what is in the folder"
    lab.observe(f"exit 5 after {seconds:.1f} s; nothing changed")


@pytest.mark.fault(
    "the driver of two Ray Train workers is frozen (SIGSTOP), another job takes over, the workers continue",
    "they stop before their next checkpoint; nothing changes but a checkpoint that was being written; the driver "
    "exits 5 when it wakes up",
)
def test_driver_frozen(lab: Lab) -> None:
    run = lab.begin("cluster.workers=2", "train.epochs=60", "checkpoint.every_steps=5")
    run.wait_for_step(12)
    run.process.send_signal(signal.SIGSTOP)
    give_lease_to_another_machine(run)
    time.sleep(1)  # which a checkpoint that was being written may still take
    before, reached = content(run), run.saved
    time.sleep(8)
    assert content(run) == before, f"the workers have listed step {run.saved} after {reached}"
    run.process.send_signal(signal.SIGCONT)
    began = time.monotonic()
    run.fail(5, "was taken over by process")
    assert content(run) == before, "the driver has changed what is in the folder"
    lab.observe(f"nothing changed; exit 5 {time.monotonic() - began:.1f} s after it woke up")


def content(run: Started) -> dict[str, tuple[int, int]]:
    """Size and time of each file that is listed, recorded or leased; what is being written beside does not count."""
    checkpoints = run.folder / "checkpoints"
    files = [run.folder / "lease.json", run.folder / "metrics.jsonl", checkpoints / "manifest.json"]
    for entry in manifest(run.folder)["checkpoints"]:
        files += (checkpoints / entry["name"]).iterdir()
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

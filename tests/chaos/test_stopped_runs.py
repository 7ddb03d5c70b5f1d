"""Runs that are told to stop, or whose machine goes away."""

import signal

import pytest
from chaos_lab import LOCAL, Lab, cases, require_same
from pyarrow import fs

RAY = ("cluster.workers=2",)
SLOW = ("checkpoint.every_steps=null", "train.global_batch_size=32", "data.limit=4000", "train.epochs=2")
"""So long that the signal comes within an epoch; no checkpoint is due there."""


@pytest.mark.parametrize(
    ("settings", "number"),
    cases(
        "saves, exits with the signal's code; resumes without repeating a step; equal",
        ("terminated-on-ray", "SIGTERM to the driver of two Ray Train workers", RAY, signal.SIGTERM),
        ("interrupted-on-ray", "Ctrl-C to the driver of two Ray Train workers", RAY, signal.SIGINT),
        ("terminated", "SIGTERM to one process", LOCAL, signal.SIGTERM),
    ),
)
def test_stopped(lab: Lab, settings: tuple[str, ...], number: int) -> None:
    run = lab.begin(*settings, *SLOW)
    run.wait_for("epoch   1/2")
    seconds = run.interrupt(number)
    run.require_said("stopped; the checkpoint of step")
    step = run.saved
    lab.begin(resume=run.folder).finish_like(lab.undisturbed(*settings, *SLOW), f"resumed after step {step}")
    lab.observe(f"exit {128 + number} {seconds:.1f} s after the signal, step {step} saved; equal")


@pytest.mark.fault("SIGTERM while it starts", "exits 143 at once; the same command can be started again")
def test_terminated_while_starting(lab: Lab) -> None:
    settings = (*RAY, "checkpoint.every_steps=null")
    run = lab.begin(*settings, name="run")
    run.wait_until(lambda: (run.folder / "env.json").exists(), "the run's folder")
    seconds = run.interrupt()
    lab.begin(*settings, name="run").finish_like(lab.undisturbed(*settings))
    lab.observe(f"ended {seconds:.1f} s after the signal; equal")


@pytest.mark.fault(
    "SIGTERM, then the run is resumed on another machine from object storage",
    "the checkpoint is on the object store when the command ends; equal",
)
def test_moved_to_another_machine(lab: Lab, s3: str) -> None:
    run = lab.begin(*LOCAL, *SLOW, name="moved", storage=s3 % "/chaos")
    run.wait_for("epoch   1/2")
    run.interrupt()
    again = lab.begin(resume=s3 % "/chaos/moved", name="moved")
    again.end(0, "resumed after step")
    store, path = fs.FileSystem.from_uri(s3 % "/chaos/moved")
    fs.copy_files(path, str(again.folder), source_filesystem=store, destination_filesystem=fs.LocalFileSystem())
    require_same(again.folder, lab.undisturbed(*LOCAL, *SLOW))
    lab.observe("equal")

"""Runs that last, and runs that are started again and again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import psutil

from densenet_dist.chaos.case import case
from densenet_dist.chaos.killed import kill_a_worker
from densenet_dist.chaos.lab import Lab, Observed, Started, expect

_GROUP: Final = "Soak"
_EPOCHS: Final = 200
_MIB: Final = 2**20


def _usage(process: psutil.Process) -> dict[str, float]:
    with process.oneshot():
        return {"MiB": process.memory_info().rss / _MIB, "files": process.num_fds(), "threads": process.num_threads()}


def _shared_memory() -> float:
    return sum(path.stat().st_size for path in Path("/dev/shm").iterdir() if path.is_file()) / _MIB


def _watch(run: Started, process: psutil.Process, *epochs: int) -> list[dict[str, float]]:
    found = []
    for epoch in epochs:
        run.wait_for(f"epoch {epoch:3d}/{_EPOCHS}", 400)
        found.append(_usage(process))
    return found


@case(
    _GROUP,
    f"{_EPOCHS} epochs in one process",
    "from epoch 50 to 190: memory grows by less than 10 %, files and threads not at all; TensorBoard under 1 MB",
)
def many_epochs(lab: Lab) -> Observed:
    """1,800 steps, 200 validations, 200 checkpoints."""
    run = lab.begin("cluster.engine=local", f"train.epochs={_EPOCHS}", "checkpoint.every_steps=null")
    early, late = _watch(run, psutil.Process(run.process.pid), 50, 190)
    expect(run.wait() == 0, run.text[-2000:])
    board = sum(path.stat().st_size for path in (run.folder / "tb").rglob("*") if path.is_file()) / _MIB
    expect(late["MiB"] < 1.1 * early["MiB"], f"memory grew from {early['MiB']:.0f} to {late['MiB']:.0f} MiB")
    expect(late["files"] <= early["files"] + 1, f"open files grew from {early['files']:.0f} to {late['files']:.0f}")
    expect(
        late["threads"] <= early["threads"] + 1, f"threads grew from {early['threads']:.0f} to {late['threads']:.0f}"
    )
    expect(board < 1, f"TensorBoard has {board:.1f} MiB")
    text = f"{early['MiB']:.0f} -> {late['MiB']:.0f} MiB, {early['files']:.0f} -> {late['files']:.0f} files, "
    return Observed(
        text + f"{early['threads']:.0f} -> {late['threads']:.0f} threads; TensorBoard {board:.2f} MiB", _EPOCHS
    )


@case(
    _GROUP,
    "20 restarts of the workers under one driver",
    "no process, file handle, thread or memory of the driver is left of each; no shared memory at the end",
)
def many_restarts(lab: Lab) -> Observed:
    """What the driver and its cluster hold after the 5th restart and after the 20th."""
    before = _shared_memory()
    run = lab.begin("cluster.workers=2", "cluster.max_failures=30", "train.epochs=20")
    driver = psutil.Process(run.process.pid)
    kill_a_worker(lab, run, 5, 40)
    early, early_count, early_shared = _usage(driver), _processes(driver), _shared_memory()
    for step in range(45, 165, 8):
        run.wait_for_step(step)
        killed = run.saved
        run.workers()[0].kill()
        run.wait_for_step(killed + 3)
    late, late_count, late_shared = _usage(driver), _processes(driver), _shared_memory()
    expect(run.wait() == 0, run.text[-2000:])
    time.sleep(2)
    left = _shared_memory() - before
    expect(late_count <= early_count + 2, f"processes grew from {early_count} to {late_count}")
    for what in ("files", "threads"):
        expect(late[what] <= early[what] + 8, f"the driver's {what} grew from {early[what]:.0f} to {late[what]:.0f}")
    expect(late["MiB"] < 1.15 * early["MiB"], f"its memory grew from {early['MiB']:.0f} to {late['MiB']:.0f} MiB")
    expect(late_shared < early_shared + 8, f"shared memory grew from {early_shared:.0f} to {late_shared:.0f} MiB")
    expect(left < 1, f"{left:.0f} MiB of shared memory are left")
    text = f"{early['MiB']:.0f} -> {late['MiB']:.0f} MiB, {early['files']:.0f} -> {late['files']:.0f} files, "
    text += f"{early['threads']:.0f} -> {late['threads']:.0f} threads, {early_count} -> {late_count} processes; "
    return Observed(text + f"{left:.0f} MiB of shared memory left", 20)


def _processes(driver: psutil.Process) -> int:
    return len(driver.children(recursive=True))

"""Runs that last, and runs that are restarted again and again."""

import time
from pathlib import Path

import psutil
import pytest
from chaos_lab import LOCAL, Lab, Started

MIB = 2**20


def usage(process: psutil.Process) -> dict[str, float]:
    return {
        "MiB": process.memory_info().rss / MIB,
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "processes": len(process.children(recursive=True)),
    }


def shared_memory() -> float:
    return sum(path.stat().st_size for path in Path("/dev/shm").iterdir() if path.is_file()) / MIB


def require_no_growth(early: dict[str, float], late: dict[str, float], memory: float, **allowed: int) -> str:
    """Memory may grow by a factor, everything else by the number that is allowed; says how much there was."""
    assert late["MiB"] < memory * early["MiB"], f"memory grew from {early['MiB']:.0f} to {late['MiB']:.0f} MiB"
    for what, more in allowed.items():
        assert late[what] <= early[what] + more, f"{what} grew from {early[what]:.0f} to {late[what]:.0f}"
    return ", ".join(f"{early[what]:.0f} -> {late[what]:.0f} {what}" for what in ("MiB", *allowed))


@pytest.mark.fault(
    "200 epochs in one process",
    "from epoch 50 to 190 memory grows by less than 10 %, files and threads not at all; TensorBoard under 1 MB",
)
def test_many_epochs(lab: Lab) -> None:
    # 1,800 steps, 200 validations, 200 checkpoints.
    run = lab.begin(*LOCAL, "train.epochs=200", "checkpoint.every_steps=null")
    process = psutil.Process(run.process.pid)
    run.wait_for("epoch  50/200", 400)
    early = usage(process)
    run.wait_for("epoch 190/200", 800)
    late = usage(process)
    run.end(0)
    found = require_no_growth(early, late, 1.1, files=1, threads=1)
    board = sum(path.stat().st_size for path in (run.folder / "tb").rglob("*") if path.is_file()) / MIB
    assert board < 1, f"TensorBoard has {board:.1f} MiB"
    lab.observe(f"{found}; TensorBoard {board:.2f} MiB", 200)


@pytest.mark.fault(
    "20 restarts of the workers under one driver",
    "the driver leaks no process, file handle, thread or memory; no shared memory is left",
)
def test_many_restarts(lab: Lab) -> None:
    before = shared_memory()
    run = lab.begin("cluster.workers=2", "cluster.max_failures=30", "train.epochs=20")
    driver = psutil.Process(run.process.pid)
    kill_workers(run, range(5, 45, 8))
    early, early_shared = usage(driver), shared_memory()
    kill_workers(run, range(45, 165, 8))
    late, late_shared = usage(driver), shared_memory()
    run.end(0)
    time.sleep(2)
    left = shared_memory() - before
    found = require_no_growth(early, late, 1.15, files=8, threads=8, processes=2)
    assert late_shared < early_shared + 8, f"shared memory grew from {early_shared:.0f} to {late_shared:.0f} MiB"
    assert left < 1, f"{left:.0f} MiB of shared memory are left"
    lab.observe(f"{found}; {left:.0f} MiB of shared memory left", 20)


def kill_workers(run: Started, steps: range) -> None:
    """Kill one at each of these steps, and wait for three new ones."""
    for step in steps:
        run.wait_for_step(step)
        killed_after = run.saved
        run.workers()[0].kill()
        run.wait_for_step(killed_after + 3)

"""Checkpoints that are torn, damaged or cannot be written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from densenet_dist.chaos.case import add, case
from densenet_dist.chaos.lab import STEPS, Lab, Observed, Started, expect, finish
from densenet_dist.run_folder import CHECKPOINTS_FOLDER

_GROUP: Final = "Checkpoints"
_LOCAL: Final = ("cluster.engine=local",)
_WRITER: Final = """
import sys, torch
from densenet_dist.train.checkpoint import CheckpointStore, Position, Snapshot
from densenet_dist.run_folder import RunFolder
store = CheckpointStore(RunFolder(sys.argv[1], "run"), keep=2)
begin = max((entry.position.global_step for entry in store.entries), default=0)
print("ready", flush=True)
for step in range(begin + 1, 10**6):
    weights = {"w": torch.full((1_000_000,), float(step)), "v": torch.full((7,), float(step))}
    store.save(Snapshot(weights, None, {"step": step, "more": torch.full((200_000,), float(step))},
                        Position(0, step, step), {"val/top1": (step % 7) / 7}))
"""


@case(
    _GROUP,
    "SIGKILL at 50 random moments while checkpoints of 5 MB are written one after the other",
    "the newest one listed is whole and of one step; nothing half-written is ever taken up",
)
def killed_while_writing(lab: Lab) -> Observed:
    """One folder throughout, so that what a kill leaves behind meets the next start."""
    from densenet_dist.run_folder import RunFolder
    from densenet_dist.train.checkpoint import CheckpointStore

    folder = lab.folder / lab.name("writes")
    folder.mkdir()
    reached = 0
    for _ in range(50):
        command = [sys.executable, "-c", _WRITER, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        expect(process.stdout.readline() == "ready\n", "the writer did not start")
        time.sleep(lab.random.uniform(0.0, 0.25))
        process.kill()
        process.wait()
        process.stdout.close()
        store = CheckpointStore(RunFolder(str(folder), "run"))
        snapshot = store.load_latest()
        expect(not store.damaged, f"a damaged checkpoint was listed: {store.damaged}")
        if snapshot is not None:
            step = snapshot.position.global_step
            values = {
                float(value)
                for tensor in (*snapshot.model.values(), snapshot.state["more"])
                for value in tensor.unique()
            }
            expect(values == {float(step)} and step >= reached, f"step {step} holds {values}")
            reached = step
    expect(reached > 50, f"only {reached} checkpoints were written")
    return Observed(f"whole every time; {reached} checkpoints were written", 50)


def _killed_run(lab: Lab) -> Started:
    """A run that was killed with several whole checkpoints in its folder."""
    run = lab.begin(*_LOCAL, "checkpoint.keep=4")
    run.wait_for_step(20)
    run.kill_all()
    return run


def damaged(damage: Callable[[Path], None], lab: Lab) -> Observed:
    """Damage the newest checkpoint of a killed run, then resume it."""
    run = _killed_run(lab)
    manifest = json.loads((run.folder / CHECKPOINTS_FOLDER / "manifest.json").read_text())
    newest, before = manifest["checkpoints"][-1]["name"], manifest["checkpoints"][-2]["name"]
    damage(run.folder / CHECKPOINTS_FOLDER / newest)
    again = lab.begin(resume=run.folder)
    finish(again, lab.undisturbed(*_LOCAL, "checkpoint.keep=4"))
    notes = [line for line in again.text.splitlines() if newest in line and "left out" in line]
    expect(bool(notes), f"it did not say that {newest} is damaged:\n{again.text}")
    expect(f"resumed after step {int(before[5:])}" in again.text, f"it did not go on from {before}:\n{again.text}")
    return Observed("said, the one before is used; equal", 1)


def _flip(name: str, folder: Path) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    (folder / name).write_bytes(content)


def _truncate(name: str, folder: Path) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate((folder / name).stat().st_size // 2)


def _remove(name: str, folder: Path) -> None:
    (folder / name).unlink()


_SAID: Final = "found by its checksum and said; the checkpoint before it is used; equal bit for bit"
for _name, _fault, _damage in (
    ("weights-flipped", "one bit of the newest weights is flipped", partial(_flip, "model.safetensors")),
    ("average-flipped", "one bit of the newest averaged weights is flipped", partial(_flip, "ema.safetensors")),
    ("state-flipped", "one bit of the newest optimizer state is flipped", partial(_flip, "state.pt")),
    ("weights-truncated", "the newest weights are cut in half", partial(_truncate, "model.safetensors")),
    ("state-removed", "the newest optimizer state is gone", partial(_remove, "state.pt")),
    ("folder-removed", "the newest checkpoint is gone altogether", shutil.rmtree),
):
    add(_name, _GROUP, _fault, _SAID, partial(damaged, _damage))


@case(
    _GROUP,
    "the list of checkpoints is cut in half",
    "said, and made anew from the checkpoints there are; equal bit for bit",
)
def manifest_torn(lab: Lab) -> Observed:
    """It is replaced as a whole, so that only a broken disk or a person can do this."""
    run = _killed_run(lab)
    manifest = run.folder / CHECKPOINTS_FOLDER / "manifest.json"
    content = manifest.read_bytes()
    manifest.write_bytes(content[: len(content) // 2])
    again = lab.begin(resume=run.folder)
    finish(again, lab.undisturbed(*_LOCAL, "checkpoint.keep=4"))
    expect("it is made anew" in again.text, again.text)
    return Observed("said; equal")


@case(
    _GROUP,
    "the disk is full when a checkpoint is written (a limit on file sizes)",
    "exit 5, the checkpoints before are whole; resumed with room again, equal bit for bit",
)
def disk_full(lab: Lab) -> Observed:
    """The limit is set from outside while it trains: the next write fails as on a full disk."""
    run = lab.begin(*_LOCAL)
    run.wait_for_step(10)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    code = run.wait()
    expect(code == 5, f"exit code {code}:\n{run.text[-2000:]}")
    expect("make room" in run.text or "cannot be written" in run.text, run.text[-2000:])
    saved = run.saved
    again = lab.begin(resume=run.folder)
    finish(again, lab.undisturbed(*_LOCAL))
    expect(f"resumed after step {saved}" in again.text, again.text)
    return Observed(f"exit 5, step {saved} is whole; then equal")


@case(_GROUP, "the run's folder cannot be written", "exit 5 before any data is read or any step is taken")
def storage_read_only(lab: Lab) -> Observed:
    """A folder of the kernel's, in which not even root can make one."""
    run = lab.begin(*_LOCAL, storage="/proc/runs")
    code = run.wait()
    expect(code == 5 and "/proc/runs" in run.text, f"exit code {code}:\n{run.text}")
    expect("images a step" not in run.text, "it began to train")
    return Observed("exit 5 at once")


@case(_GROUP, f"{STEPS} checkpoints are written with checkpoint.keep=3", "the last three are kept, and the best one")
def rotation(lab: Lab) -> Observed:
    """Six of them, at the ends of epochs, are judged."""
    run = lab.begin(*_LOCAL, "checkpoint.keep=3")
    expect(run.wait() == 0, run.text)
    manifest = json.loads((run.folder / CHECKPOINTS_FOLDER / "manifest.json").read_text())
    names = {entry["name"] for entry in manifest["checkpoints"]}
    there = {path.name for path in (run.folder / CHECKPOINTS_FOLDER).iterdir()} - {"manifest.json"}
    last = {f"step-{step:08d}" for step in range(STEPS - 2, STEPS + 1)}
    expect(names == there == last | {manifest["best"]}, f"there are {sorted(there)}, listed are {sorted(names)}")
    return Observed("so it is")


@case(
    _GROUP,
    "the driver is killed, and every file that Ray itself keeps of the run is emptied",
    "Ray's files are of no account: resumed, equal bit for bit",
)
def ray_state_torn(lab: Lab) -> Observed:
    """Ray writes its snapshot in place; a torn one would block every later start of the same name."""
    settings = ("cluster.workers=2",)
    run = lab.begin(*settings)
    run.wait_for_step(20)
    run.kill_all()
    files = [path for path in (run.folder / "ray").rglob("*") if path.is_file()]
    expect(any(path.suffix == ".json" for path in files), f"Ray keeps nothing: {files}")
    for path in files:
        os.truncate(path, 0)
    finish(lab.begin(resume=run.folder), lab.undisturbed(*settings))
    return Observed(f"equal; {len(files)} files emptied", len(files))


@case(
    _GROUP,
    "20 checkpoints of the notebook's net, 3.5 million parameters",
    "training stands still for less than 50 ms each",
)
def cost(lab: Lab) -> Observed:
    """The notebook's net, 3.5 million parameters, on this machine's CPU: what saving costs its steps."""
    from densenet_dist.chaos.pauses import pauses

    found = pauses(lab.folder / lab.name("pauses"))
    worst = max(found)
    expect(worst < 0.05, f"a pause of {worst * 1000:.0f} ms")
    text = f"{sorted(found)[len(found) // 2] * 1000:.0f} ms (median), {worst * 1000:.0f} ms at most"
    return Observed(text, len(found), {"ms that a step pauses for a checkpoint": [pause * 1000 for pause in found]})


@case(
    _GROUP,
    "three minutes of training the notebook's net with checkpoint.every_steps=auto, the default",
    "checkpoints cost less than 1 % of the time, pauses and writing together",
)
def cost_of_auto(lab: Lab) -> Observed:
    """A checkpoint every 30 s, unless that were too dear."""
    from densenet_dist.chaos.pauses import share_of_auto

    share, number = share_of_auto(lab.folder / lab.name("auto"), 180)
    expect(number >= 3, f"only {number} checkpoints were written")
    expect(share < 0.01, f"{share:.2%} of the time")
    return Observed(f"{share:.2%} for {number} checkpoints", number)

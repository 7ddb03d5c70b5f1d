"""Checkpoints that are torn, damaged or cannot be written, and what they cost."""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from chaos_lab import LOCAL, STEPS, Lab, cases, manifest
from runs import run_of, trainer_of

from densenet_dist.config import load_config
from densenet_dist.run_folder import RunFolder
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.loop import save_or_stop, train_step
from densenet_dist.train.state import take_snapshot
from densenet_dist.train.trainer import Trainer

WRITER = """
import sys, torch
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.snapshot import Position, Snapshot
from densenet_dist.run_folder import RunFolder
store = CheckpointStore(RunFolder(sys.argv[1], "run"), keep=2)
begin = max((entry.position.global_step for entry in store.entries), default=0)
print("ready", flush=True)
for step in range(begin + 1, 10**6):
    weights = {"w": torch.full((1_000_000,), float(step)), "v": torch.full((7,), float(step))}
    snapshot = Snapshot(weights, None, {"step": step, "more": torch.full((200_000,), float(step))},
                        Position(0, step, step), {"val/top1": (step % 7) / 7})
    store.save(snapshot)
    store.wait()
"""


@pytest.mark.fault(
    "SIGKILL at 50 random moments while 5 MB checkpoints are written",
    "the newest listed checkpoint is complete and of one step",
)
def test_killed_while_writing(lab: Lab) -> None:
    reached = 0
    for _ in range(50):
        command = [sys.executable, "-c", WRITER, str(lab.folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n", "the writer did not start"
            time.sleep(lab.random.uniform(0.0, 0.25))
            process.kill()
        store = CheckpointStore(RunFolder(str(lab.folder), "run"))
        snapshot = store.load_latest()
        assert not store.damaged, f"a damaged checkpoint was listed: {store.damaged}"
        if snapshot is not None:
            step = snapshot.position.global_step
            tensors = (*snapshot.model.values(), snapshot.state["more"])
            values = {float(value) for tensor in tensors for value in tensor.unique()}
            assert values == {float(step)}, f"step {step} holds {values}"
            assert step >= reached, f"step {step} is older than {reached}"
            reached = step
    assert reached > 50, f"only {reached} checkpoints were written"
    lab.observe(f"complete every time; {reached} checkpoints were written", 50)


def flip(name: str, checkpoint: Path) -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    (checkpoint / name).write_bytes(content)


def truncate(name: str, checkpoint: Path) -> None:
    os.truncate(checkpoint / name, (checkpoint / name).stat().st_size // 2)


def remove(name: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()


DAMAGES = (
    ("weights-flipped", "a bit of the weights is flipped", partial(flip, "model.safetensors")),
    ("average-flipped", "a bit of the averaged weights", partial(flip, "ema.safetensors")),
    ("state-flipped", "a bit of the optimizer state", partial(flip, "state.pt")),
    ("weights-truncated", "the weights are cut in half", partial(truncate, "model.safetensors")),
    ("state-removed", "the optimizer state is deleted", partial(remove, "state.pt")),
    ("folder-removed", "all of it is deleted", shutil.rmtree),
)


@pytest.mark.parametrize(
    "damage",
    cases(
        "reported; resumes from the checkpoint before it; equal",
        *((name, f"damage to the newest checkpoint: {what}", damage) for name, what, damage in DAMAGES),
    ),
)
def test_damaged_checkpoint(lab: Lab, damage: Callable[[Path], None]) -> None:
    run = lab.begin_and_kill(20, "checkpoint.keep=4")
    before, newest = (entry["name"] for entry in manifest(run.folder)["checkpoints"][-2:])
    damage(run.folder / "checkpoints" / newest)
    again = lab.begin(resume=run.folder)
    resumed = f"resumed after step {int(before.removeprefix('step-'))}"
    again.finish_like(lab.undisturbed(*LOCAL, "checkpoint.keep=4"), resumed)
    notes = [line for line in again.text.splitlines() if newest in line and "skipped" in line]
    assert notes, f"it did not say that {newest} is damaged:{again.end_of_text}"
    lab.observe("reported; equal")


@pytest.mark.fault("manifest.json is cut in half", "reported, and rebuilt; equal")
def test_manifest_torn(lab: Lab) -> None:
    run = lab.begin_and_kill(20, "checkpoint.keep=4")
    truncate("manifest.json", run.folder / "checkpoints")
    lab.begin(resume=run.folder).finish_like(lab.undisturbed(*LOCAL, "checkpoint.keep=4"), "; rebuilt from")
    lab.observe("reported; equal")


@pytest.mark.fault(
    "the disk is full when a checkpoint is written (a limit on file sizes)",
    "exit 5; earlier checkpoints stay complete; resumes once there is room; equal",
)
def test_disk_full(lab: Lab) -> None:
    run = lab.begin(*LOCAL)
    run.wait_for_step(10)
    # Set from outside while it trains: the next write fails as on a full disk.
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    run.fail(5)
    assert "make room" in run.text or "cannot be written" in run.text, run.end_of_text
    saved = run.saved
    lab.begin(resume=run.folder).finish_like(lab.undisturbed(*LOCAL), f"resumed after step {saved}")
    lab.observe(f"exit 5, step {saved} is complete; equal")


@pytest.mark.fault("the run folder is not writable", "exit 5 before data is read")
def test_storage_read_only(lab: Lab) -> None:
    run = lab.begin(*LOCAL, storage="/proc/runs")  # in /proc not even root can make a folder
    run.fail(5, "/proc/runs")
    assert "global batch size" not in run.text, "it began to train"
    lab.observe("exit 5 at once")


@pytest.mark.fault(f"{STEPS} checkpoints are written with checkpoint.keep=3", "the last three and the best are kept")
def test_rotation(lab: Lab) -> None:
    run = lab.begin(*LOCAL, "checkpoint.keep=3")
    run.end(0)
    listed = manifest(run.folder)
    names = {entry["name"] for entry in listed["checkpoints"]}
    there = {path.name for path in (run.folder / "checkpoints").iterdir()} - {"manifest.json"}
    last = {f"step-{step:08d}" for step in range(STEPS - 2, STEPS + 1)}
    assert names == there == last | {listed["best"]}, f"there are {sorted(there)}, listed are {sorted(names)}"
    lab.observe("kept")


@pytest.mark.fault("the driver is killed, and all files that Ray keeps of the run are emptied", "resumes; equal")
def test_ray_state_torn(lab: Lab) -> None:
    run = lab.begin("cluster.workers=2")
    run.wait_for_step(20)
    run.kill_all()
    files = [path for path in (run.folder / "ray").rglob("*") if path.is_file()]
    assert files
    for path in files:
        os.truncate(path, 0)
    lab.begin(resume=run.folder).finish_like(lab.undisturbed("cluster.workers=2"))
    lab.observe(f"equal; {len(files)} files emptied", len(files))


def notebook_job(lab: Lab) -> Trainer:
    """A trainer with the notebook's model of 3.5 million parameters, on this machine's CPU."""
    settings = ("name=cost", f"storage={lab.folder}", "model.variant=notebook", "data.name=shapes", "data.limit=8000")
    config = load_config(*settings, "train.global_batch_size=16", "data.loader=torch", "data.val_fraction=0")
    run_of(config).create()
    return trainer_of(config)


@pytest.mark.fault(
    "20 checkpoints of the notebook network (3.5 million parameters)", "training pauses for less than 50 ms each"
)
def test_cost(lab: Lab) -> None:
    trainer = notebook_job(lab)
    train_step(trainer, next(iter(trainer.train_loader.epoch(0))))  # so that there are moments of the gradients too
    pauses = []
    for _ in range(20):
        began = time.perf_counter()
        trainer.store.save(take_snapshot(trainer))
        pauses.append(1000 * (time.perf_counter() - began))
        trainer.store.wait()  # as with every_steps=auto, there is time to write between two of them
    trainer.store.close()
    assert max(pauses) < 50, f"a pause of {max(pauses):.0f} ms"
    lab.observe(f"{sorted(pauses)[10]:.0f} ms (median), {max(pauses):.0f} ms at most", 20)


@pytest.mark.fault(
    "three minutes of training the notebook network with checkpoint.every_steps=auto",
    "checkpoints take less than 1 % of the time",
)
def test_cost_of_auto(lab: Lab) -> None:
    trainer = notebook_job(lab)
    began = time.perf_counter()
    for batch in trainer.train_loader.epoch(0):
        train_step(trainer, batch)
        save_or_stop(trainer)
        if time.perf_counter() - began > 180:
            break
    trainer.store.wait()
    share, saved = trainer.store.total_cost_s / (time.perf_counter() - began), trainer.context.status.saved
    trainer.store.close()
    assert saved >= 3, f"only {saved} checkpoints were written"
    assert share < 0.01, f"{share:.2%} of the time"
    lab.observe(f"{share:.2%} for {saved} checkpoints", saved)

"""Two jobs on one folder, and checkpoints that belong to another run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Final

from densenet_dist.chaos.case import add, case
from densenet_dist.chaos.lab import Lab, Observed, Started, expect, finish, write_pictures

_LEASES: Final = "Two jobs on one folder"
_OTHERS: Final = "Another run's checkpoint, other settings"
_LOCAL: Final = ("cluster.engine=local",)
_LONG: Final = (*_LOCAL, "train.epochs=400", "checkpoint.every_steps=20")


def _refused(run: Started, code: int, *words: str) -> None:
    found = run.wait()
    expect(found == code, f"exit code {found}, not {code}:\n{run.text[-2000:]}")
    for text in words:
        expect(text in run.text, f"it does not say {text!r}:\n{run.text[-2000:]}")


@case(
    _LEASES,
    "a second job resumes a run that is being trained",
    "refused with exit 5, naming the first; that one goes on",
)
def second_job(lab: Lab) -> Observed:
    """On the same machine."""
    first = lab.begin(*_LOCAL, "train.epochs=12")
    first.wait_for_step(5)
    _refused(lab.begin(resume=first.folder), 5, f"is in use by process {first.process.pid}")
    finish(first, lab.undisturbed(*_LOCAL, "train.epochs=12"))
    return Observed("refused; the first run is equal")


def _held_elsewhere(run: Started, hours: float = 0.0) -> None:
    """Make the lease that a killed job left one of another machine, stamped by a clock that is so far off."""
    path = run.folder / "lease.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "another", "host": "far", "key": "far"}))
    stamp = time.time() + hours * 3600
    os.utime(path, (stamp, stamp))


def stale(hours: float, lab: Lab) -> Observed:
    """A job of another machine that is dead, as far as anybody can see."""
    run = lab.begin(*_LOCAL)
    run.wait_for_step(10)
    run.kill_all()
    _held_elsewhere(run, hours)
    again = lab.begin(resume=run.folder)
    seconds = again.wait_for("resumed after step")
    expect("was held by process" in again.text and seconds > 14, f"it did not wait:\n{again.text}")
    finish(again, lab.undisturbed(*_LOCAL))
    return Observed(f"waited, went on after {seconds:.0f} s; equal")


for _name, _hours, _clock in (
    ("stale-lease", 0.0, ""),
    ("stale-lease-fast-clock", 1.0, ", its clock an hour fast"),
    ("stale-lease-slow-clock", -1.0, ", its clock an hour slow"),
):
    add(
        _name,
        _LEASES,
        f"a job on another machine was lost with it{_clock}; resumed here",
        "waits 15 s for a sign of life, then takes the folder over; equal bit for bit",
        partial(stale, _hours),
    )


@case(
    _LEASES,
    "a job is frozen (SIGSTOP), its lease becomes that of another machine, and it wakes up",
    "finds out within 10 s, exits 5; not one checkpoint, record or lease in the folder changes",
)
def lease_lost(lab: Lab) -> Observed:
    """As a laptop that sleeps, or a virtual machine that is paused."""
    run = lab.begin(*_LONG)
    run.wait_for_step(20)
    time.sleep(0.3)  # until it is listed too
    run.send(signal.SIGSTOP)
    _held_elsewhere(run)
    before = _content(run)
    run.send(signal.SIGCONT)
    began = time.monotonic()
    _refused(run, 5, "was taken over by process")
    seconds = time.monotonic() - began
    expect(seconds < 10, f"it took {seconds:.0f} s")
    expect(_content(run) == before, "it has changed what is in the folder")
    return Observed(f"exit 5 after {seconds:.1f} s; nothing has changed")


@case(
    _LEASES,
    "the driver of two Ray Train workers is frozen (SIGSTOP), another job takes the folder over, the workers go on",
    "they find out before their next checkpoint: but for one that was being written, no checkpoint, record or lease in "
    "the folder changes; woken up, the driver exits 5",
)
def driver_frozen(lab: Lab) -> Observed:
    """Workers have no lease of their own."""
    run = lab.begin("cluster.workers=2", "train.epochs=60", "checkpoint.every_steps=5")
    run.wait_for_step(12)
    run.send(signal.SIGSTOP)
    _held_elsewhere(run)
    time.sleep(1)  # which a checkpoint that was being written may still take
    before, reached = _content(run), run.saved
    time.sleep(8)
    expect(_content(run) == before, f"the workers have listed step {run.saved} after {reached}")
    run.send(signal.SIGCONT)
    began = time.monotonic()
    _refused(run, 5, "was taken over by process")
    expect(_content(run) == before, "the driver has changed what is in the folder")
    return Observed(f"nothing has changed; exit 5 {time.monotonic() - began:.1f} s after it woke up")


def _content(run: Started) -> dict[str, tuple[int, int]]:
    """What is listed, recorded and held there: size and time of each file. What is written beside does not count."""
    checkpoints = run.folder / "checkpoints"
    kept = [run.folder / "lease.json", run.folder / "metrics.jsonl", checkpoints / "manifest.json"]
    for entry in json.loads(kept[-1].read_text())["checkpoints"]:
        kept += (checkpoints / entry["name"]).iterdir()
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in kept}


def _killed(lab: Lab, step: int = 13) -> Started:
    run = lab.begin(*_LOCAL)
    run.wait_for_step(step)
    run.kill_all()
    return run


def edited(change: tuple[str, str], words: tuple[str, ...], lab: Lab) -> Observed:
    """Change a killed run's own config.yaml, then resume it."""
    run = _killed(lab)
    config = run.folder / "config.yaml"
    content = config.read_text()
    expect(change[0] in content, f"config.yaml has no {change[0]!r}")
    config.write_text(content.replace(*change))
    _refused(lab.begin(resume=run.folder), 6, *words)
    config.write_text(content)
    finish(lab.begin(resume=run.folder), lab.undisturbed(*_LOCAL))
    return Observed("exit 6; with its own config.yaml, equal")


for _name, _what, _change, _words in (
    ("another-model", "another model's", ("growth_rate: 4", "growth_rate: 6"), ("model.growth_rate: 4 there, 6 here",)),
    (
        "another-split",
        "another split's",
        ("val_fraction: 0.1", "val_fraction: 0.2"),
        ("data.val_fraction: 0.1 there, 0.2",),
    ),
    (
        "another-batch-size",
        "another batch size's",
        ("global_batch_size: 64", "global_batch_size: 32"),
        ("train.global_batch_size: 64 there, 32 here",),
    ),
    ("another-seed", "another seed's", ("seed: 0", "seed: 1"), ("seed: 0 there, 1 here",)),
):
    add(
        _name,
        _OTHERS,
        f"the checkpoint is {_what}",
        "refused with exit 6, the difference shown, before any step",
        partial(edited, _change, _words),
    )


@case(
    _OTHERS,
    "the checkpoint is of pictures of two classes, the folder has three by now",
    "refused with exit 6, the difference shown, before any step",
)
def another_data_set(lab: Lab) -> Observed:
    """data.root may change; what is there may not."""
    pictures = lab.folder / lab.name("pictures")
    write_pictures(pictures, ("one", "two"))
    settings = ("data.name=folder", f"data.root={pictures}", "data.image_size=32", "data.limit=null")
    run = lab.begin(*_LOCAL, *settings, "train.global_batch_size=16")
    run.wait_for_step(8)
    run.kill_all()
    write_pictures(pictures, ("three",))
    _refused(lab.begin(resume=run.folder), 6, "classes: 2 there, 3 here")
    return Observed("exit 6")


@case(
    _OTHERS,
    "--resume with another learning rate and another number of workers",
    "exit 2: says which of them it may change",
)
def settings_refused(lab: Lab) -> Observed:
    """Nothing of the run is touched."""
    run = _killed(lab)
    again = lab.begin("train.lr=0.1", "cluster.cpus_per_worker=1", resume=run.folder)
    words = ("a resumed run cannot change:", "train.lr: 0.05 -> 0.1", "it may change:", "cluster.cpus_per_worker")
    _refused(again, 2, *words)
    return Observed("exit 2, both lists shown")


@case(_OTHERS, "--resume with settings that it may change", "they are shown; equal bit for bit")
def settings_allowed(lab: Lab) -> Observed:
    """How often it saves, and how many batches it prepares ahead."""
    run = _killed(lab)
    again = lab.begin("checkpoint.every_steps=5", "data.prefetch=3", resume=run.folder)
    finish(again, lab.undisturbed(*_LOCAL))
    for text in ("checkpoint.every_steps: 1 -> 5", "data.prefetch: 1 -> 3"):
        expect(text in again.text, f"it does not say {text!r}:\n{again.text}")
    return Observed("shown; equal")


@case(
    _OTHERS,
    "a run's folder is copied elsewhere under another name, and resumed there",
    "goes on there; equal bit for bit",
)
def folder_moved(lab: Lab) -> Observed:
    """Nothing in it holds its own path."""
    run = _killed(lab)
    there: Path = lab.folder / "elsewhere" / lab.name("moved")
    there.parent.mkdir(exist_ok=True)
    shutil.copytree(run.folder, there)
    again = lab.begin(resume=there)
    again.folder = there
    finish(again, lab.undisturbed(*_LOCAL))
    return Observed("equal")

"""Processes that are killed, one or all, and nodes that are lost."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from densenet_dist.chaos.case import add, case
from densenet_dist.chaos.lab import (
    STEPS,
    Lab,
    Observed,
    Started,
    expect,
    finish,
    goodput,
    interrupt,
    records,
    steps_again,
)
from densenet_dist.train.steps_taken import STEPS_FILE

_GROUP: Final = "Killed"
_SAME: Final = "goes on; final weights, metrics and TensorBoard are those of the undisturbed run, bit for bit"
_RAY: Final = ("cluster.workers=2", "cluster.max_failures=30")
_LOCAL: Final = ("cluster.engine=local",)
_VARIANTS: Final = {
    "bf16, sgd": ("train.precision=bf16",),
    "fp16 and its loss scale, adam": ("train.precision=fp16", "train.optimizer.name=adam", "train.lr=0.003"),
    "fp32, adamw, clipped gradients, parts": (
        *("train.optimizer.name=adamw", "train.lr=0.003", "train.clip_grad_norm=0.5", "train.grad_accum_steps=2"),
    ),
    "dropout, moving average, label smoothing": (
        *("model.drop_rate=0.3", "train.ema_decay=0.95", "train.label_smoothing=0.1"),
    ),
    "mixup, cutmix, TrivialAugment": ("data.mixup=1", "data.cutmix=1", "data.trivial_augment=true"),
    "constant schedule": ("train.schedule.name=constant",),
    "step schedule": ("train.schedule.name=multistep", "train.schedule.milestones=[2,4]"),
    "cosine schedule with warm-up": ("train.schedule.name=cosine", "train.schedule.warmup_epochs=1.5"),
    "one-cycle schedule": ("train.schedule.name=one_cycle",),
    "plateau schedule and early stopping": (
        *("train.schedule.name=plateau", "train.schedule.patience=1", "train.schedule.min_delta=0.05"),
        *("train.early_stopping.enabled=true", "train.early_stopping.patience=3"),
    ),
}


def kill_a_worker(lab: Lab, run: Started, times: int, last: int) -> dict[str, list[float]]:
    """Kill one worker so often, at random steps up to `last`; seconds until the next new step."""
    seconds = []
    for step in sorted(lab.random.sample(range(2, last), times)):
        run.wait_for_step(max(step, run.saved))
        victims = run.workers()
        expect(bool(victims), f"there is no worker to kill:\n{run.text[-2000:]}")
        killed_after = run.saved
        lab.random.choice(victims).kill()
        began = time.monotonic()
        run.wait_for_step(killed_after + 3)  # one may have been on its way
        seconds.append(time.monotonic() - began)
    return {"seconds from kill to new step": seconds}


@case(
    _GROUP, "SIGKILL of a random one of two Ray Train workers at 20 random steps", f"Ray restarts both; the run {_SAME}"
)
def worker_killed(lab: Lab) -> Observed:
    """One run of 180 steps."""
    settings = (*_RAY, "train.epochs=20")
    run = lab.begin(*settings)
    figures = kill_a_worker(lab, run, 20, 165)
    like = lab.undisturbed(*settings)
    finish(run, like)
    again = steps_again(run)
    figures["steps taken again, a checkpoint after each"] = again + [0.0] * (20 - len(again))
    median = sorted(figures["seconds from kill to new step"])[10]
    found, best = goodput(run.folder), goodput(like)
    expect(found["lost_to_recovery"] > 0.1, f"20 recoveries are not counted: {found}")
    expect(found["steps_again"] == sum(again), f"steps again: {again} were told, {found['steps_again']} recorded")
    text = f"equal after {median:.1f} s of recovery each (median); goodput {found['ratio']:.1%}, "
    text += f"{found['lost_to_recovery']:.1%} lost to recovery (undisturbed: {best['ratio']:.1%} and 0)"
    return Observed(text, 20, figures)


_EVERY: Final = 20


@case(
    _GROUP,
    f"SIGKILL of every process at 12 random steps, checkpoint.every_steps={_EVERY}; resumed each time",
    f"at most {_EVERY} steps are taken again, and those that pass while a checkpoint is written (here up to 5); equal "
    "bit for bit",
)
def steps_lost(lab: Lab) -> Observed:
    """The run itself counts; one that is killed before its first checkpoint begins anew."""
    settings = (*_LOCAL, f"checkpoint.every_steps={_EVERY}", "train.epochs=24", "data.limit=1280")
    run = lab.begin(*settings)
    again: list[float] = []
    for step in sorted(lab.random.sample(range(5, 420), 12)):
        run.wait_until(partial(_has_taken, run, step), f"step {step}")
        run.kill_all()
        run = lab.begin(resume=run.folder)
        run.wait_for("resumed after step" if run.saved else "taken again")
        again += steps_again(run) or [0.0]
    finish(run, lab.undisturbed(*settings))
    expect(max(again) <= _EVERY + 5, f"{max(again):.0f} steps were taken again")
    expect(goodput(run.folder)["steps_again"] == sum(again), "the run has counted otherwise")
    text = f"{sorted(again)[6]:.0f} steps (median), {max(again):.0f} at most; equal"
    return Observed(text, 12, {f"steps taken again, a checkpoint every {_EVERY}": again})


def _has_taken(run: Started, step: int) -> bool:
    with suppress(FileNotFoundError, IndexError):
        return int((run.folder / STEPS_FILE).read_text().split()[0]) >= step
    return False


@case(_GROUP, "SIGKILL of the driver alone, at a random step; resumed at once", _SAME)
def driver_killed(lab: Lab) -> Observed:
    """Its workers may still live when the next ones start."""
    for _ in range(3):
        run = lab.begin(*_RAY)
        run.wait_for_step(lab.random.randrange(2, STEPS - 6))
        run.send(signal.SIGKILL)
        run.process.wait()
        finish(lab.begin(resume=run.folder), lab.undisturbed(*_RAY))
    return Observed("equal", 3)


@case(_GROUP, "SIGKILL of every process at once, as in a power cut; resumed", _SAME)
def everything_killed(lab: Lab) -> Observed:
    """Also twice in one run."""
    run = lab.begin(*_RAY)
    for _ in range(2):
        run.wait_for_step(min(run.saved + lab.random.randrange(3, 20), STEPS - 6))
        run.kill_all()
        run = lab.begin(resume=run.folder)
    finish(run, lab.undisturbed(*_RAY))
    return Observed("equal", 2)


def process_killed(settings: tuple[str, ...], lab: Lab) -> Observed:
    """One process, killed twice at random steps and resumed."""
    settings = (*_LOCAL, *settings)
    run = lab.begin(*settings)
    for low, high in ((2, 15), (20, 32)):
        run.wait_for_step(lab.random.randrange(low, high))
        run.kill_all()
        run = lab.begin(resume=run.folder)
    finish(run, lab.undisturbed(*settings))
    return Observed("equal", 2)


for _name, _settings in _VARIANTS.items():
    add(
        f"process-killed-{_name.split(',')[0].split(' ')[0].lower()}",
        _GROUP,
        f"SIGKILL at two random steps, resumed: {_name}",
        _SAME,
        partial(process_killed, _settings),
    )


@case(
    _GROUP,
    "two ranks stopped at a random step, resumed as one, stopped, resumed as three (SyncBN)",
    "the same global batches: every epoch's loss within 1e-5 of the undisturbed run's",
)
def world_size_changed(lab: Lab) -> Observed:
    """Ranks of torchrun, so that three have room on any machine; without dropout, whose masks belong to ranks.

    At a high learning rate training itself makes differences of rounding grow.
    """
    settings = (*_LOCAL, "train.sync_bn=true", "model.drop_rate=0", "train.lr=0.005")
    like = _ranks(lab, 2, *settings)
    expect(like.wait() == 0, like.text[-2000:])
    run = _ranks(lab, 2, *settings)
    run.wait_for_step(14)
    run.kill_all()
    run = lab.begin(resume=run.folder)
    run.wait_for_step(33)
    interrupt(run)
    run = _ranks(lab, 3, resume=run.folder)
    expect(run.wait() == 0, run.text[-2000:])
    pairs = list(zip(records(run.folder), records(like.folder), strict=True))
    worst = max(abs(one[key] - other[key]) for one, other in pairs for key in one if key.endswith("/loss"))
    expect(worst < 1e-5, f"losses differ by {worst:.1e}")
    return Observed(f"losses differ by {worst:.0e} at most", 2)


def _ranks(lab: Lab, number: int, *settings: str, resume: Path | None = None) -> Started:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    environment = {"OMP_NUM_THREADS": "1"}
    return lab.begin(*settings, resume=resume, launcher=launcher, environment=environment)

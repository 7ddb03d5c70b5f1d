"""Processes that are killed, one or all."""

import signal
import time

import pytest
from chaos_lab import LOCAL, STEPS, Lab, cases, largest_difference_of_losses

from densenet_dist.run_folder import open_run

SAME = "resumes; equal"
RAY = ("cluster.workers=2", "cluster.max_failures=30")


@pytest.mark.fault("SIGKILL of a random one of two Ray Train workers at 20 random steps", "Ray restarts both; equal")
def test_worker_killed(lab: Lab) -> None:
    settings = (*RAY, "train.epochs=20")
    run = lab.begin(*settings)
    seconds = []
    for step in sorted(lab.random.sample(range(2, 165), 20)):
        run.wait_for_step(max(step, run.saved))
        killed_after = run.saved
        lab.random.choice(run.workers()).kill()
        began = time.monotonic()
        run.wait_for_step(killed_after + 3)  # one may have been on its way
        seconds.append(time.monotonic() - began)
    reference = lab.undisturbed(*settings)
    run.finish_like(reference)
    found, best = (
        [line for line in open_run(str(folder)).read_records() if "goodput/ratio" in line][-1]
        for folder in (run.folder, reference)
    )
    lost = found["goodput/lost_to_recovery"]
    assert lost > 0.1, f"20 recoveries are not counted: {found}"
    text = f"equal after {sorted(seconds)[10]:.1f} s of recovery each (median; at most {max(seconds):.1f} s); "
    text += f"goodput {found['goodput/ratio']:.1%}, {lost:.1%} lost to recovery "
    lab.observe(f"{text}(undisturbed: {best['goodput/ratio']:.1%} and 0)", 20)


@pytest.mark.fault(
    "SIGKILL of every process at 12 random moments, checkpoint.every_steps=20",
    "resumes after the newest complete checkpoint; equal",
)
def test_killed_between_checkpoints(lab: Lab) -> None:
    settings = (*LOCAL, "checkpoint.every_steps=20", "train.epochs=24", "data.limit=1280", "data.test_limit=1280")
    run = lab.begin(*settings)
    saved = 0
    for step in sorted(lab.random.sample(range(20, 400, 20), 12)):
        run.wait_for_step(max(step, saved))
        time.sleep(lab.random.uniform(0, 0.5))
        run.kill_all()
        saved = run.saved
        run = lab.begin(resume=run.folder)
        run.wait_for("resumed after step")
        run.require_said(f"resumed after step {saved}")
    run.finish_like(lab.undisturbed(*settings))
    lab.observe("equal", 12)


@pytest.mark.fault("SIGKILL of the driver alone at a random step", SAME)
def test_driver_killed(lab: Lab) -> None:
    for _ in range(3):
        run = lab.begin(*RAY)
        run.wait_for_step(lab.random.randrange(2, STEPS - 6))
        run.process.send_signal(signal.SIGKILL)
        run.process.wait()
        lab.begin(resume=run.folder).finish_like(lab.undisturbed(*RAY))  # the old workers may still live
    lab.observe("equal", 3)


@pytest.mark.fault("SIGKILL of every process at once, as in a power cut", SAME)
def test_everything_killed(lab: Lab) -> None:
    run = lab.begin(*RAY)
    for _ in range(2):
        run.wait_for_step(min(run.saved + lab.random.randrange(3, 20), STEPS - 6))
        run.kill_all()
        run = lab.begin(resume=run.folder)
    run.finish_like(lab.undisturbed(*RAY))
    lab.observe("equal", 2)


ADAMW = "train.optimizer.name=adamw train.lr=0.003 train.clip_grad_norm=0.5 train.grad_accum_steps=2"
PLATEAU = "train.schedule.name=plateau train.schedule.patience=1 train.schedule.min_delta=0.05"
STOPPING = "train.early_stopping.enabled=true train.early_stopping.patience=3"
SMOOTH = "model.drop_rate=0.3 train.ema_decay=0.95 train.label_smoothing=0.1"
KINDS = (
    ("bf16", "bf16, sgd", "train.precision=bf16"),
    ("fp16", "fp16 with loss scaling, adam", "train.precision=fp16 train.optimizer.name=adam train.lr=0.003"),
    ("fp32", "fp32, adamw, gradient clipping and accumulation", ADAMW),
    ("dropout", "dropout, moving average, label smoothing", SMOOTH),
    ("mixup", "mixup, cutmix, TrivialAugment", "data.mixup=1 data.cutmix=1 data.trivial_augment=true"),
    ("constant", "constant schedule", "train.schedule.name=constant"),
    ("step", "step schedule", "train.schedule.name=multistep train.schedule.milestones=[2,4]"),
    ("cosine", "cosine schedule with warm-up", "train.schedule.name=cosine train.schedule.warmup_epochs=1.5"),
    ("one-cycle", "one-cycle schedule", "train.schedule.name=one_cycle"),
    ("plateau", "plateau schedule and early stopping", f"{PLATEAU} {STOPPING}"),
)


@pytest.mark.parametrize(
    "settings",
    cases(SAME, *((name, f"SIGKILL at two random steps: {what}", given) for name, what, given in KINDS)),
)
def test_process_killed(lab: Lab, settings: str) -> None:
    run = lab.begin(*LOCAL, *settings.split())
    for low, high in ((2, 15), (20, 32)):
        run.wait_for_step(lab.random.randrange(low, high))
        run.kill_all()
        run = lab.begin(resume=run.folder)
    run.finish_like(lab.undisturbed(*LOCAL, *settings.split()))
    lab.observe("equal", 2)


@pytest.mark.fault(
    "two ranks stopped at a random step, resumed as one, stopped, resumed as three (SyncBN)",
    "the loss of each epoch within 1e-5 of the undisturbed run",
)
def test_number_of_ranks_changed(lab: Lab) -> None:
    # Ranks of torchrun, so that three have room on any machine; no dropout, whose masks belong to ranks; a low
    # learning rate, because with a high one training itself makes rounding differences grow.
    settings = (*LOCAL, "train.sync_bn=true", "model.drop_rate=0", "train.lr=0.005")
    reference = lab.begin_ranks(2, *settings)
    reference.end(0)
    run = lab.begin_ranks(2, *settings)
    run.wait_for_step(14)
    run.kill_all()
    run = lab.begin(resume=run.folder)
    run.wait_for_step(33)
    run.interrupt()
    run = lab.begin_ranks(3, resume=run.folder)
    run.end(0)
    worst = largest_difference_of_losses(run.folder, reference.folder)
    assert worst < 1e-5, f"losses differ by {worst:.1e}"
    lab.observe(f"losses differ by {worst:.0e} at most", 2)

"""Sweeps as a user starts them, each on a cluster of its own: real signals, real kills."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from densenet_dist.cluster.sweep import tune
from densenet_dist.cluster.tune_events import Budget
from densenet_dist.config import load_config
from densenet_dist.errors import StorageError
from densenet_dist.sweep.definition import load_sweep
from densenet_dist.train.evaluation import evaluate

pytestmark = pytest.mark.slow

RAY_NOISE = re.compile(r"raylet|\(pid=|WARNING|INFO|ray::|ray\.tune|dashboard|deprecat|Traceback", re.IGNORECASE)
OF_TRIALS = ("TrialRunner", "ResourceTrainable", "RayTrainWorker", "TrainController", "Mailbox")


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What sweep.json says of each trial."""
    return {trial["name"]: trial for trial in json.loads((folder / "sweep.json").read_text())["trials"]}


def statuses(folder: Path) -> list[str]:
    return [trial["status"] for trial in results(folder).values()]


def bytes_of(trial: Path) -> dict[str, bytes]:
    """Everything a trial has, checkpoints included."""
    return {str(path.relative_to(trial)): path.read_bytes() for path in trial.rglob("*") if path.is_file()}


def epochs_of(trial: Path) -> list[int]:
    lines = map(json.loads, (trial / "metrics.jsonl").read_text().splitlines())
    return [line["epoch"] for line in lines if "train/loss" in line]


def until(condition: Callable[[], Any], seconds: float = 180) -> Any:
    """Wait for something, and give it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def has_trained(trial: Path, epochs: int = 1) -> bool:
    return (trial / "metrics.jsonl").exists() and len(epochs_of(trial)) >= epochs


def is_of_trials(process: psutil.Process) -> bool:
    try:
        title = " ".join(process.cmdline()).strip()
    except psutil.Error:
        return False
    return title.startswith("ray::") and any(name in title for name in OF_TRIALS)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    # A dead child that nobody has reaped yet is no process any more: it holds nothing.
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "densenet_dist", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


@pytest.fixture(scope="module")
def undisturbed(start_sweep):
    run = start_sweep("train.epochs=10", name="undisturbed")
    assert run.wait() == 0, run.text()
    return run


def test_a_sweep_explains_itself(undisturbed):
    text, folder = undisturbed.text(), undisturbed.folder
    assert not RAY_NOISE.search(text), text
    assert text.startswith(f"4 trials, random search, fifo, highest val/top1; folder {folder}\n")
    assert len(re.findall(r"^trial-00\d  finished 10 epochs", text, re.MULTILINE)) == 4
    assert f"densenet-dist train {folder}/best.yaml" in text
    assert {path.name for path in folder.iterdir()} >= {"sweep.yaml", "sweep.json", "sweep.csv", "best.yaml"}
    assert {path.name for path in folder.glob("trial-*")} == {f"trial-{number:03d}" for number in range(4)}
    assert not (folder / "ray").exists()
    found = results(folder)
    assert {trial["status"] for trial in found.values()} == {"finished"}
    assert len({trial["overrides"]["train.lr"] for trial in found.values()}) == 4
    assert all(list(trial["history"]) == [str(epoch) for epoch in range(1, 11)] for trial in found.values())
    best = json.loads((folder / "sweep.json").read_text())["best"]
    assert found[best]["metric"] == max(trial["metric"] for trial in found.values())
    with open(folder / "sweep.csv", newline="") as file:
        assert next(csv.DictReader(file))["trial"] == best


def test_trials_are_ordinary_runs(undisturbed):
    folder = undisturbed.folder
    summary = json.loads((folder / "trial-001" / "summary.json").read_text())
    assert evaluate(folder / "trial-001")["top1"] == pytest.approx(summary["test/top1"])
    best = results(folder)[json.loads((folder / "sweep.json").read_text())["best"]]
    assert load_config(folder / "best.yaml").train.lr == best["overrides"]["train.lr"]


def test_a_name_is_used_once(undisturbed):
    folder = undisturbed.folder
    before = bytes_of(folder)
    with pytest.raises(StorageError, match=f"exists already(.|\n)*densenet-dist tune --resume {folder}"):
        tune(load_sweep(folder / "sweep.yaml", f"storage={folder.parent}", "name=undisturbed"), listener=list)
    assert bytes_of(folder) == before


def test_resume_after_the_driver_was_killed_is_exact(undisturbed, start_sweep):
    run = start_sweep("train.epochs=10", name="killed")
    run.wait_for("trial-001  finished")
    until(lambda: has_trained(run.folder / "trial-002"))
    of_trials = [process for process in run.descendants() if is_of_trials(process)]
    others = [process for process in run.descendants() if process not in of_trials]
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    assert of_trials
    assert_gone(of_trials)
    for process in others:  # Ray's own take a while to notice that they are alone
        if process.is_running():
            process.kill()
    before = {name: bytes_of(run.folder / name) for name in ("trial-000", "trial-001")}
    assert not all((run.folder / f"trial-00{number}" / "summary.json").exists() for number in (2, 3))

    resumed = start_sweep(name="killed", resume=True)
    assert resumed.wait() == 0, resumed.text()
    assert re.search(r"resumed: [23] trials ended before, [12] go on", resumed.text()), resumed.text()
    for name, content in before.items():
        assert bytes_of(run.folder / name).items() >= content.items(), "what had finished is not trained again"
    found, expected = results(run.folder), results(undisturbed.folder)
    for name, trial in expected.items():
        for key in ("status", "overrides", "history", "metric", "best_epoch"):
            assert found[name][key] == trial[key], (name, key)


@pytest.mark.nightly
def test_interruption_and_what_was_stopped_stays_stopped(start_sweep):
    asha = ("scheduler={name: asha, reduction_factor: 2}", "trials=5", "train.epochs=24")
    run = start_sweep(*asha, name="asha")
    run.wait_for("stopped after")
    until(lambda: "running" in statuses(run.folder))
    family = run.descendants()
    run.process.send_signal(signal.SIGINT)
    assert run.wait(60) == 130, run.text()
    assert f"densenet-dist tune --resume {run.folder}" in run.text()
    assert_gone(family)
    assert "interrupted" in statuses(run.folder)
    assert "running" not in statuses(run.folder)
    stopped = {name for name, trial in results(run.folder).items() if trial["status"] == "stopped"}
    assert stopped
    before = {name: bytes_of(run.folder / name) for name in stopped}
    passed = {name: trial["epochs"] for name, trial in results(run.folder).items() if trial["status"] == "interrupted"}

    resumed = start_sweep(name="asha", resume=True)
    assert resumed.wait() == 0, resumed.text()
    found = results(run.folder)
    assert len(found) == 5
    assert stopped <= {name for name, trial in found.items() if trial["status"] == "stopped"}
    for name, content in before.items():
        assert bytes_of(run.folder / name).items() >= content.items()
    for name, trial in found.items():
        assert len(epochs_of(run.folder / name)) == trial["epochs"]
        # What was under way is new to the scheduler, which judges its next epochs by the rungs that it had passed, the
        # highest one first, one an epoch.
        rungs = {1, 2, 4, 8, 16} | (set(range(passed[name], passed[name] + 6)) if name in passed else set())
        assert trial["epochs"] in (rungs if trial["status"] == "stopped" else {24})


@pytest.mark.parametrize(
    ("workers", "number", "code"),
    [pytest.param(1, signal.SIGINT, 130, marks=pytest.mark.nightly), (2, signal.SIGTERM, 143)],
)
def test_interruption_in_the_middle_of_an_epoch(start_sweep, workers, number, code):
    long = ("data.limit=5000", "train.global_batch_size=2", "train.epochs=100", f"workers={workers}", "trials=2")
    run = start_sweep(*long, name=f"long-{workers}")
    until(lambda: list(run.folder.glob("trial-000/tb/events.*")))
    time.sleep(2)  # training by now, and far from the end of an epoch
    family = run.descendants()
    run.process.send_signal(number)
    assert run.wait(60) == code, run.text()
    assert_gone(family)
    assert not has_trained(run.folder / "trial-000")
    assert "interrupted" in statuses(run.folder)
    assert set(statuses(run.folder)) <= {"interrupted", "planned"}, statuses(run.folder)


@pytest.mark.nightly
def test_trials_that_run_out_of_memory(start_sweep, monkeypatch):
    # The machine's own memory is left alone: its monitor finds a hundredth of it, or more, in use.
    with monkeypatch.context() as patch:
        patch.setenv("RAY_memory_usage_threshold", "0.01")
        run = start_sweep("trials=2", "max_failures=0", name="memory")
        assert run.wait() == 1, run.text()
    assert statuses(run.folder) == ["failed", "failed"]
    for trial in results(run.folder).values():
        assert trial["cause"].startswith("out of memory: the node had none left")
        assert trial["cause"] in re.sub(r"\s+", " ", run.text())
    assert "no trial of" in run.text()


def test_hours_of_the_clock():
    budget = Budget(1e-12, None, 1.0)
    assert budget.spent()
    assert budget.reason == "max_hours: 1e-12 hours are over"
    assert not Budget(1.0, None, 1.0).spent()
    assert not Budget(None, None, 1.0).spent()


@pytest.mark.nightly
def test_more_than_the_machine_has(start_sweep):
    run = start_sweep("gpus_per_worker=1", name="room")
    assert run.wait() == 3, run.text()
    assert "a trial needs 1 GPUs, the cluster has 0" in run.text()
    assert list(run.folder.glob("trial-*")) == []
    again = start_sweep("cpus_per_worker=512", name="room")
    assert again.wait() == 3, "the name is still free: nothing had begun"
    assert "a trial needs 512 CPUs" in again.text()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(ballast: Path) -> None:
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.nightly
def test_a_full_disk(start_sweep, small_disk):
    run = start_sweep(f"storage={small_disk}", "train.epochs=20", "trials=3", name="full")
    folder = small_disk / "full"
    until(lambda: has_trained(folder / "trial-000", 2))
    fill(small_disk / "ballast")
    assert run.wait() == 5, run.text()
    assert "No space left" in run.text()
    assert not RAY_NOISE.search(run.text()), run.text()
    (small_disk / "ballast").unlink()
    done = command("tune", "--resume", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(folder) == ["finished"] * 3

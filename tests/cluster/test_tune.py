"""Sweeps as a user starts them, each on a cluster of its own: real signals, real kills."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from ray_runs import RAY_NOISE, SWEEP, Run, assert_gone, bytes_of, epochs_of, is_ray_process, until
from runs import run_of, tiny

from densenet_dist.cluster.sweep import tune
from densenet_dist.cluster.trial import _Training
from densenet_dist.config import load_config
from densenet_dist.errors import StorageError
from densenet_dist.sweep.definition import load_sweep
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.evaluation import evaluate


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What sweep.json says of each trial."""
    return {trial["name"]: trial for trial in json.loads((folder / "sweep.json").read_text())["trials"]}


def statuses(folder: Path) -> list[str]:
    return [trial["status"] for trial in results(folder).values()]


def has_trained(trial: Path) -> bool:
    return (trial / "metrics.jsonl").exists() and len(epochs_of(trial)) >= 1


@pytest.fixture(scope="module")
def undisturbed(start_sweep) -> Run:
    run = start_sweep("train.epochs=10", name="undisturbed")
    assert run.wait() == 0, run.text()
    return run


def test_a_sweep_explains_itself(undisturbed):
    text, folder = undisturbed.text(), undisturbed.folder
    assert not RAY_NOISE.search(text), text
    assert text.startswith(f"4 trials, random search, fifo, highest val/top1; folder {folder}\n")
    assert len(re.findall(r"^trial-00\d  finished 10 epochs", text, re.MULTILINE)) == 4
    assert f"densenet-dist train {folder}/best.yaml" in text
    assert {path.name for path in folder.iterdir()} >= {"sweep.yaml", "sweep.json", "best.yaml"}
    assert {path.name for path in folder.glob("trial-*")} == {f"trial-{number:03d}" for number in range(4)}
    assert not (folder / "ray").exists()
    found = results(folder)
    assert {trial["status"] for trial in found.values()} == {"finished"}
    assert len({trial["overrides"]["train.lr"] for trial in found.values()}) == 4
    assert all(list(trial["history"]) == [str(epoch) for epoch in range(1, 11)] for trial in found.values())
    best = json.loads((folder / "sweep.json").read_text())["best"]
    assert found[best]["metric"] == max(trial["metric"] for trial in found.values())
    assert load_config(folder / "best.yaml").train.lr == found[best]["overrides"]["train.lr"]
    summary = json.loads((folder / "trial-001" / "summary.json").read_text())
    assert evaluate(folder / "trial-001")["top1"] == pytest.approx(summary["test/top1"]), "a trial is an ordinary run"

    before = bytes_of(folder)
    with pytest.raises(StorageError, match=f"exists already(.|\n)*densenet-dist tune --resume {folder}"):
        tune(load_sweep(folder / "sweep.yaml", f"storage={folder.parent}", "name=undisturbed"), listener=list)
    assert bytes_of(folder) == before


def test_resume_after_the_driver_was_killed_is_exact(undisturbed, start_sweep):
    run = start_sweep("train.epochs=10", name="killed")
    run.wait_for("trial-001  finished")
    until(lambda: has_trained(run.folder / "trial-002"))
    of_trials = [process for process in run.descendants() if is_ray_process(process)]
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
    assert re.search(r"resumed: [23] trials ended, [12] to resume", resumed.text()), resumed.text()
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
    interrupted = results(run.folder)
    assert {"interrupted", "stopped"} <= set(statuses(run.folder))
    assert "running" not in statuses(run.folder)
    stopped = {name for name, trial in interrupted.items() if trial["status"] == "stopped"}
    before = {name: bytes_of(run.folder / name) for name in stopped}

    resumed = start_sweep(name="asha", resume=True)
    assert resumed.wait() == 0, resumed.text()
    found = results(run.folder)
    assert len(found) == 5
    assert stopped <= {name for name, trial in found.items() if trial["status"] == "stopped"}
    for name, content in before.items():
        assert bytes_of(run.folder / name).items() >= content.items()
    for name, trial in found.items():
        assert len(epochs_of(run.folder / name)) == trial["epochs"]
        assert trial["epochs"] in ({1, 2, 4, 8, 16} if trial["status"] == "stopped" else {24})


@pytest.mark.parametrize(
    ("workers", "number", "code"),
    [pytest.param(1, signal.SIGHUP, 129, marks=pytest.mark.nightly), (2, signal.SIGTERM, 143)],
)
def test_interruption_in_the_middle_of_an_epoch(start_sweep, workers, number, code):
    long = ("data.limit=5000", "train.global_batch_size=2", "train.epochs=100", f"workers={workers}", "trials=2")
    run = start_sweep(*long, name=f"long-{workers}")
    until(lambda: list(run.folder.glob("trial-000/tb/events.*")))
    time.sleep(2)  # training by now, and far from the end of an epoch
    family = run.descendants()
    run.interrupt(number)
    assert run.wait(60) == code, run.text()
    assert_gone(family)
    assert not has_trained(run.folder / "trial-000")
    assert set(statuses(run.folder)) == {"interrupted"}


@pytest.mark.nightly
def test_trials_that_run_out_of_memory(start_sweep, monkeypatch):
    # The machine's own memory is left alone: its monitor finds a hundredth of it, or more, in use.
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    run = start_sweep("trials=2", "max_failures=0", name="memory")
    assert run.wait() == 1, run.text()
    assert statuses(run.folder) == ["failed", "failed"]
    for trial in results(run.folder).values():
        assert trial["error"].startswith("out of memory: the node had none left")
        assert trial["error"] in re.sub(r"\s+", " ", run.text())
    assert "no trial of" in run.text()


def test_a_trial_knows_its_start_of_the_sweep_and_fails_without_the_validation_images_that_it_needs(tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    sweep = load_sweep(tmp_path / "sweep.yaml", f"storage={tmp_path}", "data.name=folder", "data.val_fraction=0")
    training = _Training("trial-000", {}, sweep, None, ("", "key"))
    config = tiny(tmp_path, "train.epochs=1", "cluster.cpus_per_worker=1")
    training._train_here(run_of(config), config)
    state = CheckpointStore(run_of(config)).load_latest().state
    assert state["clock"]["goodput"]["launch"] == "key"  # the pause before the sweep is resumed is no recovery
    assert not training._on_event({"kind": "start", "parameters": 1, "global_step": 0, "val_images": 0})
    assert "metric: val/top1 needs validation images" in str(training._output.get(timeout=0)["error"])

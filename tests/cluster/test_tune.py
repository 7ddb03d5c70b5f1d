"""Sweeps as a user runs them, real kills included, and on a cluster that is looked at from inside."""

from __future__ import annotations

import csv
import json
import os
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
import torch
from runs import run_of, train

from densenet_dist.cluster.sweep import open_sweep, tune
from densenet_dist.cluster.tune_events import Budget
from densenet_dist.config import load_config
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.run_folder import RunFolder
from densenet_dist.sweep.definition import Sweep, load_sweep

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


def process_of(trial: Path) -> psutil.Process:
    """The process that trains a trial: TensorBoard's files have its number in their names."""
    newest = max((trial / "tb").glob("events.*"), key=lambda path: path.stat().st_mtime)
    return psutil.Process(int(newest.name.split(".")[-2]))


def is_of_trials(process: psutil.Process) -> bool:
    try:
        title = " ".join(process.cmdline()).strip()
    except psutil.Error:
        return False
    return title.startswith("ray::") and any(name in title for name in OF_TRIALS)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
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
    trial = undisturbed.folder / "trial-001"
    done = command("evaluate", trial, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads((trial / "summary.json").read_text())
    assert json.loads(done.stdout)["top1"] == pytest.approx(summary["test/top1"])
    best = results(undisturbed.folder)[json.loads((undisturbed.folder / "sweep.json").read_text())["best"]]
    done = command("train", undisturbed.folder / "best.yaml", "cluster.engine=local", "train.epochs=1")
    assert done.returncode == 0, done.stderr
    again = load_config(undisturbed.folder.parent / "undisturbed-best" / "config.yaml")
    assert again.train.lr == best["overrides"]["train.lr"]


def test_a_name_is_used_once(undisturbed):
    before = bytes_of(undisturbed.folder)
    sweep_file = undisturbed.folder / "sweep.yaml"
    done = command("tune", sweep_file, f"storage={undisturbed.folder.parent}", "name=undisturbed")
    assert done.returncode == 5
    assert "exists already" in done.stderr
    assert f"densenet-dist tune --resume {undisturbed.folder}" in done.stderr
    assert bytes_of(undisturbed.folder) == before


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
    assert not (run.folder / "trial-003" / "summary.json").exists()

    resumed = start_sweep(name="killed", resume=True)
    assert resumed.wait() == 0, resumed.text()
    assert re.search(r"resumed: [23] trials ended before, [12] go on", resumed.text()), resumed.text()
    for name, content in before.items():
        assert bytes_of(run.folder / name).items() >= content.items(), "what had finished is not trained again"
    found, expected = results(run.folder), results(undisturbed.folder)
    for name, trial in expected.items():
        for key in ("status", "overrides", "history", "metric", "best_epoch"):
            assert found[name][key] == trial[key], (name, key)


def test_interruption_and_what_was_stopped_stays_stopped(start_sweep):
    asha = ("scheduler={name: asha, reduction_factor: 2}", "trials=5", "train.epochs=24")
    run = start_sweep(*asha, name="asha")
    run.wait_for("stopped after")
    until(lambda: "running" in statuses(run.folder))
    family = run.descendants()
    run.process.send_signal(signal.SIGINT)
    assert run.wait(10) == 130, run.text()
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


@pytest.mark.nightly
def test_termination_of_trials_of_several_workers(start_sweep):
    run = start_sweep("train.epochs=500", "workers=2", "trials=2", name="terminated")
    until(lambda: has_trained(run.folder / "trial-000"))
    family = run.descendants()
    run.process.send_signal(signal.SIGTERM)
    assert run.wait(10) == 143, run.text()
    assert_gone(family)
    assert statuses(run.folder) == ["interrupted"]


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
    assert run.wait(10) == code, run.text()
    assert_gone(family)
    assert not has_trained(run.folder / "trial-000")
    assert "interrupted" in statuses(run.folder)
    assert set(statuses(run.folder)) <= {"interrupted", "planned"}, statuses(run.folder)


def test_trials_that_fail_and_trials_that_are_killed(start_sweep, tmp_path):
    space = "space.train.lr=[0.05, 0.02, 1e30]"
    run = start_sweep(space, "search.name=grid", "trials=null", "train.epochs=60", name="hurt")
    first, second, third = (run.folder / f"trial-00{number}" for number in range(3))
    for trial in (first, second):
        until(lambda trial=trial: has_trained(trial, 3))
        process_of(trial).kill()
    run.wait_for("trial-001 crashed and is started again")
    epochs = len(epochs_of(second))
    until(lambda: has_trained(second, epochs + 3))
    process_of(second).kill()
    assert run.wait() == 0, run.text()
    assert not RAY_NOISE.search(run.text()), run.text()

    found = results(run.folder)
    assert statuses(run.folder) == ["finished", "failed", "failed"]
    assert "process was lost" in found["trial-001"]["cause"]
    assert "is NaN or infinite at step" in found["trial-002"]["cause"]
    assert len(list((third / "tb").iterdir())) == 1
    assert found["trial-002"]["cause"] in run.text()
    assert "trial-002 crashed" not in run.text(), "another attempt would end the same"
    with open(run.folder / "sweep.csv", newline="") as file:
        causes = {row["trial"]: row["cause"] for row in csv.DictReader(file)}
    assert causes == {name: trial["cause"] or "" for name, trial in found.items()}

    config = load_config(first / "config.yaml", {"storage": str(tmp_path), "cluster": {"engine": "local"}})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(config)
    finally:
        torch.set_num_threads(threads)
    assert (first / "checkpoints" / "manifest.json").read_text() == (
        run_of(config).path / "checkpoints" / "manifest.json"
    ).read_text()
    newest = f"checkpoints/step-{300:08d}/model.safetensors"
    assert (first / newest).read_bytes() == (run_of(config).path / newest).read_bytes()


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


def test_a_budget(start_sweep):
    # Hours of workers: on a loaded machine a trial needs many seconds to start, and those of the clock would be over.
    run = start_sweep("train.epochs=500", "max_gpu_hours=0.0005", name="budget")
    assert run.wait() == 0, run.text()
    assert "max_gpu_hours: 0.0005 GPU hours are used: budget" in run.text()
    assert set(statuses(run.folder)) == {"stopped"}
    assert (run.folder / "best.yaml").exists()


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
    both = start_sweep("gpus_per_worker=1", "space.train.lr=[-1]", name="room")
    assert both.wait() == 2, both.text()
    assert "space.train.lr: Input should be greater than 0; got -1" in both.text()
    assert "a trial needs 1 GPUs, the cluster has 0" in both.text()
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


# Below, sweeps run on a cluster that this process has started and that outlives them.


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, s3: str) -> Iterator[Any]:
    """A cluster of two CPUs in this process; its parameter says whether it has a dashboard."""
    import ray

    environment = dict(os.environ)
    ray.init(num_cpus=2, include_dashboard=request.param, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
    os.environ.clear()
    os.environ.update(environment)


joined = pytest.mark.parametrize("cluster", [False], indirect=True)


@pytest.fixture
def sweep(sweep_text: str, tmp_path: Path) -> Callable[..., Sweep]:
    """A tiny sweep with changes."""
    (tmp_path / "sweep.yaml").write_text(sweep_text)

    def load(*settings: str, name: str = "sweep") -> Sweep:
        return load_sweep(tmp_path / "sweep.yaml", f"name={name}", f"storage={tmp_path / 'runs'}", *settings)

    return load


def assert_all_given_back(ray: Any) -> None:
    def held() -> list[str]:
        groups = ray.util.placement_group_table().values()
        found = [f"placement group {group['name']}" for group in groups if group["state"] != "REMOVED"]
        if ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
            found.append(f"CPUs: {ray.available_resources().get('CPU')}")
        return found + [str(child) for child in psutil.Process().children(recursive=True) if is_of_trials(child)]

    deadline = time.monotonic() + 10
    while (found := held()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == []


@pytest.mark.parametrize(
    ("cluster", "trials"),
    [(True, 9), *(pytest.param(kind, 24, marks=pytest.mark.nightly) for kind in (False, True))],
    indirect=["cluster"],
)
def test_nothing_leaks(cluster, sweep, trials):
    worse_and_worse = f"space.train.lr={[0.5 * 1.3**i for i in range(trials)]}"
    stopping = ("scheduler={name: asha, reduction_factor: 4}", "search.name=grid", "trials=null", "metric=train/loss")
    result = tune(sweep(worse_and_worse, *stopping, name="direct"), listener=list)
    ended = [trial for trial in result.trials if trial.status == "stopped"]
    assert len(ended) >= trials - 4
    assert all(len(epochs_of(Path(result.folder) / trial.name)) == trial.epochs == 1 for trial in ended)
    assert_all_given_back(cluster)

    nested = ("space.train.lr=[0.05, 5, 50]", "workers=2", "train.epochs=2")
    result = tune(sweep(*stopping, *nested, name="nested"), listener=list)
    assert [trial.status for trial in result.trials] == ["finished", "stopped", "stopped"]
    for trial in result.trials[1:]:
        assert epochs_of(Path(result.folder) / trial.name) == [1]
    assert_all_given_back(cluster)


@pytest.mark.parametrize("cluster", [pytest.param(False, marks=pytest.mark.nightly), True], indirect=True)
def test_nothing_leaks_of_a_trial_that_raises(cluster, sweep):
    raising = sweep("trials=2", "max_failures=0", name="raising")

    def sabotage(event: dict[str, Any]) -> None:
        if event["kind"] == "sweep":
            (Path(raising.folder) / "trial-001").mkdir()
            (Path(raising.folder) / "trial-001" / "metrics.jsonl").symlink_to("metrics.jsonl")  # cannot be opened

    result = tune(raising, listener=sabotage)
    assert [trial.status for trial in result.trials] == ["finished", "failed"]
    assert "trial-001/metrics.jsonl" in (result.trials[1].cause or "")
    assert_all_given_back(cluster)


@joined
def test_weights_are_handed_over(cluster, sweep):
    searched = "space.train.optimizer={weight_decay: {loguniform: [1e-5, 0.01]}, momentum: {uniform: [0, 0.99]}}"
    found = tune(
        sweep(searched, "scheduler={name: pbt, perturb_epochs: 2}", "train.epochs=8", "checkpoint.keep=100"),
        listener=list,
    )
    folder = Path(found.folder)
    assert [trial.status for trial in found.trials] == ["finished"] * 4
    recipients = [trial for trial in found.trials if trial.origin is not None]
    assert recipients
    compared = 0
    for trial in recipients:
        own = folder / trial.name
        donor, step, overrides = json.loads((own / "trial.json").read_text())["taken"]
        assert donor == trial.origin != trial.name
        assert overrides == trial.overrides
        newest = max(path.name for path in (own / "checkpoints").glob("step-*"))
        assert newest > step, "it went on from there"
        weights = own / "checkpoints" / step / "model.safetensors"
        if (folder / donor / "checkpoints" / step).exists():  # the donor may have been handed another's since
            compared += 1
            assert weights.read_bytes() == (folder / donor / "checkpoints" / step / "model.safetensors").read_bytes()
        config = load_config(own / "config.yaml")
        assert config.train.lr == overrides["train.lr"]
        state = torch.load(own / "checkpoints" / newest / "state.pt", weights_only=True)
        groups = state["optimizer"]["param_groups"]
        assert {group["momentum"] for group in groups} == {overrides["train.optimizer.momentum"]}
        assert max(group["weight_decay"] for group in groups) == overrides["train.optimizer.weight_decay"]
        assert epochs_of(own)[-1] == 8
    assert compared
    assert {trial["name"] for trial in results(folder).values() if trial["origin"]} == {one.name for one in recipients}


@pytest.mark.nightly
@joined
def test_optuna_learns_what_was_tried(cluster, sweep):
    space = "space={train: {lr: {loguniform: [0.01, 0.1]}}, model: {num_layers: [[1, 1], [2, 1]]}}"
    more = "space.train.global_batch_size={integer: [8, 16], step: 4}"
    asked = sweep(space, more, "search={name: optuna, startup_trials: 2}", "trials=3", "train.epochs=1")
    first = tune(asked, listener=list)
    before = {trial.name: bytes_of(Path(first.folder) / trial.name) for trial in first.trials}
    said = Path(first.folder) / "sweep.yaml"
    said.write_text(said.read_text().replace("trials: 3", "trials: 5"))
    second = tune(open_sweep(first.folder), resume=True, listener=list)
    assert [trial.name for trial in second.trials] == [f"trial-{number:03d}" for number in range(5)]
    assert second.trials[:3] == first.trials
    for name, content in before.items():
        assert bytes_of(Path(first.folder) / name).items() >= content.items()
    for trial in second.trials:
        assert trial.status == "finished"
        assert 0.01 <= trial.overrides["train.lr"] <= 0.1
        assert trial.overrides["model.num_layers"] in ([1, 1], [2, 1])
        assert trial.overrides["train.global_batch_size"] in (8, 12, 16)
        config = load_config(Path(first.folder) / trial.name / "config.yaml")
        assert list(config.model.num_layers) == trial.overrides["model.num_layers"]


@pytest.mark.nightly
@joined
def test_a_grid_is_tried_once(cluster, sweep):
    grid = ("space={train.lr: [0.1, 0.2], model.num_layers: [[1, 1], [2, 1]]}", "search.name=grid", "trials=null")
    result = tune(sweep(*grid, "train.epochs=1"), listener=list)
    tried = [(trial.overrides["train.lr"], trial.overrides["model.num_layers"]) for trial in result.trials]
    assert tried == [(0.1, [1, 1]), (0.1, [2, 1]), (0.2, [1, 1]), (0.2, [2, 1])]


@joined
def test_a_cluster_without_room(cluster, sweep):
    events: list[Any] = []
    with pytest.raises(EnvironmentProblem, match="no room for a trial after 3 s: a trial needs 3 CPUs") as caught:
        tune(sweep("workers=3", "cluster.timeout_s=3"), listener=events.append)
    assert caught.value.exit_code == 3
    notes = [event["text"] for event in events if event["kind"] == "note"]
    assert notes == ["waiting up to 3 s for the cluster: a trial needs 3 CPUs, the cluster has 2"]
    assert_all_given_back(cluster)


@joined
@pytest.mark.parametrize("scheduler", ["fifo", pytest.param("pbt", marks=pytest.mark.nightly)])
def test_a_sweep_on_an_object_store(cluster, sweep, s3, scheduler):
    place = s3 % "/sweeps"
    asked = sweep(f"storage={place}", f"scheduler={{name: {scheduler}}}", "trials=2", name=scheduler)
    result = tune(asked, listener=list)
    assert result.folder == f"s3://bucket/sweeps/{scheduler}"
    folder = RunFolder(place, scheduler)
    assert folder.names("") >= {"sweep.yaml", "sweep.json", "sweep.csv", "best.yaml", "trial-000", "trial-001"}
    assert "ray" not in folder.names("")
    assert load_config(folder.fetch("best.yaml")).name == f"{scheduler}-best"
    assert [trial.status for trial in result.trials] == ["finished", "finished"]
    before = folder.fetch("trial-000/metrics.jsonl").read_bytes()
    again = tune(open_sweep(s3 % f"/sweeps/{scheduler}"), resume=True, listener=list)
    assert again.trials == result.trials
    assert RunFolder(place, scheduler).fetch("trial-000/metrics.jsonl").read_bytes() == before

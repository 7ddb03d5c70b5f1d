"""Runs and sweeps on a cluster that this process has started and that outlives them, looked at from inside: what is
given back, what survives a lost process, what Prometheus, Grafana and Ray's dashboard are shown."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from ray_runs import SWEEP, TINY, UNDISTURBED, bytes_of, epochs_of, free_ports, is_ray_process, records, until, weights
from runs import run_of, train

from densenet_dist.cluster.connection import DRIVER_ENV
from densenet_dist.cluster.launch import fit
from densenet_dist.cluster.sweep import open_sweep, tune
from densenet_dist.cluster.telemetry import GAUGES
from densenet_dist.config import load_config
from densenet_dist.errors import EnvironmentProblem, StorageError
from densenet_dist.lease import LEASE_FILE, Holder
from densenet_dist.run_folder import RunFolder
from densenet_dist.sweep.definition import Sweep, load_sweep
from densenet_dist.train.context import Event

# Ray's controller is given settings of Ray Data, which deprecates defaults of its own.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data.*")

DASHBOARD = Path(__file__).parents[2] / "launch" / "monitoring" / "grafana-dashboard.json"
STOPPING = ("scheduler={name: asha, reduction_factor: 4}", "search.name=grid", "trials=null", "metric=train/loss")
RECORDED = {
    "densenet_images_per_second": "perf/images_per_s",
    "densenet_train_loss": "train/loss",
    "densenet_train_top1_ratio": "train/top1",
    "densenet_val_loss": "val/loss",
    "densenet_val_top1_ratio": "val/top1",
    "densenet_learning_rate": "lr",
    "densenet_epochs": "epoch",
    "densenet_steps": "global_step",
    "densenet_data_wait_ratio": "perf/data_wait",
    "densenet_goodput_ratio": "goodput/ratio",
}


@dataclass(frozen=True)
class Cluster:
    """A cluster of two CPUs in this process, with a dashboard."""

    address: str
    metrics: str
    dashboard: str

    def samples(self) -> list[Any]:
        """All that Prometheus would find."""
        with urllib.request.urlopen(self.metrics, timeout=10) as answer:
            text = answer.read().decode()
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def figures_at(self, epoch: int, run: str, trial: str = "") -> dict[str, float]:
        """Ours of a run, without ``ray_``, once they are those of an epoch's end: Ray passes them on once a second."""
        deadline = time.monotonic() + 120
        while True:
            found = {
                sample.name.removeprefix("ray_"): sample.value
                for sample in self.samples()
                if sample.name.startswith("ray_densenet_")
                and (sample.labels["run"], sample.labels["trial"]) == (run, trial)
            }
            if found.get("densenet_epochs") == epoch and "densenet_val_loss" in found:
                return found
            assert time.monotonic() < deadline, found
            time.sleep(0.2)

    def ask(self, path: str) -> Any:
        """What the dashboard says."""
        from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

        request = urllib.request.Request(self.dashboard + path, headers=get_auth_headers_if_auth_enabled({}))
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def processes(self, *names: str) -> list[psutil.Process]:
        """Those of runs and trials, or of some actors only."""
        return [each for each in psutil.Process().children(recursive=True) if is_ray_process(each, *names)]

    def assert_all_given_back(self) -> None:
        import ray

        def held() -> list[str]:
            groups = ray.util.placement_group_table().values()
            found = [f"placement group {group['name']}" for group in groups if group["state"] != "REMOVED"]
            if ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
                found.append(f"CPUs: {ray.available_resources().get('CPU')}")
            return found + list(map(str, self.processes()))

        deadline = time.monotonic() + 120
        while (found := held()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert found == []


@pytest.fixture(scope="module")
def started(s3: str) -> Iterator[Cluster]:
    import ray
    from ray.cluster_utils import Cluster as Nodes

    environment = dict(os.environ)
    os.environ.update(DRIVER_ENV)  # with Ray's niceness of 15, workers would starve on a busy machine
    dashboard, metrics = free_ports(2)
    nodes = Nodes(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "include_dashboard": True,
            "dashboard_port": dashboard,
            "metrics_export_port": metrics,
            "_system_config": {"metrics_report_interval_ms": 1000},
        },
    )

    def exporting() -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=10):
            return True
        return False

    # A process that finds no metrics agent for 30 s after it connected never exports any.
    until(exporting)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    yield Cluster(nodes.address, f"http://127.0.0.1:{metrics}/metrics", f"http://127.0.0.1:{dashboard}")
    ray.shutdown()
    nodes.shutdown()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def cluster(started: Cluster) -> Iterator[Cluster]:
    """The cluster; what a test that was cut short leaves training is ended."""
    yield started
    for process in started.processes():
        process.kill()


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., Sweep]:
    """A tiny sweep with changes."""
    (tmp_path / "sweep.yaml").write_text(SWEEP)

    def load(*settings: str, name: str = "sweep") -> Sweep:
        return load_sweep(tmp_path / "sweep.yaml", f"name={name}", f"storage={tmp_path / 'runs'}", *settings)

    return load


def process_of(trial: Path) -> psutil.Process:
    """The process that trains a trial: TensorBoard's files have its number in their names."""
    newest = max((trial / "tb").glob("events.*"), key=lambda path: path.stat().st_mtime)
    return psutil.Process(int(newest.name.split(".")[-2]))


class Killed(NamedTuple):
    """A run one of whose workers was killed after the second epoch, and what was scraped right after its end: Ray soon
    forgets what nobody renews."""

    folder: Path
    events: list[Event]
    figures: dict[str, float]
    scraped: set[str]


@pytest.fixture(scope="module")
def killed(started: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    (folder / "tiny.yaml").write_text(TINY)
    events: list[Event] = []
    lost: list[psutil.Process] = []

    def kill_a_worker(event: Event) -> None:
        events.append(event)
        if event["kind"] == "epoch" and event["epoch"] == 2 and not lost:  # the first one is saved by then
            lost.append(started.processes("RayTrainWorker")[-1])
            lost[0].send_signal(signal.SIGKILL)

    config = load_config(str(folder / "tiny.yaml"), *UNDISTURBED, f"storage={folder}", "name=killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "3")  # of something else
        fit(config, listener=kill_a_worker)
    figures = started.figures_at(4, "killed")
    return Killed(folder / "killed", events, figures, {sample.name for sample in started.samples()})


def test_a_killed_worker_is_replaced_and_nothing_is_lost(undisturbed, killed):
    notes = [event["text"] for event in killed.events if event["kind"] == "note"]
    lost = r"rank [01] on \S+, after step \d+, failed: .* was lost .*; all workers are restarted \(1 of at most 3.*"
    assert any(re.fullmatch(lost, note) for note in notes), notes
    assert weights(killed.folder) == weights(undisturbed.folder)
    assert records(killed.folder) == records(undisturbed.folder)


def test_prometheus_and_the_dashboard_show_a_run(cluster, killed):
    lines = map(json.loads, (killed.folder / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if "train/loss" in line][-1]
    assert set(killed.figures) == set(GAUGES)
    expected = pytest.approx({name: last[key] for name, key in RECORDED.items()})
    assert {name: killed.figures[name] for name in RECORDED} == expected
    assert killed.figures["densenet_restarts"] == 1
    assert 0 < last["goodput/lost_to_recovery"] < 1 - last["goodput/ratio"]
    (run,) = [run for run in cluster.ask("/api/train/v2/runs/v1")["train_runs"] if run["name"].startswith("killed-")]
    assert run["status"] == "FINISHED"
    assert len(run["attempts"]) == 2  # the second one after the loss


def test_grafana_asks_for_what_there_is(killed):
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries += [each["definition"] for each in dashboard["templating"]["list"] if "definition" in each]
    asked = {name for text in queries for name in re.findall(r"\bray_\w+", text)}
    assert {name for name in asked if name.startswith("ray_densenet_")} == {f"ray_{name}" for name in GAUGES}
    lacking = asked - killed.scraped
    assert lacking <= {"ray_node_gpus_utilization", "ray_node_gram_used"}  # of GPUs
    assert {name.removeprefix("ray_") for name in lacking} <= set(METRICS_GAUGES)


def test_trials_that_fail_and_trials_that_are_killed(cluster, sweep, tmp_path):
    hurt = sweep("space.train.lr=[0.05, 0.02, 1e30]", "search.name=grid", "trials=null", "train.epochs=8", name="hurt")
    notes: list[str] = []
    seen: dict[str, dict[str, float]] = {}
    kills = {"trial-000": [3], "trial-001": [3, 5]}  # the epochs after which each is killed

    def kill(event: Event) -> None:
        if event["kind"] == "note":
            notes.append(event["text"])
        if event["kind"] == "trial" and event["state"] == "epoch":
            trial = event["trial"]
            if trial.epochs == 1:  # it waits at its epoch's end for as long as this takes
                seen[trial.name] = cluster.figures_at(1, "hurt", trial.name)
            if trial.epochs in kills.get(trial.name, []):
                kills[trial.name].remove(trial.epochs)
                process_of(Path(hurt.folder) / trial.name).kill()

    result = tune(hurt, listener=kill)
    first, second, third = result.trials
    assert [trial.status for trial in result.trials] == ["finished", "failed", "failed"]
    assert [sum(note.startswith(f"{trial.name} crashed; restarting") for note in notes)
            for trial in result.trials] == [1, 1, 0], "another attempt of the third would end the same"  # fmt: skip
    assert "process was lost" in second.error
    assert "is NaN or infinite at step" in third.error
    assert len(list((Path(result.folder) / third.name / "tb").iterdir())) == 1
    assert set(seen) == {"trial-000", "trial-001"}, "Prometheus tells trials apart"
    for name, figures in seen.items():
        record = json.loads((Path(result.folder) / name / "metrics.jsonl").read_text().splitlines()[0])
        assert set(figures) == set(GAUGES)
        expected = pytest.approx({metric: record[key] for metric, key in RECORDED.items()})
        assert {metric: figures[metric] for metric in RECORDED} == expected

    folder = Path(result.folder) / first.name
    config = load_config(folder / "config.yaml", {"storage": str(tmp_path), "cluster": {"engine": "local"}})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(config)
    finally:
        torch.set_num_threads(threads)
    undisturbed = run_of(config).path
    assert (folder / "checkpoints/manifest.json").read_text() == (undisturbed / "checkpoints/manifest.json").read_text()
    assert weights(folder) == weights(undisturbed)


def test_a_time_limit_interrupts_trials(cluster, sweep):
    result = tune(sweep("train.epochs=500", "max_hours=0.003"), listener=list)
    assert result.ended_by == "limit of 0.003 hours reached"
    assert {trial.status for trial in result.trials} <= {"interrupted"}  # on a loaded machine none may have started
    cluster.assert_all_given_back()


def test_a_sweep_whose_folder_is_taken_over_stops(cluster, sweep):
    asked = sweep("train.epochs=500", "trials=2", name="lost")
    folder = RunFolder(asked.settings.storage, "lost")
    other = replace(Holder.here(), key="other").to_json()

    def take_over(event: Event) -> None:
        if event["kind"] == "trial" and event["state"] == "epoch":
            folder.write(LEASE_FILE, other)

    with pytest.raises(StorageError, match="lost was taken over by process"):
        tune(asked, listener=take_over)
    assert (folder.path / LEASE_FILE).read_text() == other
    cluster.assert_all_given_back()


@contextmanager
def job_with_one_cpu(cluster: Cluster) -> Iterator[subprocess.Popen[bytes]]:
    """Another job of the cluster, which gives its CPU back when its input is closed."""
    hold = "import ray, sys; ray.init(logging_level='ERROR'); g = ray.util.placement_group([{'CPU': 1}]); " \
           "ray.get(g.ready()); print('held', flush=True); sys.stdin.read()"  # fmt: skip
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    with subprocess.Popen([sys.executable, "-c", hold], env=environment, **pipes) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.stdin.close()


@pytest.mark.parametrize("workers", [pytest.param("2", marks=pytest.mark.nightly), "{min: 2, max: 3}"])
def test_a_run_says_what_it_waits_for_and_who_has_the_rest(cluster, tmp_path, workers):
    (tmp_path / "tiny.yaml").write_text(TINY)
    events: list[Event] = []
    config = load_config(str(tmp_path / "tiny.yaml"), f"storage={tmp_path}", f"cluster.workers={workers}",
                         "cluster.timeout_s=4")  # fmt: skip
    said = "the workers could not start within 4 s: 2 workers with 1 CPU"
    with job_with_one_cpu(cluster), pytest.raises(EnvironmentProblem, match=said):
        fit(config, listener=events.append)
    [note] = [event["text"] for event in events if event["kind"] == "note"]
    assert note.startswith("waiting up to 4 s for resources: 2 workers with 1 CPU each are requested, and there is "
                           "room for 1; free: 1 of 2 CPUs\n  another job: "), note  # fmt: skip
    assert "g.ready()" in note


def test_a_cluster_without_room(cluster, sweep):
    events: list[Any] = []
    with pytest.raises(EnvironmentProblem, match="no room for a trial after 3 s: a trial needs 3 workers") as caught:
        tune(sweep("workers=3", "cluster.timeout_s=3"), listener=events.append)
    assert caught.value.exit_code == 3
    notes = [event["text"] for event in events if event["kind"] == "note"]
    assert notes == ["waiting up to 3 s for the cluster: a trial needs 3 workers; with 1 CPU per worker the cluster "
                     "has room for 2"]  # fmt: skip
    cluster.assert_all_given_back()


def test_a_trial_of_several_workers_waits_on_a_busy_cluster(cluster, sweep):
    notes: list[str] = []

    def free(event: Event) -> None:
        if event["kind"] == "note":
            notes.append(event["text"])
            threading.Timer(8, other.stdin.close).start()  # well after the timeout

    with job_with_one_cpu(cluster) as other:
        asked = sweep("workers=2", "trials=1", "train.epochs=1", "cluster.timeout_s=2")
        result = tune(asked, listener=free)
    assert [trial.status for trial in result.trials] == ["finished"]
    assert notes[0].startswith("trials wait until there is room: 2 workers with 1 CPU each are requested"), notes


def test_a_sweep_on_an_object_store(cluster, sweep, s3):
    place = s3 % "/sweeps"
    result = tune(sweep(f"storage={place}", "trials=2", "train.epochs=2"), listener=list)
    assert result.folder == "s3://bucket/sweeps/sweep"
    folder = RunFolder(place, "sweep")
    assert folder.names("") >= {"sweep.yaml", "sweep.json", "best.yaml", "trial-000", "trial-001"}
    assert "ray" not in folder.names("")
    assert load_config(folder.fetch("best.yaml")).name == "sweep-best"
    assert [trial.status for trial in result.trials] == ["finished", "finished"]
    before = folder.fetch("trial-000/metrics.jsonl").read_bytes()
    again = tune(open_sweep(s3 % "/sweeps/sweep", "trials=3"), resume=True, listener=list)
    assert (again.trials[:2], again.trials[2].status) == (result.trials, "finished")
    assert RunFolder(place, "sweep").fetch("trial-000/metrics.jsonl").read_bytes() == before


def test_nothing_leaks(cluster, sweep):
    worse_and_worse = f"space.train.lr={[0.5 * 1.3**i for i in range(6)]}"
    result = tune(sweep(worse_and_worse, *STOPPING), listener=list)
    ended = [trial for trial in result.trials if trial.status == "stopped"]
    assert len(ended) >= 2
    assert all(epochs_of(Path(result.folder) / trial.name) == [1] for trial in ended)
    cluster.assert_all_given_back()
    before = bytes_of(Path(result.folder) / ended[0].name)
    assert tune(open_sweep(result.folder), resume=True, listener=list).trials == result.trials, "stopped stays stopped"
    assert bytes_of(Path(result.folder) / ended[0].name) == before


@pytest.mark.nightly
def test_nothing_leaks_of_trials_of_several_workers(cluster, sweep):
    asked = sweep(*STOPPING, "space.train.lr=[0.05, 5, 50]", "workers=2", "train.epochs=2")
    killed: list[psutil.Process] = []

    def kill_the_first_trial(event: Event) -> None:
        if event["kind"] == "trial" and event["state"] == "epoch" and not killed:
            killed.extend(cluster.processes("TrialRunner", "ResourceTrainable"))
            for process in killed:
                process.kill()

    result = tune(asked, listener=kill_the_first_trial)
    assert killed
    assert [trial.status for trial in result.trials] == ["finished", "stopped", "stopped"]
    for trial in result.trials[1:]:
        assert epochs_of(Path(result.folder) / trial.name) == [1]
    cluster.assert_all_given_back()


@pytest.mark.nightly
def test_optuna_learns_what_was_tried(cluster, sweep):
    space = "space={train: {lr: {loguniform: [0.01, 0.1]}}, model: {num_layers: [[1, 1], [2, 1]]}}"
    more = "space.train.global_batch_size={integer: [8, 16], step: 4}"
    asked = sweep(space, more, "search={name: optuna, startup_trials: 2}", "trials=3", "train.epochs=1")
    first = tune(asked, listener=list)
    before = {trial.name: bytes_of(Path(first.folder) / trial.name) for trial in first.trials}
    second = tune(open_sweep(first.folder, "trials=5"), resume=True, listener=list)
    assert [trial.name for trial in second.trials] == [f"trial-{number:03d}" for number in range(5)]
    assert second.trials[:3] == first.trials
    for name, content in before.items():
        assert bytes_of(Path(first.folder) / name).items() >= content.items()
    for trial in second.trials:
        assert trial.status == "finished"
        assert 0.01 <= trial.overrides["train.lr"] <= 0.1
        assert trial.overrides["model.num_layers"] in ([1, 1], [2, 1])
        assert trial.overrides["train.global_batch_size"] in (8, 12, 16)

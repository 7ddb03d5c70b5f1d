"""What Prometheus, Grafana and Ray's dashboard are shown: scraped from a real cluster while and after it trains."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from densenet_dist.cluster.launch import fit
from densenet_dist.cluster.sweep import tune
from densenet_dist.cluster.telemetry import GAUGES, Telemetry
from densenet_dist.config import load_config
from densenet_dist.sweep.definition import load_sweep
from densenet_dist.train.context import Event

# Ray's controller is given settings of Ray Data, which deprecates defaults of its own.
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data.*")

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "launch" / "monitoring" / "grafana-dashboard.json"
TINY = """
model: {variant: densenet_bc, growth_rate: 4, num_layers: [1, 1]}
data: {name: shapes, limit: 640, loader: torch}
train: {epochs: 3, global_batch_size: 64, lr: 0.05}
cluster: {workers: 1, cpus_per_worker: 1}
"""
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
START = {"train_images": 1000, "global_batch_size": 100, "steps_per_epoch": 10, "epoch": 0, "global_step": 0}


@dataclass(frozen=True)
class Cluster:
    """A cluster of two CPUs in this process, with a dashboard."""

    metrics: str
    dashboard: str

    def names(self) -> set[str]:
        """Every name that can be asked for."""
        return {sample.name for family in self._families() for sample in family.samples}

    def figures(self, run: str, trial: str = "") -> dict[str, float]:
        """Ours of a run, without ``ray_``."""
        return {
            sample.name.removeprefix("ray_"): sample.value
            for family in self._families()
            for sample in family.samples
            if sample.name.startswith("ray_densenet_")
            and (sample.labels["run"], sample.labels["trial"]) == (run, trial)
        }

    def figures_at(self, epoch: int, run: str, trial: str = "") -> dict[str, float]:
        """The same, once they are those of an epoch's end: Ray passes them on once a second here."""
        deadline = time.monotonic() + 30
        while (found := self.figures(run, trial)).get("densenet_epochs") != epoch or "densenet_val_loss" not in found:
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        return found

    def _families(self) -> Iterator[Any]:
        with urllib.request.urlopen(self.metrics, timeout=10) as answer:
            yield from text_string_to_metric_families(answer.read().decode())

    def ask(self, path: str) -> Any:
        """What the dashboard says."""
        from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

        request = urllib.request.Request(self.dashboard + path, headers=get_auth_headers_if_auth_enabled({}))
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


@dataclass(frozen=True)
class Finished:
    """A run whose only worker was killed after the first epoch: its records, and what was scraped at its end."""

    records: list[dict[str, Any]]
    figures: dict[str, float]
    seconds: float


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    import ray

    environment = dict(os.environ)
    ports = free_ports(2)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=True,
        dashboard_port=ports[0],
        log_to_driver=False,
        logging_level="ERROR",
        _metrics_export_port=ports[1],
        _system_config={"metrics_report_interval_ms": 1000},
    )
    yield Cluster(f"http://127.0.0.1:{ports[1]}/metrics", f"http://127.0.0.1:{ports[0]}")
    ray.shutdown()
    os.environ.clear()
    os.environ.update(environment)


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def finished(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("telemetry")
    (folder / "tiny.yaml").write_text(TINY)
    killed: list[int] = []

    def kill_a_worker(event: Event) -> None:
        if event["kind"] == "epoch" and event["epoch"] == 2 and not killed:  # the first one is saved by then
            processes = psutil.Process().children(recursive=True)
            (worker,) = [each for each in processes if "RayTrainWorker" in " ".join(each.cmdline())]
            killed.append(worker.pid)
            worker.send_signal(signal.SIGKILL)

    began = time.monotonic()
    fit(load_config(str(folder / "tiny.yaml"), f"storage={folder}", "name=first"), listener=kill_a_worker)
    seconds = time.monotonic() - began
    lines = (folder / "first" / "metrics.jsonl").read_text().splitlines()
    return Finished(list(map(json.loads, lines)), cluster.figures_at(3, "first"), seconds)


@pytest.mark.slow
def test_every_figure_is_that_of_the_record(finished):
    epochs = [line for line in finished.records if "train/loss" in line]
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert set(finished.figures) == set(GAUGES)
    assert {name: finished.figures[name] for name in RECORDED} == {
        name: pytest.approx(epochs[-1][key]) for name, key in RECORDED.items()
    }


@pytest.mark.slow
def test_restarts_and_goodput_know_of_the_lost_worker(finished):
    assert finished.figures["densenet_restarts"] == 1
    epochs = [line for line in finished.records if "train/loss" in line]
    assert 0 < epochs[-1]["goodput/lost_to_recovery"] < 1 - epochs[-1]["goodput/ratio"]


@pytest.mark.slow
def test_the_dashboards_train_view_shows_the_run(cluster, finished):
    (run,) = cluster.ask("/api/train/v2/runs/v1")["train_runs"]
    assert run["name"].startswith("first-")
    assert run["status"] == "FINISHED"
    assert len(run["attempts"]) == 2  # the second one after the loss


@pytest.mark.slow
def test_trials_are_told_apart(cluster, tmp_path, sweep_text):
    (tmp_path / "sweep.yaml").write_text(sweep_text)
    sweep = load_sweep(str(tmp_path / "sweep.yaml"), "trials=2", "train.epochs=2", f"storage={tmp_path}", "name=search")
    seen: dict[str, dict[str, float]] = {}

    def scrape(event: Event) -> None:
        # The trial waits at its epoch's end for as long as this takes.
        if event["kind"] == "trial" and event["state"] == "epoch" and event["trial"].name not in seen:
            seen[event["trial"].name] = cluster.figures_at(1, "search", event["trial"].name)

    tune(sweep, listener=scrape)
    assert set(seen) == {"trial-000", "trial-001"}
    for name, figures in seen.items():
        record = json.loads((tmp_path / "search" / name / "metrics.jsonl").read_text().splitlines()[0])
        assert set(figures) == set(GAUGES)
        assert {metric: figures[metric] for metric in RECORDED} == {
            metric: pytest.approx(record[key]) for metric, key in RECORDED.items()
        }
        assert 0 < figures["densenet_goodput_ratio"] < 1


@pytest.mark.slow
def test_grafana_asks_for_what_there_is(cluster, finished):
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    asked = {name for text in expressions() for name in re.findall(r"\bray_\w+", text)}
    assert {name for name in asked if name.startswith("ray_densenet_")} == {f"ray_{name}" for name in GAUGES}
    lacking = asked - cluster.names()
    assert lacking <= {"ray_node_gpus_utilization", "ray_node_gram_used"}  # of GPUs
    assert {name.removeprefix("ray_") for name in lacking} <= set(METRICS_GAUGES)


def expressions() -> list[str]:
    """Every query of the dashboard, those of its variables too."""
    dashboard = json.loads(DASHBOARD.read_text())
    of_panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return of_panels + [each["definition"] for each in dashboard["templating"]["list"] if "definition" in each]


def test_the_page_explains_each_figure():
    page = (ROOT / "docs" / "monitoring.md").read_text()
    assert re.findall(r"^\| `ray_(\w+)` \|", page, re.MULTILINE) == list(GAUGES)


@pytest.mark.slow
def test_a_cluster_of_ones_own_listens_on_loopback_alone():
    script = """
import json, psutil
from densenet_dist.cluster.connection import connected
from densenet_dist.schema import ClusterConfig
with connected(ClusterConfig()):
    family = {each.pid for each in [psutil.Process(), *psutil.Process().children(recursive=True)]}
    ports = [each for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.pid in family]
    print(json.dumps([each.laddr.ip.removeprefix("::ffff:") for each in ports]))
"""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    addresses = json.loads(done.stdout)
    assert len(addresses) > 5
    assert set(addresses) == {"127.0.0.1"}


def test_no_run_fails_for_its_figures(caplog: pytest.LogCaptureFixture):
    telemetry: Callable[[Event], None] = Telemetry("run")
    telemetry({"kind": "progress"})
    (record,) = caplog.records
    assert "no longer exported" in record.message
    telemetry({"kind": "progress"})
    assert len(caplog.records) == 1

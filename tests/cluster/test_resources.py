"""How many trials run at a time, on what."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from densenet_dist.cluster.resources import TrialCapacity, local_threads, plan_resources, plan_trials
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.schema import ClusterConfig, WorkerRange
from densenet_dist.sweep.definition import SearchConfig, SweepConfig


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:9", "Connection refused"),
        ("127.0.0.1:{silent}", "timed out"),
        ("ray://127.0.0.1:10001", "densenet-dist submit --address http://"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_named_at_once(command, monkeypatch, address, said):
    with socket.create_server(("", 0)) as server:  # it never answers
        monkeypatch.setenv("RAY_ADDRESS", address := address.format(silent=server.getsockname()[1]))
        for line in (["train", "quickstart"], ["tune", "sweep_quickstart"]):
            code, _, err = command(*line, "cluster.timeout_s=0.2")
            assert (code, f"RAY_ADDRESS={address}: " in err, said in err) == (3, True, True), err
            assert not Path("runs").exists()


@pytest.mark.nightly
def test_a_connection_of_ray_client_is_refused(tmp_path):
    connected = "from ray.util.client.ray_client_helpers import ray_start_client_server as serve\n" \
                "from densenet_dist import fit, load_config\n" \
                "with serve(): fit(load_config('quickstart'), listener=print)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", connected], cwd=tmp_path, capture_output=True, text=True)
    assert "EnvironmentProblem: this process is connected to a cluster by Ray Client (ray://)" in done.stderr
    assert "densenet-dist submit --address" in done.stderr
    assert not (tmp_path / "runs").exists()


def plan(cpus: float, gpus: float = 0, *, nodes: int = 1, trials: int = 16, device: str = "auto", fixed: bool = True,
         **asked: Any):  # fmt: skip
    node = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
    cluster = ClusterConfig(device=device)  # type: ignore[arg-type]
    return plan_trials(SweepConfig(**asked), cluster, trials, [node] * nodes, fixed=fixed)


@pytest.mark.parametrize(
    ("capacity", "concurrent", "per_worker"),
    [
        (plan(2), 2, {"CPU": 1}),
        (plan(8, cpus_per_worker=3), 2, {"CPU": 3}),
        (plan(64, 2, gpus_per_worker=0.25), 8, {"CPU": 1, "GPU": 0.25}),
        (plan(64, 8, workers=4), 2, {"CPU": 1, "GPU": 1}),
        (plan(64, 8, gpus_per_worker=0), 16, {"CPU": 1}),
        (plan(64, 8, concurrent=3), 3, {"CPU": 1, "GPU": 1}),
        (plan(64, 4, concurrent=5), 4, {"CPU": 1, "GPU": 1}),
        (plan(3, nodes=3, cpus_per_worker=2, workers=2), 1, {"CPU": 2}),  # a third of each node is of no use
        (plan(8, 1, fixed=False), 16, {"CPU": 1, "GPU": 1}),  # the cluster grows
        (plan(8, 1, fixed=False, concurrent=8), 8, {"CPU": 1, "GPU": 1}),
        (
            plan(8, 1, fixed=False, search=SearchConfig(name="optuna")),
            1,
            {"CPU": 1, "GPU": 1},
        ),  # it learns
        (plan(8, 4, fixed=False, workers=2), 2, {"CPU": 1, "GPU": 1}),
    ],
)
def test_capacity(capacity: TrialCapacity, concurrent: int, per_worker: dict[str, float]):
    assert (capacity.concurrent, capacity.per_worker, capacity.missing) == (concurrent, per_worker, "")
    assert capacity.settings["cluster.device"] == ("cuda" if "GPU" in per_worker else "cpu")


def test_no_room_for_one_trial():
    asked = {"cpus": 64, "gpus": 1, "workers": 2}
    expected = "a trial needs 2 workers; with 1 CPU and 1 GPU per worker the cluster has room for 1"
    with pytest.raises(EnvironmentProblem, match=expected) as caught:
        plan(**asked)
    assert "request less with workers, gpus_per_worker or cpus_per_worker" in str(caught.value)
    growing = plan(**asked, fixed=False)
    assert (growing.missing, growing.concurrent) == (expected, 1)


@pytest.mark.parametrize(
    ("workers", "cpus", "expected"),
    [(2, 2, (2, 2)), ("auto", 8, (2, 2)), ("auto", 1, (1, 1)), (WorkerRange(1, 4), 2, (1, 4))],
)
def test_workers(workers: Any, cpus: int, expected: tuple[int, int]):
    planned = plan_resources(ClusterConfig(workers=workers, device="cpu"), {"CPU": cpus}, fixed=True)
    assert (planned.fewest, planned.workers) == expected


def test_workers_and_trials_on_nodes_with_an_accelerator_and_other_resources():
    """On an H200, whose node has the resource ``accelerator_type:H200``."""
    wanted = ClusterConfig(workers=1, accelerator_type="H200", resources_per_worker=("rdma=1", "memory=1000000000"))
    on_h200 = {"CPU": 1, "GPU": 1, "accelerator_type:H200": 0.001, "rdma": 1.0, "memory": 1e9}
    node = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H200": 1.0, "rdma": 2.0, "memory": 8e9}
    assert plan_resources(wanted, node, fixed=True).per_worker == on_h200
    assert plan_trials(SweepConfig(), wanted, 4, [{"CPU": 8.0, "GPU": 2.0}, node], fixed=True).concurrent == 2


def test_more_than_a_machine_has():
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(EnvironmentProblem, match=f"1000000000 are too many, this machine has {cores} cores"):
        local_threads(ClusterConfig(cpus_per_worker=10**9))
    assert local_threads(ClusterConfig(cpus_per_worker=cores), 2) == cores


def test_more_than_a_cluster_has():
    with pytest.raises(EnvironmentProblem, match="2 workers need 128 CPUs, the cluster has 2") as caught:
        plan_resources(ClusterConfig(workers=2, cpus_per_worker=64, device="cpu"), {"CPU": 2}, fixed=True)
    assert caught.value.exit_code == 3
    at_least_three = ClusterConfig(workers=WorkerRange(3, 8), device="cpu")
    assert plan_resources(at_least_three, {"CPU": 2}, fixed=False).fewest == 3, "it can grow"

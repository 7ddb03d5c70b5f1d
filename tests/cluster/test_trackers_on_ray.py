"""W&B and MLflow where the run is a trial of a sweep."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from wandb_files import wandb_run

pytestmark = [
    pytest.mark.nightly,  # tests/trackers has all that does not need Ray
    pytest.mark.skipif(
        importlib.util.find_spec("mlflow") is None or importlib.util.find_spec("wandb") is None,
        reason="mlflow or wandb is not installed",
    ),
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")),
]
MARKER = "0123marker0123marker0123marker0123marker"  # as long as a key
SETTINGS = ("train.epochs=2", "log.mlflow.enabled=true", "log.wandb.enabled=true")


@pytest.fixture(autouse=True)
def _services(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", MARKER)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", MARKER)


def runs_at(server: str, experiment: str) -> list:
    from mlflow import MlflowClient

    client = MlflowClient(server)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def assert_keeps_the_key(folder: Path) -> None:
    assert [path for path in folder.rglob("*") if path.is_file() and MARKER.encode() in path.read_bytes()] == []


def test_trials_are_grouped_under_their_sweep(start_sweep, mlflow_server):
    sweep = start_sweep(*SETTINGS, "log.mlflow.experiment=sweeps", "trials=2", name="tracked")
    assert sweep.wait(1500) == 0, sweep.text()
    sent = runs_at(mlflow_server, "sweeps")
    assert sorted(run.info.run_name for run in sent) == ["tracked/trial-000", "tracked/trial-001"]
    assert {(run.info.status, run.data.tags["densenet_dist.sweep"]) for run in sent} == {("FINISHED", "tracked")}
    heads = [wandb_run(path)[0] for path in sweep.folder.glob("trial-*/wandb/offline-run-*/*.wandb")]
    groups = sorted((head.run_group, head.display_name) for head in heads)
    assert groups == [("tracked", "trial-000"), ("tracked", "trial-001")]
    assert_keeps_the_key(sweep.folder)

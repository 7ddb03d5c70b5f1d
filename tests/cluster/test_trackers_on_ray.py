"""W&B and MLflow where the run is a trial of a sweep."""

from __future__ import annotations

import importlib.util

import pytest
from ray_runs import bytes_of
from wandb_files import wandb_run

pytestmark = [
    pytest.mark.nightly,  # tests/trackers has all that does not need Ray
    pytest.mark.skipif(
        importlib.util.find_spec("mlflow") is None or importlib.util.find_spec("wandb") is None,
        reason="mlflow or wandb is not installed",
    ),
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")),
]


def test_trials_are_grouped_under_their_sweep(start_sweep, mlflow_server, monkeypatch):
    from mlflow import MlflowClient

    key = "0123marker0123marker0123marker0123marker"  # as long as a real one
    services = {"MLFLOW_TRACKING_URI": mlflow_server, "MLFLOW_TRACKING_USERNAME": "me", "WANDB_MODE": "offline"}
    for name, value in {**services, "MLFLOW_TRACKING_PASSWORD": key, "WANDB_API_KEY": key}.items():
        monkeypatch.setenv(name, value)
    settings = ("log.mlflow.enabled=true", "log.wandb.enabled=true", "log.mlflow.experiment=sweeps")
    sweep = start_sweep("train.epochs=2", *settings, "trials=2", name="tracked")
    assert sweep.wait(1500) == 0, sweep.text()
    client = MlflowClient(mlflow_server)
    sent = client.search_runs([client.get_experiment_by_name("sweeps").experiment_id])
    assert sorted(run.info.run_name for run in sent) == ["tracked/trial-000", "tracked/trial-001"]
    assert {(run.info.status, run.data.tags["densenet_dist.sweep"]) for run in sent} == {("FINISHED", "tracked")}
    heads = [wandb_run(path)[0] for path in sweep.folder.glob("trial-*/wandb/offline-run-*/*.wandb")]
    groups = sorted((head.run_group, head.display_name) for head in heads)
    assert groups == [("tracked", "trial-000"), ("tracked", "trial-001")]
    assert [name for name, content in bytes_of(sweep.folder).items() if key.encode() in content] == []

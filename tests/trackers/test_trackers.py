"""W&B (offline) and MLflow (a real server): the same figures, one run when resumed, and none lost without a server."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
from ray_runs import bytes_of, free_ports, until
from runs import notes_of, run_of, stop_after, tiny
from wandb_files import wandb_run

from densenet_dist.cluster.launch import fit as launch
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.trackers import _WANDB_SETTINGS, links, without_secrets

MARKER = "MARKER-d41d8cd98f00b204e980"  # stands for a key

needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
pytestmark = [
    pytest.mark.timeout(1800),  # MLflow's server takes eight seconds of CPU to start, on a busy machine minutes
    *(
        pytest.mark.filterwarnings(f"ignore::{kind}")
        for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning", "UserWarning:pydantic.*")
    ),
]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for as long as a busy machine needs: what W&B does not finish in time is not in its file."""
    for timeout in ("init_timeout", "finish_timeout", "x_service_wait"):
        monkeypatch.setitem(_WANDB_SETTINGS, timeout, 120)
    monkeypatch.setattr("densenet_dist.trackers._FINISH_TIMEOUT_S", 120.0)
    monkeypatch.setattr("densenet_dist.trackers._ABORT_TIMEOUT_S", 120.0)


@needs_mlflow
def test_a_resumed_run_goes_on_at_the_server(mlflow_server, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.replace("//", f"//user:{MARKER}@"))
    settings = ("train.epochs=3", "log.mlflow.enabled=true", "log.mlflow.experiment=mine")
    config = tiny(tmp_path, *settings)
    stop_after(2, config)
    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("mine")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"
    notes = notes_of(config)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "tiny"
    assert run.data.params["train.global_batch_size"] == "16"
    lines = run_of(config).read_records()
    for key in ("val/loss", "train/top1", "lr", "perf/images_per_s", "test/top1"):
        history = {(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)}
        assert {step for step, _ in history} == {line["global_step"] for line in lines if key in line}
        assert history >= {(line["global_step"], line[key]) for line in lines if key in line}
    assert run.data.metrics["test/loss"] == lines[-1]["test/loss"]
    url = f"{mlflow_server}/#/experiments/{experiment.experiment_id}/runs/{run.info.run_id}"
    assert f"MLflow: {url}" in notes
    assert links(run_of(config)) == {"MLflow": url}
    assert not any(MARKER.encode() in content for content in bytes_of(run_of(config).path).values())


@needs_mlflow
def test_a_run_without_a_server_is_trained_all_the_same_and_sent_later(mlflow_server, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", MARKER)

    gone = f"http://127.0.0.1:{free_ports(1)[0]}"
    config = tiny(tmp_path, "train.epochs=1", "log.mlflow.enabled=true", f"log.mlflow.tracking_uri={gone}")
    (note,) = [note for note in notes_of(config) if "MLflow" in note]
    assert "MLflow accepts no records; training continues" in note
    (run_of(config).path / "summary.json").unlink()  # it is to go on
    later = tiny(tmp_path, "train.epochs=2", "log.mlflow.enabled=true", f"log.mlflow.tracking_uri={mlflow_server}")
    notes_of(later)
    client = MlflowClient(mlflow_server)
    runs = client.search_runs([client.get_experiment_by_name("densenet-dist").experiment_id])
    (run,) = (run for run in runs if run.data.tags["densenet_dist.folder"] == run_of(config).uri)
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val/loss")] == [5, 10]


@needs_wandb
def test_offline_files_hold_the_run_and_no_key(tmp_path, monkeypatch):
    key = MARKER.replace("-", "").lower().ljust(40, "0")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", MARKER)
    config = tiny(tmp_path, "train.epochs=2", "log.wandb.enabled=true", "log.wandb.project=mine")
    (run_of(config).path).mkdir(parents=True)
    (run_of(config).path / "trial.json").write_text("{}")  # it is a trial of a sweep
    stop_after(1, config)
    assert [note for note in notes_of(config) if "W&B" in note] == []

    def written() -> list[tuple[Any, list[dict[str, Any]]]] | None:
        parts = [wandb_run(path) for path in sorted(run_of(config).path.glob("wandb/offline-run-*/*.wandb"))]
        return parts if all(run is not None for run, _ in parts) else None

    parts = until(written)  # W&B's own process writes a file when its run has finished
    (first, _), (second, _) = parts
    assert (first.project, first.display_name, first.run_group) == ("mine", "tiny", tmp_path.name)
    assert first.run_id == second.run_id
    assert {item.key or item.nested_key[0]: item.value_json for item in first.config.update}["train.epochs"] == "2"
    rows = [row for _, history in parts for row in history]
    lines = run_of(config).read_records()
    assert [(row["global_step"], row.get("val/loss")) for row in rows] == [
        (line["global_step"], line.get("val/loss")) for line in lines
    ]
    assert rows[-1]["test/top1"] == lines[-1]["test/top1"]
    state = json.loads((run_of(config).path / "trackers" / "wb.json").read_text())
    assert state == {"id": first.run_id, "url": None, "sent": 3}
    assert links(run_of(config)) == {}
    found = b"".join(bytes_of(run_of(config).path).values())
    assert MARKER.encode() not in found
    assert key.encode() not in found


@needs_wandb
def test_what_is_missing_is_said_and_nobody_is_asked(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(EnvironmentProblem, match="MLFLOW_TRACKING_URI"):
        launch(tiny(tmp_path, "log.mlflow.enabled=true"), listener=lambda event: None)
    real = importlib.util.find_spec
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda asked, n=name: None if asked == n else real(asked))
            with pytest.raises(EnvironmentProblem) as caught:
                launch(tiny(tmp_path, f"log.{name}.enabled=true"), listener=lambda event: None)
        assert f"\n  pip install {package} " in str(caught.value)
        assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []  # before any work
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    notes = notes_of(tiny(tmp_path, "train.epochs=1", "log.wandb.enabled=true"))
    assert [note for note in notes if "W&B accepts no records" in note and "set WANDB_API_KEY" in note]
    monkeypatch.setenv("WANDB_API_KEY", MARKER)
    assert without_secrets(f"GET https://me:pw@host/x failed with {MARKER}") == "GET https://***@host/x failed with ***"

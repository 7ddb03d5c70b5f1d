"""W&B (offline) and MLflow (a real server): the same figures, one run when resumed, and none lost without a server."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import run_of, tiny, train

from densenet_dist.cluster.launch import fit as launch
from densenet_dist.errors import ConfigError, EnvironmentProblem
from densenet_dist.train.logs import read_records
from densenet_dist.train.trackers import without_secrets

MARKER = "MARKER-d41d8cd98f00b204e980"  # stands for a key

needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
# Both import packages that use what Python and pydantic have deprecated.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning", "UserWarning:pydantic.*")
]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends wait for as long as a busy machine needs."""
    monkeypatch.setattr("densenet_dist.train.trackers._END_S", 120.0)
    monkeypatch.setattr("densenet_dist.train.trackers._CUT_OFF_S", 120.0)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server."""
    folder, address = tmp_path_factory.mktemp("mlflow"), f"http://127.0.0.1:{free_port()}"
    port = address.rpartition(":")[2]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/m.db", "--artifacts-destination", str(folder / "files")]
    with open(folder / "log", "w") as log:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()[-2000:]
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def told(config, **how) -> list[str]:
    """Train; what was noted."""
    notes: list[str] = []
    train(config, listener=lambda event: event["kind"] == "note" and notes.append(event["text"]), **how)
    return notes


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@needs_mlflow
def test_a_resumed_run_goes_on_at_the_server(server, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.replace("//", f"//user:{MARKER}@"))
    settings = ("train.epochs=3", "log.mlflow.enabled=true", "log.mlflow.experiment=mine")
    config = tiny(tmp_path, *settings)

    def cut(event):
        if event["kind"] == "epoch" and event["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, listener=cut)
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("mine")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"
    notes = told(config)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "tiny"
    assert run.data.params["train.global_batch_size"] == "16"
    lines = read_records(run_of(config).path / "metrics.jsonl")
    for key in ("val/loss", "train/top1", "lr", "perf/images_per_s", "test/top1"):
        history = {(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)}
        assert {step for step, _ in history} == {line["global_step"] for line in lines if key in line}
        assert history >= {(line["global_step"], line[key]) for line in lines if key in line}
    assert run.data.metrics["test/loss"] == lines[-1]["test/loss"]
    assert any(f"MLflow: {server}/#/experiments/{experiment.experiment_id}/runs/{run.info.run_id}" in n for n in notes)
    assert MARKER.encode() not in everything_in(run_of(config).path)


@needs_mlflow
def test_a_run_without_a_server_is_trained_all_the_same_and_sent_later(server, tmp_path):
    from mlflow import MlflowClient

    gone = f"http://127.0.0.1:{free_port()}"
    config = tiny(tmp_path, "train.epochs=2", "log.mlflow.enabled=true", f"log.mlflow.tracking_uri={gone}")
    notes: list[str] = []

    def cut(event):
        if event["kind"] == "note":
            notes.append(event["text"])
        if event["kind"] == "epoch" and event["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, listener=cut)
    later = tiny(tmp_path, "train.epochs=2", "log.mlflow.enabled=true", f"log.mlflow.tracking_uri={server}")
    told(later)
    client = MlflowClient(server)
    runs = client.search_runs([client.get_experiment_by_name("densenet-dist").experiment_id])
    (run,) = (run for run in runs if run.data.tags["densenet_dist.folder"] == run_of(config).uri)
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val/loss")] == [5, 10]


@needs_mlflow
def test_a_server_that_never_answers_costs_a_note(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    gone = f"http://127.0.0.1:{free_port()}"
    config = tiny(tmp_path, "train.epochs=1", "log.mlflow.enabled=true", f"log.mlflow.tracking_uri={gone}")
    notes = [note for note in told(config) if "MLflow" in note]
    assert len(notes) == 1
    assert "MLflow cannot be reached; training goes on" in notes[0]
    assert json.loads((run_of(config).path / "summary.json").read_text())["status"] == "finished"


@needs_wandb
def test_offline_files_hold_the_run_and_no_key(tmp_path, monkeypatch):
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", MARKER.replace("-", "").lower().ljust(40, "0"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", MARKER)
    config = tiny(tmp_path, "train.epochs=2", "log.wandb.enabled=true", "log.wandb.project=mine")
    (run_of(config).path).mkdir(parents=True)
    (run_of(config).path / "trial.json").write_text("{}")  # it is a trial of a sweep
    assert [note for note in told(config) if "W&B" in note] == []
    (path,) = run_of(config).path.glob("wandb/offline-run-*/*.wandb")
    store, history, head = DataStore(), [], None
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            head = record.run
        elif record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    assert (head.project, head.display_name, head.run_group) == ("mine", "tiny", tmp_path.name)
    assert {item.key or item.nested_key[0]: item.value_json for item in head.config.update}["train.epochs"] == "2"
    lines = read_records(run_of(config).path / "metrics.jsonl")
    assert [(row["global_step"], row.get("val/loss")) for row in history] == [
        (line["global_step"], line.get("val/loss")) for line in lines
    ]
    assert history[-1]["test/top1"] == lines[-1]["test/top1"]
    state = json.loads((run_of(config).path / "trackers" / "wb.json").read_text())
    assert state == {"id": head.run_id, "url": None, "sent": 3}
    found = everything_in(run_of(config).path)
    assert MARKER.encode() not in found
    assert MARKER.replace("-", "").lower().encode() not in found


@needs_wandb
def test_without_a_key_nobody_is_asked(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    notes = told(tiny(tmp_path, "train.epochs=1", "log.wandb.enabled=true"))
    assert [note for note in notes if "W&B cannot be reached" in note and "set WANDB_API_KEY" in note]


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_missing_package_is_said_before_any_work(tmp_path, monkeypatch, name, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else real(asked))
    with pytest.raises(EnvironmentProblem, match=rf"log\.{name}.*\n  pip install {package} ") as caught:
        launch(tiny(tmp_path, f"log.{name}.enabled=true"), listener=lambda event: None)
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


@needs_mlflow
def test_mlflow_wants_to_know_where(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(EnvironmentProblem, match="MLFLOW_TRACKING_URI"):
        launch(tiny(tmp_path, "log.mlflow.enabled=true"), listener=lambda event: None)


def test_an_address_may_hold_no_password(tmp_path):
    with pytest.raises(
        ConfigError, match=r"log\.mlflow\.tracking_uri: holds credentials.*MLFLOW_TRACKING_PASS"
    ) as error:
        tiny(tmp_path, f"log.mlflow.tracking_uri=http://me:{MARKER}@host")
    assert MARKER not in str(error.value)


def test_messages_tell_no_secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", MARKER)
    assert without_secrets(f"GET https://me:pw@host/x failed with {MARKER}") == "GET https://host/x failed with ..."

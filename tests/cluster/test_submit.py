"""`densenet-dist submit` without a cluster: what is not sent, and interrupts."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from densenet_dist.cli import app
from densenet_dist.cluster import submit
from densenet_dist.cluster.signals import handled_by
from densenet_dist.cluster.submit import prepare, send
from densenet_dist.errors import ConfigError, EnvironmentProblem

pytestmark = pytest.mark.timeout(60)
REPOSITORY = Path(__file__).parents[2]


class FakeClient:
    """A cluster with one job, as Ray's client sees it."""

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.ended = False
        self.interrupt_at = ""

    def submit_job(self, **job: Any) -> None:
        self._interrupt("send")

    def get_job_info(self, job: str) -> Any:
        value = "RUNNING" if not self.ended else "FAILED" if self.exit_code else "SUCCEEDED"
        status = SimpleNamespace(value=value, is_terminal=lambda: value != "RUNNING")
        return SimpleNamespace(status=status, message="", driver_exit_code=self.exit_code)

    def get_job_logs(self, job: str) -> str:
        self._interrupt("follow")
        before, self.ended = self.ended, True
        return "epoch 1\nepoch 2\n" if before else "epoch 1\n"

    def _interrupt(self, moment: str) -> None:
        if moment == self.interrupt_at:  # while the request waits
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            threading.Event().wait()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    client = FakeClient()
    monkeypatch.setattr(submit, "_client", lambda address: client)
    return client


@pytest.mark.parametrize(("expected", "end"), [(5, "failed"), (0, "succeeded")])
def test_the_exit_code_is_that_of_the_command_and_all_output_is_shown(client, expected, end):
    client.exit_code = expected
    result = CliRunner().invoke(app, ["submit", "--address", "http://nowhere", "doctor"])
    assert result.exit_code == expected, result.output
    assert re.search(rf"^epoch 1\nepoch 2\njob densenet-doctor-\S+ {end}$", result.output, re.MULTILINE)


@pytest.mark.parametrize("moment", ["send", "follow"])
def test_after_an_interrupt_the_job_continues(client, moment):
    client.interrupt_at = moment
    result = CliRunner().invoke(app, ["submit", "--address", "http://nowhere", "doctor"])
    assert result.exit_code == 130, result.output
    assert "the job may still be running" in result.output
    assert "ray job stop --address http://nowhere densenet-doctor-" in result.output


def test_a_closed_terminal_interrupts_but_not_under_nohup(monkeypatch):
    heard: list[int] = []
    before = signal.getsignal(signal.SIGHUP)
    with handled_by(lambda number, frame: heard.append(number)):
        os.kill(os.getpid(), signal.SIGHUP)
    assert heard == [signal.SIGHUP]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled_by(lambda number, frame: heard.append(number)):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert heard == [signal.SIGHUP, signal.SIGTERM]


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("train --quiet configs/quickstart.yaml", "storage: runs is relative"),
        ("train configs/quickstart.yaml storage=/shared train.lrr=1", "train.lrr"),
        ("train nowhere.yaml", "there is no file nowhere.yaml"),
        ("train {folder}/mine.yaml storage=/shared", "mine.yaml is not in the folder to upload"),
        ("dance", "the command to run is missing"),
        ("evaluate s3://bucket/runs/x?secret_key=MARKER", "holds credentials"),
        ("evaluate x data.root=s3://a:MARKER@b/c?scheme=http", "data.root: holds credentials"),
        ("evaluate x data={{root:s3://a:MARKER@b/c}}", "data: holds credentials"),
    ],
)
def test_what_cannot_work_is_not_sent(tmp_path, monkeypatch, command, problem):
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "mine.yaml").write_text("train: {epochs: 1}")
    with pytest.raises(ConfigError, match=problem) as caught:
        prepare(command.format(folder=tmp_path).split(), Path())
    assert "MARKER" not in str(caught.value)


def test_the_base_of_a_sweep_must_be_uploaded_too(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {epochs: 1}")
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "sweep.yaml").write_text("base: ../base.yaml\nspace: {train.lr: {choice: [0.1]}}")
    with pytest.raises(ConfigError, match=r"base\.yaml is not in the folder to upload"):
        prepare(["tune", str(tmp_path / "up" / "sweep.yaml"), "storage=/shared"], tmp_path / "up")


def test_a_cluster_that_is_not_there_and_no_password_in_what_is_said_of_it(tmp_path):
    job = prepare(["doctor"], tmp_path, "http://me:MARKER@127.0.0.1:9")
    said = r"there is no Ray cluster at http://\*\*\*@127.0.0.1:9(.|\n)*RAY_AUTH_TOKEN"
    with pytest.raises(EnvironmentProblem, match=said) as caught:
        send(job)
    assert "MARKER" not in f"{caught.value!r} {job.command('logs --follow')} {job.command('stop')}"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RAY_ADDRESS": "http://127.0.0.1:{silent}"}, "timed out"),
        ({"RAY_ADDRESS": "ray://127.0.0.1:10001"}, "http://HEAD:8265"),
        ({"RAY_ADDRESS": "http://10.0.0.9:8265", "http_proxy": "http://u:MARKER@127.0.0.1:9"}, "no_proxy"),
    ],
)
def test_a_cluster_that_does_not_answer(tmp_path, monkeypatch, variables, said):
    monkeypatch.setattr(submit, "_RESPONSE_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # it never answers
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(silent=server.getsockname()[1]))
        with pytest.raises(EnvironmentProblem, match=f"there is no Ray cluster at (.|\n)*{said}") as caught:
            send(prepare(["doctor"], tmp_path))
    assert "MARKER" not in str(caught.value)

"""`densenet-dist submit` without a cluster: what is not sent, and interrupts."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from densenet_dist.cli import app, submitting, training
from densenet_dist.cluster import submit
from densenet_dist.cluster.signals import handled_by
from densenet_dist.cluster.submit import Job, prepare, send
from densenet_dist.errors import ConfigError, EnvironmentProblem

pytestmark = pytest.mark.timeout(60)
REPOSITORY = Path(__file__).parents[2]


class FakeClient:
    """A cluster with one job at most, as Ray's client sees it."""

    def __init__(self) -> None:
        self.status: str | None = None
        self.exit_code: int | None = None
        self.stops = 0
        self.block_sending = self.silent = self.ends = False
        self.interrupt_at = ""
        self.forever = threading.Event()

    def submit_job(self, **job: Any) -> None:
        if self.interrupt_at == "send":
            os.kill(os.getpid(), signal.SIGINT)
        if self.block_sending:
            self.forever.wait()
        self.status = "FAILED" if self.exit_code else "RUNNING"

    def get_job_info(self, job: str) -> Any:
        ended = self.status != "RUNNING"
        status = SimpleNamespace(value=self.status, is_terminal=lambda: ended)
        return SimpleNamespace(status=status, message="", driver_exit_code=self.exit_code)

    def get_job_logs(self, job: str) -> str:
        interrupted, self.interrupt_at = self.interrupt_at == "follow", ""
        if interrupted and self.silent:  # while the request waits
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            self.forever.wait()
        if interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        before = self.status
        if self.ends:
            self.status = "SUCCEEDED"
        return "epoch 1\n" if before == "RUNNING" else "epoch 1\nepoch 2\n"

    def stop_job(self, job: str) -> bool:
        self.stops += 1
        if self.stops == 1:
            raise RuntimeError("the agent does not answer")
        if self.stops == 2:
            return False  # it has not started yet
        self.status = "STOPPED"
        return True


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    client = FakeClient()
    monkeypatch.setattr(submit, "_client", lambda address: client)
    monkeypatch.setattr("densenet_dist.cli.submitting._RESPONSE_TIMEOUT_S", 1.0)
    return client


def run(monkeypatch: pytest.MonkeyPatch, answer: bool | None) -> tuple[int, str]:
    """Exit code and output of ``submit doctor``, on a terminal where there is an answer to the question."""
    monkeypatch.setattr("densenet_dist.cli.submitting._confirms_stop", lambda number: bool(answer))
    result = CliRunner().invoke(app, ["submit", "--address", "http://nowhere", "doctor"])
    return result.exit_code, result.output


@pytest.mark.parametrize(("expected", "end"), [(5, "failed"), (0, "succeeded")])
def test_the_exit_code_is_that_of_the_command_and_all_output_is_shown(monkeypatch, client, expected, end):
    client.exit_code, client.ends = expected, expected == 0
    code, text = run(monkeypatch, answer=None)
    assert code == expected, text
    assert re.search(rf"^epoch 1\nepoch 2\njob densenet-doctor-\S+ {end}$", text, re.MULTILINE), text


@pytest.mark.parametrize(("moment", "silent"), [("send", False), ("follow", False), ("follow", True)])
def test_an_interrupted_job_is_ended_where_that_is_wanted(monkeypatch, client, moment, silent):
    client.interrupt_at, client.silent = moment, silent
    code, text = run(monkeypatch, answer=True)
    assert (code, client.status) == (130, "STOPPED"), text
    assert client.stops == 3, "until the cluster says that it was asked to end"


@pytest.mark.parametrize(
    ("moment", "blocked", "said"),
    [("follow", False, "the job continues"), ("send", True, "the cluster has not confirmed the job")],
)
def test_a_job_that_may_go_on_is_named(monkeypatch, client, moment, blocked, said):
    client.interrupt_at, client.block_sending = moment, blocked
    code, text = run(monkeypatch, answer=blocked)
    assert (code, client.status) == (130, None if blocked else "RUNNING"), text
    assert said in text
    assert "ray job stop --address http://nowhere densenet-doctor-" in text


def test_an_interrupt_that_python_drops_is_raised_again(client, monkeypatch):
    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)

    class Dropping:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    client.status = "RUNNING"
    try:
        with handled_by(submitting._interrupt), pytest.raises(KeyboardInterrupt):
            submit.follow(Job("job", "http://nowhere", "", ""), lambda piece: Dropping())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert [type(each.exc_value) for each in dropped] == [training.SignalInterrupt]


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
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}, "with RAY_AUTH_TOKEN\n.*comes from RAY_API_SERVER_ADDRESS$"),
        ({"RAY_ADDRESS": "http://127.0.0.1:{silent}"}, "timed out(.|\n)*comes from RAY_ADDRESS$"),
        (
            {"RAY_ADDRESS": "ray://127.0.0.1:10001"},
            "ray:// is .*the dashboard of the same cluster is http://HEAD:8265$",
        ),
        ({"RAY_ADDRESS": "http://10.0.0.9:8265", "http_proxy": "http://u:MARKER@127.0.0.1:9"}, "no_proxy=10.0.0.9$"),
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

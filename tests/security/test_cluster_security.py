"""A real head with a token: without it the Jobs API says 401, and `densenet-dist submit` says what to do; with it a job
takes no secrets along."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from ray_nodes import BIN, _free_ports, settings

from densenet_dist.cluster.submit import submit
from densenet_dist.errors import ConfigError

pytestmark = pytest.mark.slow
MARKER = "MARKER7f3a91c5"


class Head(NamedTuple):
    """A node of one CPU: its dashboard's address, the environment of those who may use it, and Ray's own folder."""

    address: str
    environment: dict[str, str]
    folder: Path


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    environment = settings()
    with tempfile.TemporaryDirectory(prefix="ddn-", dir="/tmp") as folder:
        port, dashboard, client, listen, grpc, metrics = _free_ports(6)
        line = [BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
                f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={listen}",
                f"--dashboard-agent-grpc-port={grpc}", f"--metrics-export-port={metrics}",
                f"--ray-client-server-port={client}", f"--temp-dir={folder}", "--num-cpus=1", "--num-gpus=0",
                "--object-store-memory=100000000", "--disable-usage-stats"]  # fmt: skip
        with open(Path(folder) / "log", "wb") as log:
            process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, env=environment)
        address, deadline = f"http://127.0.0.1:{dashboard}", time.monotonic() + 120
        try:
            while status(f"{address}/api/jobs/", environment["RAY_AUTH_TOKEN"]) != 200:
                assert process.poll() is None, (Path(folder) / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            yield Head(address, environment, Path(folder))
        finally:
            process.terminate()
            process.wait(60)


def status(url: str, token: str | None, body: object = None) -> int:
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def test_the_jobs_api_asks_for_the_token(head, tmp_path):
    address, environment, _ = head
    job = {"entrypoint": f"touch {tmp_path}/ran"}
    assert status(f"{address}/api/jobs/", None) == 401
    assert status(f"{address}/api/jobs/", None, job) == 401
    assert status(f"{address}/api/jobs/", "", job) in (401, 403)
    assert status(f"{address}/api/jobs/", "0" * 64, job) in (401, 403)
    assert status(f"{address}/api/jobs/", environment["RAY_AUTH_TOKEN"]) == 200
    assert not (tmp_path / "ran").exists()


def test_submit_without_the_token(head, tmp_path):
    address, environment, _ = head
    token = environment["RAY_AUTH_TOKEN"]
    line = [sys.executable, "-m", "densenet_dist", "submit", "--address", address, "doctor"]
    others = {key: value for key, value in environment.items() if not key.startswith("RAY_AUTH")} | {
        "HOME": str(tmp_path)
    }
    for wrong in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        done = subprocess.run(line, capture_output=True, text=True, env=others | wrong, cwd=tmp_path, timeout=100)
        assert done.returncode == 3, done.stdout + done.stderr
        assert "RAY_AUTH_TOKEN" in done.stderr
        assert token not in done.stdout + done.stderr


def test_a_job_takes_no_secrets_along(head, tmp_path):
    """Neither the sender's environment nor files of secrets in the folder that is sent."""
    for name in (".env", ".env.local", ".netrc", "id.pem", "tls.key", ".aws/credentials", ".ssh/id_rsa"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(MARKER)
    (tmp_path / "sent.txt").write_text("SENT5b20")
    line = [
        sys.executable,
        "-m",
        "densenet_dist",
        "submit",
        "--address",
        head.address,
        "doctor",
        "cluster.engine=local",
    ]
    secrets = {"HF_TOKEN": MARKER, "AWS_SESSION_TOKEN": MARKER, "MLFLOW_TRACKING_URI": f"https://u:{MARKER}@host"}
    done = subprocess.run(
        line, capture_output=True, text=True, env=head.environment | secrets, cwd=tmp_path, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert MARKER not in done.stdout + done.stderr
    request = urllib.request.Request(f"{head.address}/api/jobs/")
    request.add_header("Authorization", f"Bearer {head.environment['RAY_AUTH_TOKEN']}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        [job] = json.loads(answer.read())
    assert set(job["runtime_env"]) == {"working_dir", "excludes"}
    assert MARKER not in json.dumps(job)
    kept = [path for path in head.folder.rglob("*") if path.is_file()]
    assert [path for path in kept if path.name == "sent.txt" and path.read_text() == "SENT5b20"]
    assert [path for path in kept if MARKER.encode() in path.read_bytes()] == []


def test_credentials_in_a_jobs_command_are_not_sent(tmp_path):
    for argument in (
        "s3://key:MARKER@bucket/runs/x",
        "s3://bucket/runs/x?secret_key=MARKER",
        "data.root=s3://a:MARKER@b/c",
    ):
        with pytest.raises(ConfigError, match="holds credentials") as caught:
            submit(["evaluate", argument], tmp_path, "http://127.0.0.1:9")
        assert "MARKER" not in str(caught.value)

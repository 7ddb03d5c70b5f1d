"""Jobs on clusters of two nodes with a token: nodes side by side, and hosts with addresses of their own."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import blocks
from ray_nodes import OUTSIDE, Cluster, two_hosts, two_nodes
from ray_runs import until
from s3_server import bucket

from densenet_dist.run_folder import RunFolder
from densenet_dist.yaml_settings import read_yaml

REPOSITORY = Path(__file__).parents[2]
QUICK = ("configs/quickstart.yaml", "cluster.workers=2", "data={limit: 640, test_limit: 640}", "train.epochs=2",
         "model.growth_rate=4", "model.num_layers=[1,1]")  # fmt: skip
ENDLESS = (*QUICK, "train.epochs=100000")
MARKER = secrets.token_hex(16)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """Two nodes side by side."""
    with two_nodes() as cluster:
        yield cluster


def submit(cluster: Cluster, *arguments: str, **options: object) -> subprocess.Popen[str]:
    return cluster.densenet_dist("submit", "--address", cluster.address, *arguments, **{"cwd": REPOSITORY} | options)


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    text = process.communicate(timeout=240)[0]
    assert process.returncode == code, text
    return text


def status_of(folder: RunFolder) -> object:
    return json.loads(folder.fetch("summary.json").read_text())["status"]


def test_a_job_trains_on_both_nodes(nodes, tmp_path):
    process = submit(nodes, "train", *QUICK, f"storage={tmp_path}", "name=both")
    raylets = set()
    while process.poll() is None and len(raylets) < 2:
        raylets.update(worker.ppid() for worker in nodes.workers())
    text = finished(process)
    assert len(raylets) == 2, text
    assert not re.search(r"packaging.py|sdk.py", text), "what Ray packs"
    assert "2 x CPU" in text
    assert [line.split()[1] for line in text.splitlines() if line.startswith("epoch")][-1] == "2/2"
    assert re.search(r"job both-\d{8}-\d{6}-\d+ succeeded$", text.strip())
    assert status_of(RunFolder(str(tmp_path), "both")) == "finished"
    assert (tmp_path / "both" / "report.html").exists(), "a job's files do not lie in its working directory"


@pytest.mark.nightly
def test_workers_import_custom_parts_from_the_working_directory(nodes, tmp_path):
    """It is uploaded to a cluster that a run or sweep joins, and with a job."""
    (tmp_path / "my_parts.py").write_text(blocks(REPOSITORY / "docs" / "extending.md", "python")[0].text)
    (tmp_path / "sweep.yaml").write_text(
        "scheduler.name: fifo\nspace: {options.loss.gamma: [0, 2], train.loss: [my_parts:focal]}\nsearch.name: grid\n"
    )
    parts = ("data.augment=my_parts:mirror", "train.loss=my_parts:focal", "callbacks=[my_parts:Best]")
    small = ("data.limit=100", "train.epochs=1", f"storage={tmp_path}/runs", *parts)
    joined = (*small, f"cluster.address={nodes.nodes[1].args[3].partition('=')[2]}")
    finished(nodes.densenet_dist("train", "quickstart", *joined, "cluster.workers=2", "name=run", cwd=tmp_path))
    finished(nodes.densenet_dist("tune", "sweep.yaml", *joined, "name=sweep", cwd=tmp_path))
    job = ("submit", "--address", nodes.address, "train", "quickstart", *small, "name=job")
    finished(nodes.densenet_dist(*job, cwd=tmp_path))
    folders = [RunFolder(f"{tmp_path}/runs", name) for name in ("run", "job", "sweep/trial-000", "sweep/trial-001")]
    assert list(map(status_of, folders)) == ["finished"] * 4
    options = [read_yaml(folder.fetch("config.yaml"))["options"]["loss"]["gamma"] for folder in folders]
    assert options == [2.0, 2.0, 0.0, 2.0]


def test_after_an_interrupt_the_job_continues_until_it_is_stopped(nodes, tmp_path):
    process = submit(nodes, "train", *ENDLESS, f"storage={tmp_path}", "name=stopped")
    until((tmp_path / "stopped" / "metrics.jsonl").exists)
    process.send_signal(signal.SIGINT)
    shown = re.search(r"stop it: +(ray job stop .+)", finished(process, 130))
    assert nodes.workers()
    subprocess.run(shlex.split(shown[1]), env=nodes.environment, check=True, capture_output=True)
    until(lambda: not nodes.workers())
    assert json.loads((tmp_path / "stopped" / "checkpoints" / "manifest.json").read_text())["checkpoints"]


def test_a_wrong_token_is_refused_and_the_right_one_not_shown(nodes, tmp_path):
    without = {key: value for key, value in nodes.environment.items() if not key.startswith("RAY_AUTH")}
    without |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    text = finished(submit(nodes, "doctor", env=without, cwd=tmp_path), 3)
    assert "RAY_AUTH_TOKEN" in text
    assert nodes.environment["RAY_AUTH_TOKEN"] not in text


def test_a_job_takes_no_secrets_along(nodes, tmp_path):
    """Neither the sender's environment nor files of secrets in the folder that is sent."""
    for name in (".env", ".env.local", ".netrc", "id.pem", "tls.key", ".aws/credentials", ".ssh/id_rsa"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(MARKER)
    (tmp_path / "sent.txt").write_text("SENT5b20")
    ours = {"HF_TOKEN": MARKER, "AWS_SESSION_TOKEN": MARKER, "MLFLOW_TRACKING_URI": f"https://u:{MARKER}@host"}
    text = finished(submit(nodes, "doctor", "cluster.engine=local", env=nodes.environment | ours, cwd=tmp_path))
    assert MARKER not in text
    [job] = [job for job in nodes.ask("/api/jobs/") if "cluster.engine=local" in job["entrypoint"]]
    assert set(job["runtime_env"]) == {"working_dir", "excludes"}
    assert MARKER not in json.dumps(job)
    kept = [path for path in nodes.folder.rglob("*") if path.is_file()]
    assert [path for path in kept if path.name == "sent.txt" and path.read_text() == "SENT5b20"]
    assert [path for path in kept if MARKER.encode() in path.read_bytes()] == []


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Path]]:
    """Two hosts, and a folder that each has for itself."""
    local = tmp_path_factory.mktemp("local")
    try:
        with two_hosts(local) as cluster:
            yield cluster, local
    except PermissionError as error:
        pytest.skip(f"hosts with a network of their own cannot be made here: {error}")


@pytest.fixture(scope="module")
def store(hosts) -> Iterator[str]:
    """``s3://bucket%s?...`` of a server that both hosts reach."""
    with bucket(OUTSIDE) as address:
        yield address


@pytest.mark.nightly
def test_a_folder_that_only_one_host_sees_is_refused(hosts):
    cluster, local = hosts
    text = finished(submit(cluster, "train", *QUICK, f"storage={local}", "name=mine"), 5)
    assert re.search(rf"the run folder {local}/mine is not visible on node host[12]", text), text
    assert "s3://bucket/path" in text
    assert not re.search("^epoch", text, re.MULTILINE)


@pytest.mark.nightly
def test_hosts_share_an_object_store(hosts, store):
    cluster, _ = hosts
    text = finished(submit(cluster, "train", *QUICK, f"storage={store % '/runs'}", "name=objects"))
    folder = RunFolder(store % "/runs", "objects")
    assert status_of(folder) == "finished"
    assert folder.names("") >= {"config.yaml", "metrics.jsonl", "checkpoints", "tb", "report.html"}
    judged = cluster.densenet_dist("evaluate", store % "/runs/objects", "--json", cwd=REPOSITORY)
    assert f"{json.loads(finished(judged))['top1']:.2%}" in text


@pytest.mark.nightly
def test_a_sweep_on_hosts(hosts, tmp_path):
    cluster, _ = hosts
    tiny = ("trials=2", "train.epochs=1", "data={limit: 200, test_limit: 200}", "scheduler={name: fifo}", "workers=2")
    sweep = ("configs/sweep_quickstart.yaml", *tiny, f"storage={tmp_path}", "name=sweep")
    assert "best trial" in finished(submit(cluster, "tune", *sweep))
    statuses = [trial["status"] for trial in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"]]
    assert statuses == ["finished", "finished"]

"""Runs and sweeps whose object store fails now and then, or altogether: a real S3 server with faults."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from ray_runs import UNDISTURBED, Run, records, until

from densenet_dist.cluster.launch import fit
from densenet_dist.config import load_config
from densenet_dist.errors import StorageError
from densenet_dist.run_folder import RunFolder
from densenet_dist.train.evaluation import evaluate


def test_failing_requests_cost_retries_not_runs(start, s3, faulty_s3, faults, undisturbed, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # Unix sockets lie in it
    faults.failing = 0.05
    run = start(*UNDISTURBED, f"storage={faulty_s3 % '/flaky'}")
    assert run.wait() == 0, run.text()
    assert faults.failed >= 10, f"{faults.failed} of {len(faults.seen)} requests: no test of anything"
    assert "started again" not in run.text()
    assert "s3://bucket/flaky/run" in run.text()
    assert not run.folder.exists(), "nothing of it lies on the disk"
    assert list((tmp_path / "temporary").glob("densenet_dist-*")) == []
    folder = RunFolder(s3 % "/flaky", "run")
    assert folder.names("") >= {"config.yaml", "metrics.jsonl", "summary.json", "report.html", "tb", "checkpoints"}
    for file in ("metrics.jsonl", "checkpoints/manifest.json"):
        folder.fetch(file)
    assert records(folder.path) == records(undisturbed.folder)
    for entry in json.loads((folder.path / "checkpoints/manifest.json").read_text())["checkpoints"]:
        here = folder.fetch(f"checkpoints/{entry['name']}") / "model.safetensors"
        there = undisturbed.folder / "checkpoints" / entry["name"] / "model.safetensors"
        assert here.read_bytes() == there.read_bytes()
    faults.failing = 0.0
    assert f"{evaluate(s3 % '/flaky/run')['top1']:.2%}" in run.text()
    with pytest.raises(StorageError, match="exists already"):
        fit(load_config(folder.fetch("config.yaml"), f"storage={s3 % '/flaky'}"), listener=list)


def test_temporary_folders_of_killed_processes_are_deleted_by_the_next_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    make = "import sys; from densenet_dist.object_store import temporary_folder; print(temporary_folder(), flush=True);"

    def start() -> subprocess.Popen[bytes]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", f"{make} sys.stdin.read()"], **pipes)
        assert process.stdout.readline()
        return process

    with start() as killed, start() as living:
        killed.kill()
        killed.wait()
        before = set(tmp_path.iterdir())
        assert len(before) == 2
        for folder in before:
            os.utime(folder / ".lock", (0, 0))  # they are not new
        subprocess.run([sys.executable, "-c", make], check=True)
        assert len(before & set(tmp_path.iterdir())) == 1
        living.stdin.close()
        living.wait()
    assert list(tmp_path.iterdir()) == []


def assert_says_that_it_is_gone(run: Run, folder: str) -> None:
    assert run.wait() == 5, run.text()
    assert re.search(rf"error: {folder}.* cannot be (read|written): .*NETWORK_CONNECTION", run.text())
    assert "Traceback" not in run.text()


@pytest.mark.nightly
def test_a_run_whose_store_is_gone(start, s3, faulty_s3, faults):
    run = start("train.epochs=12", f"storage={faulty_s3 % '/gone'}")
    folder = RunFolder(s3 % "/gone", "run")
    until(lambda: folder.exists("checkpoints/manifest.json"))
    faults.down = True
    assert_says_that_it_is_gone(run, "s3://bucket/gone/run")
    assert "resume with --resume" in run.text()


@pytest.mark.nightly
def test_a_sweep_whose_store_is_gone_can_go_on_later(start_sweep, s3, faulty_s3, faults):
    run = start_sweep("train.epochs=12", "trials=3", f"storage={faulty_s3 % '/sweeps'}", name="gone")
    trial = RunFolder(s3 % "/sweeps/gone", "trial-000")
    until(lambda: trial.exists("checkpoints/manifest.json"))
    faults.down = True
    assert_says_that_it_is_gone(run, "s3://bucket/sweeps/gone")
    causes = re.findall(r"trial-\d+ crashed; restarting: (.*)", run.text())
    assert all("cannot be" in cause or "lost" in cause for cause in causes), causes  # the error, not the hint below it
    line = [sys.executable, "-m", "densenet_dist", "tune", "--resume", s3 % "/sweeps/gone"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(RunFolder(s3 % "/sweeps", "gone").fetch("sweep.json").read_text())
    assert [(found["status"], found["epochs"]) for found in results["trials"]] == [("finished", 12)] * 3

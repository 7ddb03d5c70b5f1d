"""launch/start.py resumes what was started before; launch/local.sh runs a whole cluster and leaves nothing behind."""

from __future__ import annotations

import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ray_runs import until

from densenet_dist.run_folder import RunFolder


def test_what_exists_is_resumed_and_all_else_is_started(root, s3, tmp_path):
    starter = SimpleNamespace(**runpy.run_path(str(root / "launch" / "start.py")))
    for place in (str(tmp_path), s3 % "/launch"):
        given = [f"storage={place}", "name=first", "train.epochs=3"]
        base, question, query = place.partition("?")
        folder = RunFolder(place, "first")
        folder.create()
        for command in ("train", "tune"):
            assert starter.arguments(command, "some.yaml", *given) == [command, "some.yaml", *given]
        folder.write("config.yaml", "")
        there = f"{base}/first{question}{query}"
        assert starter.arguments("train", "some.yaml", *given) == ["train", "--resume", there, *given]
        assert starter.arguments("tune", "some.yaml", *given) == ["tune", "some.yaml", *given]
        folder.write("sweep.yaml", "")
        assert starter.arguments("tune", "some.yaml", *given) == ["tune", "--resume", there]  # with its own settings
        assert not starter.finished(*given)
        folder.write("summary.json", "{}")
        assert starter.finished(*given)
    with pytest.raises(SystemExit, match="must be given"):
        starter.arguments("train", "some.yaml", "name=first")


def test_the_script_passes_exit_codes_on(root, tmp_path):
    def run(*arguments):
        command = [sys.executable, root / "launch" / "start.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    assert run("evaluate").returncode == 1
    assert run("finished", f"storage={tmp_path}", "name=first").returncode == 1
    refused = run("train", "quickstart", f"storage={tmp_path}", "name=first", "train.epochs=0")
    assert refused.returncode == 2
    assert "train.epochs" in refused.stderr


class LocalCluster:
    """launch/local.sh in a copy of what it needs, so that runs/ and data/ are not the repository's."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder, self.output = folder, folder.parent / "output.txt"
        for name in ("configs", "densenet_dist", "launch"):
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / ".gitignore").write_text(".venv\n")

    def start(self, *settings: str) -> subprocess.Popen[str]:
        small = ["data.limit=320", "data.loader=torch", "model.num_layers=[1,1]", "model.growth_rate=4"]
        command = ["bash", self.folder / "launch" / "local.sh", *small, *settings]
        with open(self.output, "w") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True)

    def wait_until_nothing_is_left(self) -> None:
        """Until no process has its folder in its command line."""

        def found() -> bool:
            lines = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
            return any(str(self.folder) in line for line in lines)

        until(lambda: not found(), 15)


@pytest.mark.parametrize(("epochs", "code"), [(0, 1), pytest.param(1, 0, marks=pytest.mark.nightly)])
def test_locally_two_workers_train_and_nothing_is_left_behind(root, tmp_path, epochs, code):
    local = LocalCluster(root, tmp_path / "project")
    process = local.start(f"train.epochs={epochs}")
    assert process.wait(300) == code, local.output.read_text()
    assert ("train.epochs" if code else "2 x CPU") in local.output.read_text()
    assert len(list(local.folder.glob("runs/*/summary.json"))) == epochs
    local.wait_until_nothing_is_left()


@pytest.mark.nightly
def test_locally_an_interrupted_job_leaves_nothing_behind(root, tmp_path):
    local = LocalCluster(root, tmp_path / "project")
    process = local.start("train.epochs=500")
    until(lambda: "epoch   1/500" in local.output.read_text() or process.poll() is not None, 240)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143, local.output.read_text()
    local.wait_until_nothing_is_left()

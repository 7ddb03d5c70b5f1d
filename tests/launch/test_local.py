"""launch/local.sh: a real head, a real `ray job submit`, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multinode]

SMALL = ["data.limit=320", "data.loader=torch", "model.num_layers=[1,1]", "model.growth_rate=4"]


class Project:
    """A copy of what local.sh needs, so that runs/ and data/ are not the repository's."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder, self.output = folder, folder.parent / "output.txt"
        for name in ("configs", "densenet_dist", "launch"):
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / ".gitignore").write_text(".venv\n")

    def start(self, *settings: str) -> subprocess.Popen[str]:
        with open(self.output, "w") as file:
            return subprocess.Popen(
                ["bash", self.folder / "launch" / "local.sh", *SMALL, *settings],
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def run(self) -> Path:
        (folder,) = (self.folder / "runs").iterdir()
        return folder

    def left_behind(self, name: str) -> list[str]:
        """Processes that have to do with the run, once they have had a moment to end."""
        deadline = time.monotonic() + 15
        while True:
            lines = []
            for process in psutil.process_iter(["pid", "cmdline"]):
                line = " ".join(process.info["cmdline"] or [])
                if name in line and process.pid != os.getpid():
                    lines.append(line)
            if not lines or time.monotonic() > deadline:
                return lines
            time.sleep(0.5)


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Project:
    return Project(root, tmp_path / "project")


def temporary_folders() -> set[str]:
    return {str(path) for path in Path("/tmp").glob("densenet-??????")}


@pytest.mark.nightly  # what it leaves behind, the next one looks for in every run
def test_two_workers_train_and_all_is_cleaned_up(project):
    before = temporary_folders()
    process = project.start("train.epochs=1")
    assert process.wait(300) == 0, project.output.read_text()
    text = project.output.read_text()
    assert "2 x CPU" in text
    assert "succeeded" in text
    run = project.run()
    assert (run / "summary.json").is_file()
    assert project.left_behind(run.name) == []
    assert temporary_folders() <= before


def test_ended_half_way_it_leaves_no_process(project):
    before = temporary_folders()
    process = project.start("train.epochs=500")
    deadline = time.monotonic() + 240
    while "epoch   1/500" not in project.output.read_text():
        assert process.poll() is None, project.output.read_text()
        assert time.monotonic() < deadline, project.output.read_text()
        time.sleep(0.2)
    (temp,) = temporary_folders() - before
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    run = project.run()
    assert project.left_behind(run.name) == []
    assert project.left_behind(temp) == []
    assert temporary_folders() <= before
    assert not (run / "summary.json").exists()


def test_a_command_that_cannot_work_fails(project):
    process = project.start("train.epochs=0")
    assert process.wait(240) == 1, project.output.read_text()
    assert "train.epochs" in project.output.read_text()

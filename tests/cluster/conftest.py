"""Runs the command as a user does: a process of its own, real Ray, a tiny model on generated images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

TINY = """
model: {variant: densenet_bc, growth_rate: 4, num_layers: [1, 1], drop_rate: 0.1}
data: {name: shapes, limit: 640, loader: torch}
train: {epochs: 3, global_batch_size: 64, lr: 0.05, schedule: {name: one_cycle}}
"""
SWEEP = """
trials: 4
scheduler: {name: fifo}
settings:
  model: {variant: densenet_bc, growth_rate: 4, num_layers: [1, 1], drop_rate: 0.1}
  data: {name: shapes, limit: 75, prefetch: 1, loader: torch}
  train: {epochs: 4, global_batch_size: 16, eval_batch_size: 20, lr: 0.05}
space:
  train.lr: {loguniform: [0.001, 0.5]}
"""
UNDISTURBED = ("train.epochs=4", "checkpoint.every_steps=4", "data.augment=notebook", "train.ema_decay=0.9")


@dataclass
class Run:
    """A command under way: its process, what it printed so far, and the run's folder."""

    process: subprocess.Popen[str]
    folder: Path
    output: Path
    command: str = "train"

    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, text: str, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.text():
            assert self.process.poll() is None, f"the command ended without printing {text!r}:\n{self.text()}"
            assert time.monotonic() < deadline, f"{text!r} was not printed in {seconds} s:\n{self.text()}"
            time.sleep(0.05)

    def wait(self, seconds: float = 400) -> int:
        return self.process.wait(seconds)

    def again(self) -> subprocess.CompletedProcess[str]:
        """Resume it, in the foreground."""
        command = [sys.executable, "-m", "densenet_dist", self.command, "--resume", str(self.folder)]
        return subprocess.run(command, capture_output=True, text=True)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill_all(self) -> None:
        """End every process of the run at once, as a power cut would."""
        if self.process.poll() is None:
            for process in [*self.descendants(), self.process]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            self.process.wait()

    def workers(self) -> list[psutil.Process]:
        return [child for child in self.descendants() if "RayTrainWorker" in " ".join(child.cmdline())]


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start ``densenet-dist train`` on a tiny configuration; everything it leaves behind is killed at the end."""
    with _starter(tmp_path) as begin:
        yield begin


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A finished run that nothing happened to, for others to be compared with."""
    with _starter(tmp_path_factory.mktemp("undisturbed")) as begin:
        run = begin(*UNDISTURBED)
        assert run.wait() == 0, run.text()
        yield run


@pytest.fixture(scope="module")
def start_sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start ``densenet-dist tune`` on a tiny sweep, for all tests of a module side by side under names of their own."""
    with _starter(tmp_path_factory.mktemp("sweeps"), "tune", SWEEP) as begin:
        yield begin


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """The tiny configuration, as a file says it."""
    return TINY


@pytest.fixture
def sweep_text() -> str:
    """The tiny sweep, as a file says it."""
    return SWEEP


@contextmanager
def _starter(tmp_path: Path, subcommand: str = "train", text: str = TINY) -> Iterator[Start]:
    config = tmp_path / "tiny.yaml"
    config.write_text(text)
    started: list[Run] = []

    def begin(*arguments: str, name: str = "run", engine: str = "ray", resume: bool = False) -> Run:
        folder = tmp_path / "runs" / name
        what = ["--resume", str(folder)] if resume else [str(config), f"name={name}", f"cluster.engine={engine}"]
        place = [] if resume else [f"storage={tmp_path / 'runs'}"]
        command = [sys.executable, "-m", "densenet_dist", subcommand, *what, *place, *arguments]
        output = tmp_path / f"output-{len(started)}.txt"
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        with open(output, "w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True, env=environment)
        started.append(Run(process, folder, output, subcommand))
        return started[-1]

    try:
        yield begin
    finally:
        for run in started:
            run.kill_all()


def records(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "seconds", "perf/", "goodput/")
    return [{key: value for key, value in line.items() if not key.startswith(clock)} for line in lines]


def weights(folder: Path) -> bytes:
    """The newest checkpoint's weights, as they lie on disk."""
    manifest = json.loads((folder / "checkpoints" / "manifest.json").read_text())
    return (folder / "checkpoints" / manifest["checkpoints"][-1]["name"] / "model.safetensors").read_bytes()


@pytest.fixture
def read_records() -> Callable[[Path], list[dict[str, float]]]:
    return records


@pytest.fixture
def read_weights() -> Callable[[Path], bytes]:
    return weights


@pytest.fixture(scope="session")
def same_settings() -> tuple[str, ...]:
    """The settings of the undisturbed run."""
    return UNDISTURBED

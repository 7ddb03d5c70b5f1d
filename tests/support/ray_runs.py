"""Runs and sweeps as a user starts them: a process of their own, real Ray, a tiny model on generated images."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

TINY = """
model: {variant: densenet_bc, growth_rate: 4, num_layers: [1, 1], drop_rate: 0.1}
data: {name: shapes, limit: 640, test_limit: 640, loader: torch}
train: {epochs: 3, global_batch_size: 64, lr: 0.05, schedule: {name: one_cycle}}
"""
SWEEP = """
trials: 4
scheduler: {name: fifo}
settings:
  model: {variant: densenet_bc, growth_rate: 4, num_layers: [1, 1], drop_rate: 0.1}
  data: {name: shapes, limit: 75, test_limit: 75, prefetch: 1, loader: torch}
  train: {epochs: 4, global_batch_size: 16, eval_batch_size: 20, lr: 0.05}
space:
  train.lr: {loguniform: [0.001, 0.5]}
"""
UNDISTURBED = ("train.epochs=4", "checkpoint.every_steps=4", "data.augment=notebook", "train.ema_decay=0.9")
"""Settings of the run that others are compared with."""
CLOCK = ("time", "seconds", "perf/", "goodput/", "slowest", "step/images_per_s")
"""What records of two equal runs may differ in."""
OF_TRIALS = ("TrialRunner", "ResourceTrainable", "RayTrainWorker", "TrainController", "Coordinator")
RAY_NOISE = re.compile(r"raylet|\(pid=|WARNING|INFO|ray::|ray\.tune|dashboard|deprecat|Traceback", re.IGNORECASE)


@dataclass
class Run:
    """A command under way: its process, the run's folder, and the file that has its output."""

    process: subprocess.Popen[str]
    folder: Path
    output: Path

    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, text: str) -> None:
        """Wait until it has printed something."""

        def printed() -> bool:
            ended = self.process.poll() is not None
            assert text in self.text() or not ended, f"the command ended without printing {text!r}:\n{self.text()}"
            return text in self.text()

        until(printed, 400)

    def interrupt(self, number: int) -> None:
        """Send it a signal; SIGHUP to all its processes, as a closing terminal does."""
        os.killpg(self.process.pid, number) if number == signal.SIGHUP else self.process.send_signal(number)

    def wait(self, seconds: float = 400) -> int:
        return self.process.wait(seconds)

    def descendants(self) -> list[psutil.Process]:
        """Every process that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)


Start = Callable[..., Run]


@contextmanager
def starter(place: Path, subcommand: str, text: str) -> Iterator[Start]:
    """Yield a function that starts a command on a configuration; what it leaves behind is killed at the end."""
    config = place / "tiny.yaml"
    config.write_text(text)
    started: list[Run] = []

    def start(*arguments: str, name: str = "run", resume: bool = False) -> Run:
        folder = place / "runs" / name
        what = ["--resume", str(folder)] if resume else [str(config), f"name={name}", f"storage={place / 'runs'}"]
        command = [sys.executable, "-m", "densenet_dist", subcommand, *what, *arguments]
        output = place / f"output-{len(started)}.txt"
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        with open(output, "w") as file:
            streams = {"stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, text=True, env=environment, process_group=0, **streams)
        started.append(Run(process, folder, output))
        return started[-1]

    try:
        yield start
    finally:
        for run in started:
            kill_tree(run.process)


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """End a process and all its descendants at once, as a power cut would."""
    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
    process.wait()


def free_ports(count: int) -> list[int]:
    """So many ports of this machine that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def until(condition: Callable[[], Any], seconds: float = 180) -> Any:
    """Wait for something, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited for {seconds:g} s in vain"
        time.sleep(0.05)
    return found


def is_ray_process(process: psutil.Process, *names: str) -> bool:
    """Whether it belongs to one of these actors, by default to a run or trial."""
    with suppress(psutil.Error):
        title = " ".join(process.cmdline()).strip()
        return title.startswith(tuple(f"ray::{name}" for name in names or OF_TRIALS))
    return False


def assert_gone(processes: list[psutil.Process]) -> None:
    """Require that they end; on a busy machine Ray's own take a while to notice that their node is gone."""
    _, alive = psutil.wait_procs(processes, timeout=90)
    # A dead child that nobody has reaped yet is no process any more: it holds nothing.
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def records(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(CLOCK)} for line in lines]


def epochs_of(folder: Path) -> list[int]:
    return [int(line["epoch"]) for line in records(folder) if "train/loss" in line]


def weights(folder: Path) -> bytes:
    """The newest checkpoint's weights, as they lie on disk."""
    manifest = json.loads((folder / "checkpoints" / "manifest.json").read_text())
    return (folder / "checkpoints" / manifest["checkpoints"][-1]["name"] / "model.safetensors").read_bytes()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

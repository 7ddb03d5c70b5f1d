"""For tests/chaos: starts real commands as processes of their own and watches them through their run folders."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import psutil
import pytest
from photos import write_photos
from ray_runs import CLOCK, is_ray_process, kill_tree, records, weights

TINY = (
    *("model.variant=densenet_bc", "model.growth_rate=4", "model.num_layers=[1,1]", "model.drop_rate=0.1"),
    *("data.name=shapes", "data.limit=640", "data.test_limit=640", "data.loader=torch", "data.prefetch=1"),
    *("train.epochs=6", "train.global_batch_size=64", "train.lr=0.05", "train.ema_decay=0.9"),
    *("checkpoint.every_steps=1", "cluster.device=cpu"),
)
"""A model of two layers on generated images: six epochs of nine steps."""
STEPS = 54
LOCAL = ("cluster.engine=local",)


@dataclass
class Started:
    """A command that was started, its run's folder, and the file with everything it prints."""

    process: subprocess.Popen[bytes]
    folder: Path
    output: Path

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def end_of_text(self) -> str:
        """For messages."""
        return f"\n{self.text[-2000:]}"

    @property
    def saved(self) -> int:
        """The step of the newest complete checkpoint; 0 without one."""
        with suppress(FileNotFoundError):
            names = [path.name for path in (self.folder / "checkpoints").iterdir()]
            return max((int(name[5:13]) for name in names if re.match(r"step-\d{8}", name)), default=0)
        return 0

    def end(self, code: int, *words: str, seconds: float = 240) -> None:
        """Wait for its end, which must have this exit code, and for words that it must have printed."""
        found = self.process.wait(seconds)
        assert found == code, f"exit code {found}, not {code}:{self.end_of_text}"
        self.require_said(*words)

    def fail(self, code: int, *words: str) -> None:
        """Wait for its end, which must have this exit code and a message with these words."""
        self.end(code, *words)
        assert "Traceback" not in self.text, f"a traceback:{self.end_of_text}"

    def require_said(self, *words: str) -> None:
        """Require that it has printed each of these."""
        for text in words:
            assert text in self.text, f"the output does not contain {text!r}:{self.end_of_text}"

    def finish_like(self, reference: Path, *words: str) -> None:
        """Wait for its end. Weights, records and TensorBoard must equal those of the undisturbed run."""
        self.end(0, *words)
        require_same(self.folder, reference)

    def wait_until(self, reached: Callable[[], bool], what: str, seconds: float = 180) -> float:
        """Look a hundred times a second; how long it took."""
        began = time.monotonic()
        while not reached():
            if self.process.poll() is not None:
                if reached():
                    break
                raise AssertionError(f"the command ended before {what}:{self.end_of_text}")
            assert time.monotonic() - began < seconds, f"no {what} within {seconds:g} s:{self.end_of_text}"
            time.sleep(0.01)
        return time.monotonic() - began

    def wait_for_step(self, step: int) -> float:
        """Until a checkpoint of that step, or of a later one, is complete."""
        return self.wait_until(lambda: self.saved >= step, f"the checkpoint of step {step}")

    def wait_for(self, text: str, seconds: float = 180) -> float:
        """Until it has printed that."""
        return self.wait_until(lambda: text in self.text, repr(text), seconds)

    def workers(self) -> list[psutil.Process]:
        """Ray Train's workers below it."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in children if is_ray_process(each, "RayTrainWorker")]

    def interrupt(self, number: int = signal.SIGTERM) -> float:
        """Send a signal and wait for the end, with the exit code of that signal; how long it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        self.end(128 + number, seconds=60)
        return time.monotonic() - began

    def kill_all(self) -> None:
        """Kill all its processes at once, as a power cut would."""
        kill_tree(self.process)


def cases(expected: str, *rows: tuple[Any, ...]) -> list[Any]:
    """For `pytest.mark.parametrize`: cases with one expectation, each an id, a fault and the values of the test."""
    return [pytest.param(*values, id=name, marks=pytest.mark.fault(fault, expected)) for name, fault, *values in rows]


class Lab:
    """Starts the commands of one case in an empty folder, and keeps what was observed.

    Its random numbers are seeded with the name of the case. All cases share the undisturbed runs.
    """

    _undisturbed: ClassVar[dict[tuple[str, ...], Path]] = {}

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.random = folder, Random(name)
        self._started: list[Started] = []
        self.observe("")

    def observe(self, text: str, count: int = 1) -> None:
        """Keep what came of the case, and how many faults were injected or inputs tried, for the page."""
        self.observed, self.count = text, count

    def begin(
        self,
        *settings: str,
        resume: Path | str | None = None,
        name: str | None = None,
        storage: str | None = None,
        environment: Mapping[str, str] | None = None,
        launcher: Iterable[str] = (),
    ) -> Started:
        """Start a run of the tiny configuration with these settings, or resume one."""
        name = name or (str(resume).rpartition("/")[2] if resume else f"run-{len(self._started)}")
        if resume:
            what = ["--resume", str(resume)]
        else:
            config = self.folder / f"{name}.yaml"
            config.write_text("{}\n")
            what = [str(config), f"name={name}", f"storage={storage or self.folder}", *TINY]
        command = [*(launcher or [sys.executable]), "-m", "densenet_dist", "train", *what, *settings]
        return self.run(command, self.folder / name, environment)

    def begin_ranks(self, number: int, *settings: str, resume: Path | None = None) -> Started:
        """The same with so many ranks of torchrun."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
        return self.begin(*settings, resume=resume, launcher=launcher, environment={"OMP_NUM_THREADS": "1"})

    def run(self, command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> Started:
        """Start any command; the folder is that of its run."""
        output = self.folder / f"output-{len(self._started)}.txt"
        environment = {**os.environ, **(environment or {})}
        with output.open("wb") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment, cwd=self.folder)
        self._started.append(Started(process, folder, output))
        return self._started[-1]

    def begin_and_kill(self, step: int, *settings: str) -> Started:
        """A local run that was killed once the checkpoint of that step was complete."""
        run = self.begin(*LOCAL, *settings)
        run.wait_for_step(step)
        run.kill_all()
        return run

    def undisturbed(self, *settings: str) -> Path:
        """The folder of a finished run of these settings that nothing happened to; trained once a session."""
        if settings not in self._undisturbed:
            run = self.begin(*settings, name="undisturbed")
            run.end(0)
            self._undisturbed[settings] = run.folder
        return self._undisturbed[settings]

    def kill_everything(self) -> None:
        """End whatever still runs."""
        for run in self._started:
            run.kill_all()


def write_pictures(folder: Path, *labels: str) -> tuple[str, ...]:
    """Write 64 pictures in a folder for each label; the settings of a run with this data set."""
    write_photos(folder, labels, 64)
    return "data.name=folder", f"data.root={folder}", "data.image_size=32", "data.limit=null"


def require_same(folder: Path, reference: Path) -> None:
    """Require that two finished runs are equal bit for bit, except for what depends on the clock."""
    for what, of in (("weights", weights), ("metrics.jsonl", records), ("TensorBoard", scalars)):
        assert of(folder) == of(reference), f"{what} of {folder.name} differ from those of the undisturbed run"


def largest_difference_of_losses(folder: Path, reference: Path) -> float:
    """Over all epochs of two runs."""
    pairs = zip(records(folder), records(reference), strict=True)
    return max(abs(one[key] - other[key]) for one, other in pairs for key in one if key.endswith("/loss"))


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "checkpoints" / "manifest.json").read_text())
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every curve in TensorBoard that does not depend on the clock."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # a line for each restart
    board = EventAccumulator(str(folder / "tb"))
    board.Reload()
    tags = [tag for tag in board.Tags()["scalars"] if not tag.startswith(CLOCK)]
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}

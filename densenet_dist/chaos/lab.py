"""Where faults are injected: real commands in processes of their own, watched through their run folders."""

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
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import psutil

from densenet_dist.run_folder import CHECKPOINTS_FOLDER, METRICS_FILE, TENSORBOARD_FOLDER

TINY: Final = (
    *("model.variant=densenet_bc", "model.growth_rate=4", "model.num_layers=[1,1]", "model.drop_rate=0.1"),
    *("data.name=shapes", "data.limit=640", "data.loader=torch", "data.prefetch=1"),
    *("train.epochs=6", "train.global_batch_size=64", "train.lr=0.05", "train.ema_decay=0.9"),
    *("checkpoint.every_steps=1", "cluster.device=cpu"),
)
"""A net of two layers on generated images: six epochs of nine steps."""
STEPS: Final = 54
_CLOCK: Final = ("time", "seconds", "perf/", "goodput/")


class Unexpected(Exception):
    """A case did not come out as it should."""


class Skipped(Exception):
    """A case cannot be tried here; says why."""


@dataclass(frozen=True)
class Observed:
    """What a case came to.

    Attributes:
        text: in words.
        count: how many faults were injected, or inputs tried.
        figures: measured, by name: of all cases together the page gives medians.
    """

    text: str
    count: int = 1
    figures: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass
class Started:
    """A command under way.

    Attributes:
        folder: of the run.
        output: the file with all that it printed.
    """

    process: subprocess.Popen[bytes]
    folder: Path
    output: Path

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text()

    @property
    def saved(self) -> int:
        """The step of the newest complete checkpoint; 0 where there is none."""
        return newest_step(self.folder)

    def wait(self, seconds: float = 240) -> int:
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Unexpected(f"the command did not end within {seconds:g} s:\n{self.text[-2000:]}") from None

    def wait_until(self, reached: Callable[[], bool], what: str, seconds: float = 180) -> float:
        """Look a hundred times a second; how long it took."""
        began = time.monotonic()
        while not reached():
            if self.process.poll() is not None:
                if reached():
                    break
                raise Unexpected(f"the command ended before {what}:\n{self.text[-2000:]}")
            if time.monotonic() - began > seconds:
                raise Unexpected(f"no {what} within {seconds:g} s:\n{self.text[-2000:]}")
            time.sleep(0.01)
        return time.monotonic() - began

    def wait_for_step(self, step: int) -> float:
        """Until a checkpoint of that step, or of a later one, is complete."""
        return self.wait_until(lambda: self.saved >= step, f"the checkpoint of step {step}")

    def wait_for(self, text: str, seconds: float = 180) -> float:
        """Until it has printed that."""
        return self.wait_until(lambda: text in self.text, repr(text), seconds)

    def workers(self) -> list[psutil.Process]:
        """Ray Train's workers below it, by age."""
        found = [each for each in psutil.Process(self.process.pid).children(recursive=True) if is_worker(each)]
        return sorted(found, key=lambda each: each.create_time())

    def send(self, number: int) -> None:
        """A signal to the command itself, not to what it has started."""
        self.process.send_signal(number)

    def kill_all(self) -> None:
        """All its processes at once, as a power cut would."""
        if self.process.poll() is None:
            for each in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        self.process.wait()


def is_worker(process: psutil.Process) -> bool:
    """Whether it is one of Ray Train's workers."""
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return "RayTrainWorker" in " ".join(process.cmdline())
    return False


class Lab:
    """A folder for runs, and the commands that make them.

    Args:
        folder: an empty one.
        seed: of all that is chosen by chance.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.random = Random(seed)
        self._started: list[Started] = []
        self._undisturbed: dict[tuple[str, ...], Path] = {}
        self._number = 0

    def name(self, of: str = "run") -> str:
        """A name that no run here has yet."""
        self._number += 1
        return f"{of}-{self._number}"

    def begin(
        self,
        *settings: str,
        resume: Path | str | None = None,
        name: str | None = None,
        storage: str | None = None,
        environment: Mapping[str, str] | None = None,
        launcher: Iterable[str] = (),
    ) -> Started:
        """Start a run of the tiny configuration with those settings, or go on with one."""
        name = name or (str(resume).rpartition("/")[2] if resume else self.name())
        what = [str(resume) if resume else name]
        if resume is None:
            config = self.folder / f"{name}.yaml"
            config.write_text("{}\n")
            what = [str(config), f"name={name}", f"storage={storage or self.folder}", *TINY]
        flags = ["--resume"] if resume else []
        command = [*(launcher or [sys.executable]), "-m", "densenet_dist", "train", *flags, *what, *settings]
        return self.run(command, self.folder / name, environment)

    def run(self, command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> Started:
        """Start any command whose run lies in `folder`."""
        self._number += 1
        output = self.folder / f"output-{self._number}.txt"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                command,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=dict(os.environ) | dict(environment or {}),
                cwd=self.folder,
            )
        self._started.append(Started(process, folder, output))
        return self._started[-1]

    def undisturbed(self, *settings: str) -> Path:
        """The folder of a finished run of these settings that nothing happened to; made once."""
        if settings not in self._undisturbed:
            run = self.begin(*settings, name=self.name("undisturbed"))
            expect(run.wait() == 0, f"the undisturbed run failed:\n{run.text[-2000:]}")
            self._undisturbed[settings] = run.folder
        return self._undisturbed[settings]

    def close(self) -> None:
        """End all that still runs."""
        for run in self._started:
            run.kill_all()


def expect(holds: bool, otherwise: str) -> None:
    """Raise `Unexpected` unless it holds."""
    if not holds:
        raise Unexpected(otherwise)


def finish(run: Started, like: Path, *, code: int = 0) -> None:
    """Wait for the end of a run, which must be that of an undisturbed one: weights, records and TensorBoard."""
    found = run.wait()
    expect(found == code, f"exit code {found}, not {code}:\n{run.text[-2000:]}")
    require_same(run.folder, like)


def require_same(folder: Path, like: Path) -> None:
    """Whether two finished runs are the same to the bit, but for what a clock says."""
    for what, of in (("weights", newest_weights), ("metrics.jsonl", records), ("TensorBoard", scalars)):
        expect(of(folder) == of(like), f"{what} of {folder.name} differ from those of the undisturbed run")


def newest_step(folder: Path) -> int:
    """The step of the newest complete checkpoint; 0 where there is none."""
    with suppress(FileNotFoundError):
        names = [path.name for path in (folder / CHECKPOINTS_FOLDER).iterdir()]
        return max((int(name[5:13]) for name in names if re.match(r"step-\d{8}", name)), default=0)
    return 0


def newest_weights(folder: Path) -> bytes:
    """As they lie on disk."""
    step = newest_step(folder)
    return (folder / CHECKPOINTS_FOLDER / f"step-{step:08d}" / "model.safetensors").read_bytes()


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = map(json.loads, (folder / METRICS_FILE).read_text().splitlines())
    return [{key: value for key, value in line.items() if not key.startswith(_CLOCK)} for line in lines]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every curve that does not depend on the clock."""
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # a line for each restart
    board = EventAccumulator(str(folder / TENSORBOARD_FOLDER))
    board.Reload()
    tags = [tag for tag in board.Tags()["scalars"] if not tag.startswith(_CLOCK)]
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in tags}


def goodput(folder: Path) -> dict[str, float]:
    """What its last epoch says of the run's time so far: shares by name."""
    lines = map(json.loads, (folder / METRICS_FILE).read_text().splitlines())
    last = [line for line in lines if "goodput/ratio" in line][-1]
    return {key.removeprefix("goodput/"): value for key, value in last.items() if key.startswith("goodput/")}


def steps_again(run: Started) -> list[float]:
    """How many steps were taken again after each loss, as the run itself counts them; those without any left out."""
    return [float(number) for number in re.findall(r"^(\d+) steps? (?:is|are) taken again", run.text, re.MULTILINE)]


def interrupt(run: Started, number: int = signal.SIGTERM) -> float:
    """Send a signal, wait for the end, and require the exit code that goes with it; how long it took."""
    began = time.monotonic()
    run.send(number)
    code = run.wait(60)
    expect(code == 128 + number, f"exit code {code}, not {128 + number}:\n{run.text[-2000:]}")
    return time.monotonic() - began


def write_pictures(folder: Path, labels: Iterable[str], number: int = 64) -> None:
    """A data set of one's own: so many pictures of noise in a folder for each label."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for label in labels:
        (folder / label).mkdir(parents=True)
        for each in range(number):
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / label / f"{each}.png")

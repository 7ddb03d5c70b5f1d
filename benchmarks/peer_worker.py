"""The process of one peer of benchmarks/peers.py: it trains, and answers each line on its standard input with figures.

It runs in whatever Python can have the peer's library, so that it imports no more than it needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import peer_nets

WARMUP_STEPS: Final = 3
WARMUP_SECONDS: Final = 2.0
"""Both at least, before the first round."""
LEAST_STEPS: Final = 3
"""In a round, however long they take."""
LEARNING_RATE: Final = 0.01
MOMENTUM: Final = 0.9
PACKAGES: Final = ("torch", "torchvision", "timm", "keras", "tensorflow")
RESET_PEAK: Final = "5"
"""What Linux wants to read in clear_refs."""


class Peer(NamedTuple):
    """One library's net, and the form of it that is measured."""

    library: str
    form: str
    channels_last: bool
    compiled: bool = False


def all_peers() -> dict[str, Peer]:
    peers = {f"ours_{form}": Peer("ours", form, True) for form in ("reference", "fused", "checkpointed")}
    for library in ("torchvision", "timm"):
        for suffix, form, compiled in (
            ("", "eager", False),
            ("_memory_efficient", "memory_efficient", False),
            ("_compiled", "eager", True),
        ):
            peers[f"{library}{suffix}"] = Peer(library, form, False, compiled)
            peers[f"{library}{suffix}+channels_last"] = Peer(library, form, True, compiled)
    return {**peers, "keras": Peer("keras", "", True)}


PEERS: Final = all_peers()


class Task(NamedTuple):
    """What a process is to measure."""

    net: str
    peer: str
    device: str
    precision: str
    batch: int
    threads: int
    seconds: float


class TorchTraining:
    """Training steps of a torch net, and their times."""

    def __init__(self, task: Task) -> None:
        import torch

        peer, net = PEERS[task.peer], peer_nets.NETS[task.net]
        torch.set_num_threads(task.threads)
        torch.backends.cudnn.benchmark = True  # as this project's trainer has it
        torch.manual_seed(0)
        layout = torch.channels_last if peer.channels_last else torch.contiguous_format
        model = peer_nets.LIBRARIES[peer.library](net, peer.form).to(task.device, memory_format=layout).train()
        self.parameters = sum(p.numel() for p in model.parameters())
        self.model = torch.compile(model) if peer.compiled else model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)
        images = torch.randn(task.batch, 3, net.image_size, net.image_size)
        self.images = images.to(task.device, memory_format=layout)
        self.labels = torch.randint(net.num_classes, (task.batch,)).to(task.device)
        self.autocast = torch.autocast(task.device, torch.bfloat16, enabled=task.precision == "bf16")
        self.on_gpu = task.device == "cuda"

    def steps(self, count: int) -> dict[str, float]:
        marks = [self._step() for _ in range(count)]
        end = self._mark()
        if not math.isfinite(self.loss.item()):  # waits for the GPU, too
            raise RuntimeError("the loss is not a finite number")
        return {
            "step_ms": self._ms(marks[0][0], end) / count,
            "forward_ms": sum(self._ms(start, between) for start, between, _ in marks) / count,
            "backward_ms": sum(self._ms(between, done) for _, between, done in marks) / count,
        }

    def _step(self) -> tuple[Any, Any, Any]:
        from torch.nn import functional as F

        start = self._mark()
        with self.autocast:
            loss = F.cross_entropy(self.model(self.images), self.labels)
        between = self._mark()
        loss.backward()
        done = self._mark()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = loss.detach()
        return start, between, done

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) if self.on_gpu else 1e3 * (end - start)


class KerasTraining:
    """The same of Keras, whose step is one whole."""

    def __init__(self, task: Task) -> None:
        import numpy as np

        if task.precision != "fp32" or task.device != "cpu":
            raise peer_nets.LeftOut("keras is measured in fp32 on a CPU only")
        model = peer_nets.keras_notebook(task.threads)
        import keras

        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM), loss)
        self.model, self.parameters = model, peer_nets.NOTEBOOK_PARAMETERS
        numbers, net = np.random.default_rng(0), peer_nets.NETS[task.net]
        self.images = numbers.standard_normal((task.batch, *model.input_shape[1:]), dtype=np.float32)
        self.labels = numbers.integers(net.num_classes, size=task.batch)

    def steps(self, count: int) -> dict[str, float]:
        started = time.perf_counter()
        for _ in range(count):
            loss = self.model.train_on_batch(self.images, self.labels)
        elapsed = time.perf_counter() - started
        if not math.isfinite(loss):
            raise RuntimeError("the loss is not a finite number")
        return {"step_ms": 1e3 * elapsed / count}


class GpuMemory:
    """The most memory that torch has allocated on the GPU since `restart`."""

    def restart(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()

    def peak_mib(self) -> float:
        import torch

        return float(torch.cuda.max_memory_allocated()) / 2**20

    def release(self) -> None:
        import torch

        torch.cuda.empty_cache()


class CpuMemory:
    """The largest resident size since `restart`, beyond the one when this was made."""

    def __init__(self) -> None:
        self.release()
        self.before = self._status_mib("VmRSS")

    def restart(self) -> None:
        with contextlib.suppress(OSError):  # a kernel may be built without it: then the peak is that since the start
            Path("/proc/self/clear_refs").write_text(RESET_PEAK)

    def peak_mib(self) -> float:
        return self._status_mib("VmHWM") - self.before

    def release(self) -> None:
        """Give back what is free, or the processes that wait would together hold every peer's activations."""
        gc.collect()
        with contextlib.suppress(AttributeError):  # glibc's
            ctypes.CDLL(None).malloc_trim(0)

    @staticmethod
    def _status_mib(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 2**10


def serve(task: Task) -> None:
    """Say that the peer is ready, or why it never will be, and measure a round for every line that comes."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    try:
        training = KerasTraining(task) if PEERS[task.peer].library == "keras" else TorchTraining(task)
        memory = GpuMemory() if task.device == "cuda" else CpuMemory()
        step_ms = warm_up(training.steps)
        memory.release()
        ready = {"parameters": training.parameters, "versions": {name: version(name) for name in PACKAGES}}
        print(json.dumps(ready), file=answers)
        for _ in sys.stdin:
            training.steps(1)
            memory.restart()
            figures = training.steps(max(LEAST_STEPS, round(1e3 * task.seconds / step_ms)))
            figures["images_per_s"] = 1e3 * task.batch / figures["step_ms"]
            figures["peak_mib"] = memory.peak_mib()
            memory.release()
            print(json.dumps(figures), file=answers)
    except (peer_nets.LeftOut, RuntimeWarning) as error:
        print(json.dumps({"left_out": str(error)}), file=answers)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch may not be here to name it by
            raise
        print(json.dumps({"left_out": "out of memory"}), file=answers)


def warm_up(steps: Callable[[int], dict[str, float]]) -> float:
    """Milliseconds a step, once the first ones are over."""
    steps(1)
    started, count = time.perf_counter(), 1
    while True:
        step_ms = steps(1)["step_ms"]
        count += 1
        if count >= WARMUP_STEPS and time.perf_counter() - started >= WARMUP_SECONDS:
            return step_ms


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    serve(Task(*json.loads(sys.argv[1])))

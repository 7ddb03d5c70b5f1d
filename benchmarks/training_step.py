"""The training step of a model on random images, in one of several variants: time and memory."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from densenet_dist.cluster.resources import local_threads
from densenet_dist.data.loader import Batch, BatchRecipe
from densenet_dist.errors import DenseNetDistError, EnvironmentProblem, OutOfMemory
from densenet_dist.model.kernels import unavailable
from densenet_dist.model.variants import densenet, variant_architecture
from densenet_dist.schema import Config
from densenet_dist.train.autotune import synchronize
from densenet_dist.train.network import autocast
from densenet_dist.train.optim import build_optimizer
from densenet_dist.train.step_graph import WARM_UP_STEPS, StepGraph


class Variant(NamedTuple):
    """How a model is run.

    Attributes:
        block: the form of its dense blocks.
        compile: whether to use `torch.compile`.
        cuda_graph: whether the whole step is one CUDA graph, as with ``train.cuda_graph``.
        padded: whether the growth rate is rounded up to a multiple of 8, the widths that tensor cores need. This costs
            as much as padding every layer of a network without bottlenecks with zeros.
    """

    block: str
    compile: bool = False
    cuda_graph: bool = False
    padded: bool = False


VARIANTS: Final = {
    "reference": Variant("reference"),
    "compiled": Variant("reference", compile=True),
    "fused": Variant("fused"),
    "graph": Variant("fused", cuda_graph=True),
    "compiled_graph": Variant("reference", compile=True, cuda_graph=True),
    "padded": Variant("reference", padded=True),
    "padded_compiled_graph": Variant("reference", compile=True, cuda_graph=True, padded=True),
}


@dataclass(frozen=True)
class Measurement:
    """One measurement of a variant at a batch size.

    Attributes:
        step_ms: mean time of forward, cross entropy, backward, optimizer step and zeroing the gradients.
        steps: number of timed steps.
        peak_bytes: peak memory of a step. On a GPU of all tensors; on a CPU of the process, minus its memory just
            before the step (weights, optimizer, images); NaN if unknown.
        loss: of the first step, equal in all variants except for rounding and the order of dropout's random numbers.
    """

    step_ms: float
    steps: int
    peak_bytes: float
    loss: float


class TrainingStep:
    """A model on its device with its optimizer, run as `variant` specifies."""

    def __init__(self, variant: Variant, config: Config, num_classes: int, device: torch.device) -> None:
        self._variant, self._config, self._num_classes, self._device = variant, config, num_classes, device
        torch.manual_seed(config.seed)
        settings = {**config.model.network, "num_classes": num_classes, "image_size": config.data.resolved_image_size}
        architecture = variant_architecture(**settings)
        if variant.padded:
            settings["growth_rate"] = -(-architecture.growth_rate // 8) * 8
        self._forward: nn.Module = densenet(**{**settings, "block": variant.block}).to(device).train()
        # With a learning rate of zero the work is the same, but the weights do not change during the measurement.
        self._optimizer = build_optimizer(self._forward, config.train.optimizer, lr=0.0)
        self._scaler = GradScaler(device.type, enabled=config.train.precision == "fp16")
        self._bytes_per_image = 0.0  # of the last measured step
        if variant.compile:
            from torch._dynamo import config as dynamo

            dynamo.recompile_limit = 64  # beyond it the model would silently run uncompiled
            self._forward = cast(nn.Module, torch.compile(self._forward, dynamic=False))

    def measure(self, batch_size: int, seconds: float) -> Measurement:
        """Warm up, then measure time and memory at one batch size."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()  # of the last measurement, which may have failed
        else:
            self._require_memory(batch_size)
        images, labels = self._batch(batch_size)
        step: Callable[[], Tensor] = partial(self._step, images, labels)
        torch.manual_seed(self._config.seed)  # for dropout
        loss = float(step())
        step()
        before = _reset_peak()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._variant.cuda_graph:
            step = self._capture(images, labels)
        once = self._time(step, 1)
        peak = torch.cuda.max_memory_allocated(self._device) if on_gpu else _proc_bytes("self/status", "VmHWM") - before
        if not math.isnan(peak):
            self._bytes_per_image = peak / batch_size
        steps = max(2 if on_gpu or once <= seconds else 1, int(seconds / once))
        step_s = self._time(step, steps)
        if on_gpu:
            del step, images, labels
            torch.cuda.empty_cache()  # for other processes
        return Measurement(1e3 * step_s, steps, peak, loss)

    def prepare(self, batch_size: int) -> Callable[[], Tensor]:
        """Return the step on a batch of random images; with a CUDA graph, the captured step."""
        images, labels = self._batch(batch_size)
        return self._capture(images, labels) if self._variant.cuda_graph else partial(self._step, images, labels)

    def _batch(self, size: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self._device).manual_seed(self._config.seed)
        side = self._config.data.resolved_image_size
        images = torch.randn(size, 3, side, side, generator=generator, device=self._device)
        labels = torch.randint(self._num_classes, (size,), generator=generator, device=self._device)
        return images.contiguous(memory_format=torch.channels_last), labels

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        with autocast(self._device, self._config.train.precision):
            logits = self._forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if not self._variant.cuda_graph:  # the graph zeroes them
            self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _capture(self, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        """The step as training captures it (``train.cuda_graph``), including the copies into the graph's inputs."""

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            loss = self._step(images, labels)
            return loss, loss

        graph = StepGraph(step, self._optimizer, self._device)
        graph.set_learning_rate(0.0)
        recipe = BatchRecipe.of(Batch(images, labels, len(images)))
        for _ in range(WARM_UP_STEPS + 1):
            graph(recipe)
        return lambda: graph(recipe).loss

    def _time(self, step: Callable[[], Tensor], steps: int) -> float:
        """The mean time of a step in seconds."""
        synchronize(self._device)
        started = perf_counter()
        for _ in range(steps):
            step()
        synchronize(self._device)
        return (perf_counter() - started) / steps

    def _require_memory(self, batch_size: int) -> None:
        needed, available = self._bytes_per_image * batch_size, _proc_bytes("meminfo", "MemAvailable")
        if needed > 0.8 * available:
            raise OutOfMemory(
                f"skipped: needs about {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available"
            )


_prepared: TrainingStep
"""In a measuring process: what it measures."""


def prepare_variant(variant: Variant, config: Config, num_classes: int, device: torch.device) -> None:
    """Build the model of a configuration in this process, which measures nothing else.

    Raises:
        ConfigError, EnvironmentProblem, OutOfMemory: the variant cannot work here.
    """
    global _prepared
    torch.set_num_threads(local_threads(config.cluster))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of missing CUDA on a CPU
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # as training does
    # Without kernels the fused form falls back to the reference form, and the result would be mislabeled.
    if variant.block == "fused" and (reason := unavailable(device.type)):
        raise EnvironmentProblem(f"the fused form has no kernels here: {reason}")
    _prepared = _with_readable_errors(TrainingStep, variant, config, num_classes, device)


def measure_variant(batch_size: int, seconds: float) -> Measurement:
    """Measure what was prepared for about `seconds`; errors as for `prepare_variant`."""
    gc.collect()  # remains of the last measurement
    found: Measurement = _with_readable_errors(_prepared.measure, batch_size, seconds)
    return found


def _with_readable_errors(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work`; turn errors of compilers, kernels and allocators into an `EnvironmentProblem` of one line."""
    try:
        return work(*arguments)
    except DenseNetDistError:
        raise
    except Exception as error:
        problem = _problem(error)
    if torch.cuda.is_initialized():  # the tensors of the failed step are gone with its error; free their memory
        gc.collect()
        torch.cuda.empty_cache()
    raise problem


def _problem(error: Exception) -> EnvironmentProblem:
    lines = [line.strip() for line in str(error).partition("Set TORCH")[0].splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines[:2])}"
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return OutOfMemory("out of memory")
    return EnvironmentProblem(text if len(text) <= 300 else f"{text[:300]}...")


def _reset_peak() -> float:
    """Reset ``VmHWM``; return the resident memory of this process in bytes, NaN where Linux refuses."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # return the memory that the allocator caches
    resident = _proc_bytes("self/status", "VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return resident


def _proc_bytes(file: str, key: str) -> float:
    """Read a size from a file in ``/proc``; NaN where Linux does not report it."""
    with suppress(OSError):
        for line in Path("/proc", file).read_text().splitlines():
            if line.startswith(f"{key}:"):
                return float(line.split()[1]) * 1024
    return float("nan")

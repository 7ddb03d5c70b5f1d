"""The training step of a net on random images, in one of several variants, and what it takes: time and memory."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import Any, Final, NamedTuple, cast

import psutil
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from densenet_dist.bench.process import peak_bytes, reset_peak
from densenet_dist.cluster.resources import local_threads
from densenet_dist.config import validate
from densenet_dist.data.loader import Batch, BatchRecipe
from densenet_dist.data.speed import synchronize
from densenet_dist.errors import DenseNetDistError, EnvironmentProblem
from densenet_dist.model import DenseNet, densenet
from densenet_dist.model.kernels.choice import unavailable
from densenet_dist.schema import Config
from densenet_dist.train.network import autocast
from densenet_dist.train.optim import build_optimizer
from densenet_dist.train.step_graph import WARM_UP_STEPS, StepGraph


class Variant(NamedTuple):
    """How a net is run.

    Attributes:
        block: the form of its dense blocks.
        compile: whether under `torch.compile`.
        cuda_graph: whether the whole step is one CUDA graph, as with ``train.cuda_graph``.
        convert: what else is done with the net before it is used; a function of a module.
    """

    block: str
    compile: bool = False
    cuda_graph: bool = False
    convert: Callable[[DenseNet], DenseNet] | None = None


VARIANTS: Final = {
    "reference": Variant("reference"),
    "compiled": Variant("reference", compile=True),
    "fused": Variant("fused"),
    "graph": Variant("fused", cuda_graph=True),
    "compiled_graph": Variant("reference", compile=True, cuda_graph=True),
}


class OutOfMemory(EnvironmentProblem):
    """A batch is too large for this machine; smaller ones may not be."""


@dataclass(frozen=True)
class Measurement:
    """One variant at one batch size, once.

    Attributes:
        step_ms: forward, cross entropy, backward, optimizer and gradients set to zero; the mean of `steps` steps.
        steps: how many were timed.
        peak_bytes: most memory of a step. On a GPU of all tensors; on a CPU of the process, less what it had just
            before the step (weights, optimizer, images); NaN where that cannot be told.
        loss: of the first step: the same in all variants but for rounding, and the order in which dropout draws.
    """

    step_ms: float
    steps: int
    peak_bytes: float
    loss: float


def prepare_variant(
    variant: Variant, plain: dict[str, Any], num_classes: int, device_name: str
) -> Callable[[int, float], Measurement]:
    """Build the net of a configuration (as plain values) in this process, which measures nothing else.

    Returns:
        What measures its training step, given a batch size and about how many seconds to take.

    Raises:
        ConfigError, EnvironmentProblem: why the variant cannot work here.
        OutOfMemory: raised by what is returned, too.
    """
    config, device = validate(plain), torch.device(device_name)
    torch.set_num_threads(local_threads(config.cluster))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # compiling on a CPU it misses CUDA
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # as training does
    # Without kernels the fused form falls back to the reference form: the row would not be what it says.
    if variant.block == "fused" and (reason := unavailable(device.type)):
        raise EnvironmentProblem(f"the fused form has no kernels here: {reason}")
    return partial(explained, explained(TrainingStep, variant, config, num_classes, device).measure)


class TrainingStep:
    """A configuration's net on its device, with what trains it; `variant` says how it is run."""

    def __init__(self, variant: Variant, config: Config, num_classes: int, device: torch.device) -> None:
        self._variant, self._config, self._num_classes, self._device = variant, config, num_classes, device
        torch.manual_seed(config.seed)
        settings = {**asdict(config.model), "num_classes": num_classes, "image_size": config.data.side}
        model = densenet(**{**settings, "block": variant.block})
        self._model = (variant.convert(model) if variant.convert else model).to(device).train()
        self._forward: nn.Module = self._model
        # A learning rate of zero: all of the work, and weights that stay the same however long it is measured.
        self._optimizer = build_optimizer(self._model, config.train.optimizer, lr=0.0)
        self._scaler = GradScaler(device.type, enabled=config.train.precision == "fp16")
        self._bytes_per_image = 0.0  # of a step, as far as is known
        if variant.compile:
            from torch._dynamo import config as dynamo

            dynamo.recompile_limit = 64  # beyond it a net would silently run uncompiled
            self._forward = cast(nn.Module, torch.compile(self._model, dynamic=False))

    def measure(self, batch_size: int, seconds: float) -> Measurement:
        """Warm up, and measure time and memory at one batch size."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()  # after the last measurement, and what it left when it failed
        else:
            self._require_memory(batch_size)
        images, labels = self._batch(batch_size)
        step: Callable[[], Tensor] = partial(self._step, images, labels)
        torch.manual_seed(self._config.seed)  # for dropout
        loss = float(step())
        step()
        before = reset_peak()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._variant.cuda_graph:
            step = self._capture(images, labels)
        once = self._time(step, 1)
        peak = torch.cuda.max_memory_allocated(self._device) if on_gpu else peak_bytes() - before
        if not math.isnan(peak):
            self._bytes_per_image = peak / batch_size
        steps = max(2 if on_gpu or once <= seconds else 1, int(seconds / once))
        step_s = self._time(step, steps)
        if on_gpu:
            del step, images, labels
            torch.cuda.empty_cache()  # other processes want it
        return Measurement(1e3 * step_s, steps, peak, loss)

    def _batch(self, size: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self._device).manual_seed(self._config.seed)
        side = self._config.data.side
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
        if not self._variant.cuda_graph:  # a graph clears them itself
            self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _capture(self, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        """The step as training captures it (``train.cuda_graph``), the copies into the graph's own memory included."""

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
        """Seconds of a step, the mean of so many."""
        synchronize(self._device)
        started = perf_counter()
        for _ in range(steps):
            step()
        synchronize(self._device)
        return (perf_counter() - started) / steps

    def _require_memory(self, batch_size: int) -> None:
        needed, available = self._bytes_per_image * batch_size, psutil.virtual_memory().available
        if needed > 0.8 * available:
            raise OutOfMemory(
                f"not tried: it would take about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available"
            )


def explained(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work`; what compilers, kernels and allocators raise becomes an `EnvironmentProblem` of one line."""
    try:
        return work(*arguments)
    except DenseNetDistError:
        raise
    except Exception as error:
        problem = _problem(error)
    if torch.cuda.is_initialized():  # the failed step's tensors went with its error: other processes want the memory
        gc.collect()
        torch.cuda.empty_cache()
    raise problem


def _problem(error: Exception) -> EnvironmentProblem:
    lines = [line.strip() for line in str(error).partition("Set TORCH")[0].splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines[:2])}"
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return OutOfMemory("out of memory")
    return EnvironmentProblem(text if len(text) <= 300 else f"{text[:300]}...")

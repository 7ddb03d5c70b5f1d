"""One arm of ``bench model`` in its own process: a net, the way it is run, and the measurement of its training step."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from densenet_dist.bench.ways import WAYS, configured_for
from densenet_dist.bench.workers import available_bytes, peak_bytes, reset_peak, resident_bytes
from densenet_dist.cluster.resources import local_threads
from densenet_dist.config import validate
from densenet_dist.data.loader import Batch, BatchRecipe
from densenet_dist.errors import DenseNetDistError, EnvironmentProblem
from densenet_dist.model import densenet
from densenet_dist.model.kernels.choice import unavailable
from densenet_dist.schema import Config
from densenet_dist.train.network import autocast
from densenet_dist.train.optim import build_optimizer
from densenet_dist.train.step_graph import WARM_UP_STEPS, StepGraph

_SHARE_OF_MEMORY = 0.8
_FEW = 4
_MOST_SHAPES = 64

_Mark: TypeAlias = Callable[[], None]
_Step: TypeAlias = Callable[[_Mark], Tensor]


class OutOfMemory(EnvironmentProblem):
    """A batch is too large for this machine; smaller ones may not be."""


@dataclass(frozen=True)
class Measurement:
    """One arm at one batch size, once.

    Attributes:
        step_ms: forward, cross entropy, backward, optimizer and gradients set to zero; the mean of `steps` steps.
        forward_ms: with the cross entropy; None where the step cannot be taken apart.
        backward_ms: likewise.
        steps: how many were timed.
        peak_bytes: most memory of a step. On a GPU of all tensors; on a CPU of the process, less what it had just
            before the step (weights, optimizer, images); NaN where that cannot be told.
        saved_bytes_per_image: of the tensors that autograd keeps from the forward for the backward pass, each memory
            counted once and the parameters' not. A form's own state that it hides from autograd is not in it.
        loss: of the first step: the same in all arms but for rounding, and the order in which dropout draws.
    """

    step_ms: float
    forward_ms: float | None
    backward_ms: float | None
    steps: int
    peak_bytes: float
    saved_bytes_per_image: float
    loss: float


def prepare_arm(
    arm: str, plain: dict[str, Any], num_classes: int, device_name: str
) -> Callable[[int, float], Measurement]:
    """What measures an arm: it is given a batch size and about how many seconds to take.

    Raises:
        ConfigError, EnvironmentProblem: why the arm cannot work here.
        OutOfMemory: raised by what is returned, too.
    """
    config, device = configured_for(validate(plain), arm), torch.device(device_name)
    torch.set_num_threads(local_threads(config.cluster))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # compiling on a CPU it misses CUDA
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # as training does
    # Without kernels the fused form would stand back for the reference form: the row would not be what it says.
    if WAYS[arm].block == "fused" and (reason := unavailable(device.type)):
        raise EnvironmentProblem(f"the fused form has no kernels here: {reason}")
    return partial(_explained, _explained(_Arm, arm, config, num_classes, device).measure)


class _Arm:
    """The net on its device, with what trains it."""

    def __init__(self, arm: str, config: Config, num_classes: int, device: torch.device) -> None:
        self._way, self._config, self._num_classes, self._device = WAYS[arm], config, num_classes, device
        torch.manual_seed(config.seed)
        settings = {**asdict(config.model), "num_classes": num_classes, "image_size": config.data.side}
        self._model = densenet(**{**settings, "block": self._way.block}).to(device).train()
        self._forward: nn.Module = self._model
        # A learning rate of zero: all of the work, and weights that stay the same however long it is measured.
        self._optimizer = build_optimizer(self._model, config.train.optimizer, lr=0.0)
        self._scaler = GradScaler(device.type, enabled=config.train.precision == "fp16")
        self._saved: dict[int, float] = {}
        self._largest, self._bytes_per_image = _FEW, self._try_few_images()
        if self._way.compiled:
            from torch._dynamo import config as dynamo

            dynamo.recompile_limit = _MOST_SHAPES  # beyond it a net would silently run uncompiled
            self._forward = cast(nn.Module, torch.compile(self._model, dynamic=False))

    def measure(self, batch_size: int, seconds: float) -> Measurement:
        """Warm up, count, time."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()  # after the last measurement, and what it left when it failed
        else:
            self._require_memory(batch_size)
        images, labels = self._batch(batch_size)
        step: _Step = partial(self._step, images, labels)
        torch.manual_seed(self._config.seed)  # for dropout
        loss = float(step(_nothing))
        if batch_size not in self._saved:
            self._saved[batch_size] = self._count_saved(images)
        step(_nothing)
        known = self._start_of_peak()
        if self._way.captured:
            step = self._captured(images, labels)
        once = sum(self._time(step, 1)) / 1e3
        peak = torch.cuda.max_memory_allocated(self._device) if on_gpu else peak_bytes() - known
        steps = max(2 if on_gpu or once <= seconds else 1, int(seconds / once))
        laps = self._time(step, steps)
        parts = len(laps) // steps
        forward, backward = (sum(laps[part::parts]) / steps for part in (0, 1)) if parts == 3 else (None, None)
        found = Measurement(sum(laps) / steps, forward, backward, steps, peak, self._saved[batch_size], loss)
        if batch_size > self._largest and not math.isnan(peak):
            self._largest, self._bytes_per_image = batch_size, peak / batch_size
        if on_gpu:
            del step, images, labels
            torch.cuda.empty_cache()  # the other arms want it
        return found

    def _batch(self, size: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self._device).manual_seed(self._config.seed)
        side = self._config.data.side
        images = torch.randn(size, 3, side, side, generator=generator, device=self._device)
        labels = torch.randint(self._num_classes, (size,), generator=generator, device=self._device)
        return images.contiguous(memory_format=torch.channels_last), labels

    def _step(self, images: Tensor, labels: Tensor, mark: _Mark) -> Tensor:
        with autocast(self._device, self._config.train.precision):
            logits = self._forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        mark()
        self._scaler.scale(loss).backward()
        mark()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if not self._way.captured:  # a graph clears them itself
            self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _captured(self, images: Tensor, labels: Tensor) -> _Step:
        """The step as training captures it (``train.cuda_graph``), the copies into the graph's own memory included."""

        def whole(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            loss = self._step(images, labels, _nothing)
            return loss, loss

        graph = StepGraph(whole, self._optimizer, self._device)
        graph.set_learning_rate(0.0)
        recipe = BatchRecipe.of(Batch(images, labels, len(images)))
        for _ in range(WARM_UP_STEPS + 1):
            graph(recipe)
        return lambda _: graph(recipe).loss

    def _time(self, step: _Step, steps: int) -> list[float]:
        """Milliseconds from mark to mark of so many steps."""
        watch = _Stopwatch(self._device)
        watch.mark()
        for _ in range(steps):
            step(watch.mark)
            watch.mark()
        return watch.laps()

    def _count_saved(self, images: Tensor) -> float:
        own = {parameter.untyped_storage().data_ptr() for parameter in self._model.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, autocast(self._device, self._config.train.precision):
            logits = self._forward(images)  # alive until all is counted, or addresses would be used again
        del logits
        return sum(saved.values()) / len(images)

    def _try_few_images(self) -> float:
        """Take two steps, so that libraries have set up what they keep; gives a step's memory an image, about."""
        images, labels = self._batch(_FEW)
        self._step(images, labels, _nothing)
        before = self._start_of_peak()
        self._step(images, labels, _nothing)
        gradients = sum(parameter.nbytes for parameter in self._model.parameters())
        peak = (peak_bytes() - before - gradients) / _FEW
        return max(self._count_saved(images), peak)  # the first one, too, where the second is not known

    def _start_of_peak(self) -> float:
        """Let the peak start anew; on a CPU, what the process has already, or NaN."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return 0.0
        resident = resident_bytes()  # before the peak is reset: it lets go of what would count as one
        return resident if reset_peak() else math.nan

    def _require_memory(self, batch_size: int) -> None:
        needed, available = self._bytes_per_image * batch_size, available_bytes()
        if needed > _SHARE_OF_MEMORY * available:
            raise OutOfMemory(
                f"not tried: it would take about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are available"
            )


class _Stopwatch:
    """Marks on the device's own clock: on a GPU events in its queue, which nothing waits for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Now, or when the GPU gets here."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(perf_counter())

    def laps(self) -> list[float]:
        """Milliseconds between all marks."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [before.elapsed_time(after) for before, after in pairwise(self._marks)]
        return [(after - before) * 1e3 for before, after in pairwise(self._marks)]


def _explained(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` gives; what compilers, kernels and allocators raise becomes one line."""
    try:
        return work(*arguments)
    except DenseNetDistError:
        raise
    except Exception as error:
        problem = _problem(error)
    if torch.cuda.is_initialized():  # the failed step's tensors went with its error: the other arms want the memory
        gc.collect()
        torch.cuda.empty_cache()
    raise problem


def _problem(error: Exception) -> EnvironmentProblem:
    lines = [line.strip() for line in str(error).partition("Set TORCH")[0].splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines[:2])}"
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return OutOfMemory("out of memory")
    return EnvironmentProblem(text if len(text) <= 300 else f"{text[:300]}...")


def _nothing() -> None:
    pass

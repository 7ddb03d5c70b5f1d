"""A training step as one CUDA graph: one launch for hundreds of kernels, so that small batches do not wait for Python.

If the images are on the GPU, the graph also produces the batch (`densenet_dist.data.loader.BatchRecipe`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from densenet_dist.data.loader import BatchRecipe
from densenet_dist.errors import is_out_of_memory

Step: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images, targets) -> (loss, logits): forward, backward and optimizer step, all on the device."""

WARM_UP_STEPS: Final = 3
"""Steps without a graph before a shape is captured: cuDNN selects kernels, the optimizer allocates its state."""


class StepResult(NamedTuple):
    """The result of a step: loss, logits and targets, on the device."""

    loss: Tensor
    logits: Tensor
    targets: Tensor


class StepGraph:
    """Takes training steps; once a batch shape has been seen often enough, by replaying a graph.

    A graph reads fixed memory addresses: weights stay in place, learning rates become tensors (`set_learning_rate`).
    Dropout uses the generator's seed at every replay, as it does without a graph.

    Args:
        step: the step, which must not wait for the device. Gradients are cleared before it is called.
        optimizer: the optimizer of the step.
        device: a GPU.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._step, self._optimizer, self._device = step, optimizer, device
        self._steps_taken: Counter[tuple[torch.Size, ...]] = Counter()
        self._captured: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], StepResult]] = {}

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def __call__(self, recipe: BatchRecipe) -> StepResult:
        """Take a step. The next step with the same shapes overwrites the returned tensors."""
        shapes = tuple(tensor.shape for tensor in recipe.inputs)
        if shapes not in self._captured:
            self._steps_taken[shapes] += 1
            if self._steps_taken[shapes] <= WARM_UP_STEPS:
                return self._warm_up(recipe)
            self._captured[shapes] = self._capture(recipe)
        graph, inputs, result = self._captured[shapes]
        torch._foreach_copy_(inputs, list(recipe.inputs))
        graph.replay()
        return result

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of every group, times its ``lr_scale``, in the tensor that a captured step reads."""
        for group in self._optimizer.param_groups:
            # The type alone: "cuda" differs from "cuda:0", and a new tensor would not be the one that a graph reads.
            if not isinstance(group["lr"], Tensor) or group["lr"].device.type != self._device.type:
                group["lr"] = torch.tensor(value, device=self._device)
            group["lr"].fill_(value * group.get("lr_scale", 1.0))
            if "capturable" in group:
                group["capturable"] = True

    def _warm_up(self, recipe: BatchRecipe) -> StepResult:
        # Use the stream of the capture: cuBLAS and the allocator have memory per stream.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._optimizer.zero_grad(set_to_none=True)
            result = self._whole_step(recipe)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return result

    def _capture(self, recipe: BatchRecipe) -> tuple[torch.cuda.CUDAGraph, list[Tensor], StepResult]:
        """Record a step; nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        held = recipe._replace(inputs=tuple(tensor.clone() for tensor in recipe.inputs))
        self._optimizer.zero_grad(set_to_none=True)  # so that the graph allocates gradients in its own memory
        # Other threads (of loaders and DALI) may allocate memory and synchronize during the capture.
        stream = torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                result = self._whole_step(held)
        except RuntimeError as error:  # without memory, ending the capture may fail too, before the stream is restored
            torch.cuda.set_stream(stream)
            cause = error.__context__
            if cause is not None and is_out_of_memory(cause):
                raise cause from None
            raise
        return graph, list(held.inputs), result

    def _whole_step(self, recipe: BatchRecipe) -> StepResult:
        batch = recipe.compute()
        return StepResult(*self._step(batch.images, batch.targets), batch.targets)

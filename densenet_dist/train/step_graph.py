"""A training step as one CUDA graph: hundreds of kernels, one launch, so that small batches do not wait for Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

Step: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images, targets) -> (loss, logits): forward, backward and optimizer step, all on the device."""

WARM_UP_STEPS: Final = 3
"""Steps taken as usual before a shape is captured: cuDNN chooses its kernels, the optimizer makes its state."""


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    images: Tensor
    targets: Tensor
    loss: Tensor
    logits: Tensor


class StepGraph:
    """Takes steps, by replaying a graph once a batch shape has been seen often enough.

    What a step reads besides images and targets must stay where it is: weights do, learning rates become tensors
    (`set_learning_rate`). Dropout follows the generator's seed at every replay, as it does without a graph.

    Args:
        step: the step; it must not wait for the device. Gradients are cleared here, before it.
        optimizer: whose learning rates and gradients it uses.
        device: a GPU.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._step, self._optimizer, self._device = step, optimizer, device
        self._seen: dict[tuple[torch.Size, torch.Size], int] = {}
        self._captured: dict[tuple[torch.Size, torch.Size], _Captured] = {}
        self._stream = torch.cuda.Stream(device)

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step.

        Args:
            images: (n, C, H, W) on the device.
            targets: what `step` takes beside them.

        Returns:
            Loss and logits; they are overwritten by the next step of the same shape.
        """
        shape = (images.shape, targets.shape)
        captured = self._captured.get(shape)
        if captured is None:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] <= WARM_UP_STEPS:
                return self._warm_up(images, targets)
            captured = self._captured[shape] = self._capture(images, targets)
        captured.images.copy_(images)
        captured.targets.copy_(targets)
        captured.graph.replay()
        return captured.loss, captured.logits

    def set_learning_rate(self, value: float) -> None:
        """Set every group's learning rate where a captured step reads it."""
        for group in self._optimizer.param_groups:
            if not isinstance(group["lr"], Tensor) or group["lr"].device != self._device:
                group["lr"] = torch.tensor(value, device=self._device)
            group["lr"].fill_(value)
            if "capturable" in group:
                group["capturable"] = True

    def _warm_up(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # On the stream that captures: cuBLAS and the allocator keep memory for each stream.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._optimizer.zero_grad(set_to_none=True)
            made = self._step(images, targets)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return made

    def _capture(self, images: Tensor, targets: Tensor) -> _Captured:
        """Record a step; nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        held_images, held_targets = images.clone(), targets.clone()
        self._optimizer.zero_grad(set_to_none=True)  # so that the graph makes gradients in memory of its own
        with torch.cuda.graph(graph, stream=self._stream):
            loss, logits = self._step(held_images, held_targets)
        return _Captured(graph, held_images, held_targets, loss, logits)

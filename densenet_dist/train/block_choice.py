"""Which form of the dense block trains faster on this machine, measured at the start of a run."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch.nn import functional as F

from densenet_dist.data.speed import synchronize
from densenet_dist.model import DenseNet
from densenet_dist.model.kernels.choice import unavailable
from densenet_dist.run_folder import CHECKPOINTS_FOLDER, ENV_FILE
from densenet_dist.schema import Config, ModelConfig
from densenet_dist.train.context import RunContext
from densenet_dist.train.measured_choice import Choice, measured_choice
from densenet_dist.train.network import autocast, build_model

FORMS: Final = ("fused", "reference")
SECONDS: Final = 2.0
SHARE: Final = 0.01
"""How long both forms are measured at most: seconds, and a share of the run, after two steps of two images each."""
MOST_IMAGES: Final = 32
"""In a measured step on a CPU, where the reference form may take several times the memory of the fused one."""
WORTH_IT: Final = 10_000
"""Training images of a rank, over all epochs, below which nothing is measured."""


def choose_block(config: Config, context: RunContext, num_classes: int, image_size: int, images: int) -> ModelConfig:
    """Return the model's settings with the form of the dense block to train. A collective call.

    ``auto`` becomes the form that is faster at the run's own network, batch size, precision and number of threads. It
    is ``fused`` without a measurement where the steps are compiled or captured as a CUDA graph (the eager speed says
    little about them), in short runs, and in runs that started before the choice was measured.

    Args:
        num_classes: of the data set.
        image_size: side of the images in pixels.
        images: that this run trains on over all epochs, on all ranks.
    """
    model = config.model
    if model.block == "reference":
        return model
    if reason := unavailable(context.device.type):
        context.report({"kind": "note", "text": f"block: reference ({reason})"})
        return replace(model, block="reference")
    short = images < WORTH_IT * context.world_size
    old = context.run.exists(f"{CHECKPOINTS_FOLDER}/manifest.json") and not context.run.read_json(ENV_FILE).get("block")
    if model.block == "fused" or config.train.compile or config.train.cuda_graph or short or old:
        return replace(model, block="fused")
    measure = partial(_measure, config, context, num_classes, image_size, images // context.world_size)
    name = measured_choice(context, "block", FORMS, measure)
    return replace(model, block="fused" if name == "fused" else "reference")


def _measure(config: Config, context: RunContext, num_classes: int, image_size: int, images: int) -> Choice:
    share = max(1, config.train.global_batch_size // (context.world_size * config.train.grad_accum_steps))
    models = {form: build_model(replace(config.model, block=form), num_classes, image_size) for form in FORMS}
    steps = {form: _Step(model, image_size, config.train.precision, context) for form, model in models.items()}
    rates = dict.fromkeys(FORMS, 0.0)

    def measure(count: int) -> None:
        for form, step in steps.items():
            rates[form] = max(rates[form], count / step.seconds(count))

    try:
        for step in steps.values():
            step.seconds(2)  # builds kernels and allocates
        measure(2)
        per_image = sum(1 / rate for rate in rates.values())  # seconds, of both forms
        remaining = min(SECONDS, SHARE * images * min(1 / rate for rate in rates.values()))
        most = share if context.device.type == "cuda" else min(share, MOST_IMAGES)
        count = max(2, min(most, int(remaining / 2 / per_image)))
        while remaining > count * per_image:
            started = time.perf_counter()
            measure(count)
            remaining -= time.perf_counter() - started
    except torch.OutOfMemoryError:
        return Choice("fused", "the reference form does not fit into memory", {})
    name, other = sorted(FORMS, key=lambda form: -rates[form])
    reason = f"{rates[name]:,.0f} images/s; {other}: {rates[other]:,.0f}"
    return Choice(name, reason, {f"{form}_images_per_s": round(rate, 1) for form, rate in rates.items()})


class _Step:
    """Forward and backward pass of a network on random images."""

    def __init__(self, model: DenseNet, side: int, precision: str, context: RunContext) -> None:
        self._model, self._device, self._precision = model.to(context.device).train(), context.device, precision
        self._side = side

    def seconds(self, count: int) -> float:
        """Time one step on `count` images."""
        images = torch.randn(count, 3, self._side, self._side, device=self._device)
        synchronize(self._device)
        started = time.perf_counter()
        with autocast(self._device, self._precision):
            logits = self._model(images)
        F.cross_entropy(logits.float(), logits.new_zeros(count, dtype=torch.long)).backward()
        synchronize(self._device)
        return time.perf_counter() - started

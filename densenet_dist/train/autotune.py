"""Settings left at ``auto`` that are decided by measurement: the loader (torch or DALI) and the form of dense blocks.

Rank 0 measures once per run and records the result in env.json, so that a resumed run keeps it: the variants differ in
the last bits of their results.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from densenet_dist.custom import is_custom
from densenet_dist.data.dali_loader import dali_installed
from densenet_dist.data.datasets import Dataset
from densenet_dist.data.engine import ENGINES
from densenet_dist.data.loader import TrainLoader
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.model.kernels import unavailable
from densenet_dist.run_folder import CHECKPOINTS_FOLDER, ENV_FILE
from densenet_dist.schema import Config, ModelConfig
from densenet_dist.train.context import RunContext
from densenet_dist.train.inputs import Indices, engine_of, train_loader
from densenet_dist.train.network import autocast, build_model, suppress_out_of_memory
from densenet_dist.train.ranks import broadcast, gather_objects

CHOICES: Final = {
    "loader": ("data.",),
    "block": ("data.", "model.", "train.global_batch_size", "train.grad_accum_steps", "train.precision"),
}
"""The keys under which env.json holds choices, and the settings that each depends on."""

LOADER_SECONDS: Final = 0.4
MIN_SPEEDUP: Final = 1.1
"""How many times as fast a loader must be to replace the default of the device: DALI on a GPU, torch on a CPU."""

FORMS: Final = ("fused", "reference")
MAX_SECONDS: Final = 2.0
MAX_SHARE: Final = 0.01
"""Limits of the time for measuring both forms: seconds, and a share of the estimated duration of the run."""
MAX_IMAGES: Final = 32
"""Limit of a measured step on a CPU: the reference form may need several times the memory of the fused one."""
MIN_IMAGES: Final = 10_000
"""Training images per rank, over all epochs, below which blocks are not measured."""


class Choice(NamedTuple):
    """What was chosen, why (in a few words), and the figures that were measured."""

    name: str
    reason: str
    figures: dict[str, float]


class Speed(NamedTuple):
    """Images that a loader produces while nothing consumes them: per second, and per CPU-second of all threads."""

    per_second: float
    per_cpu_second: float


def choose_loader(config: Config, context: RunContext, dataset: Dataset, indices: Indices) -> str:
    """Return torch or dali, the same on every rank. A collective call.

    For auto, both are measured on the run's own images, augmentation and batch size.
    """
    if config.data.loader != "auto":
        return config.data.loader

    def measure_both() -> Choice:
        if not dali_installed():
            return Choice("torch", "DALI is not installed", {})
        speeds = {}
        try:
            for loader in ENGINES:
                engine = engine_of(config, context.device, dataset, dataset.train, loader)
                batches = train_loader(config, context, dataset, engine, indices)
                speeds[loader] = measure_loader(batches, context.device, seconds=LOADER_SECONDS)
        except EnvironmentProblem as error:
            return Choice("torch", str(error).splitlines()[0], {})
        return compare_loaders(speeds, context.device.type)

    return _recorded(context, "loader", ENGINES, measure_both)


def measure_loader(loader: TrainLoader, device: torch.device, *, seconds: float, warm_up: int = 3) -> Speed:
    """Take batches for about `seconds`; the first `warm_up` batches are not counted."""
    batches = (batch for epoch in itertools.count() for batch in loader.epoch(epoch))
    for _ in itertools.islice(batches, warm_up):
        pass
    synchronize(device)
    images, started, worked = 0, time.perf_counter(), time.process_time()
    for count, batch in enumerate(batches, start=1):
        images += len(batch.targets)
        if count % 16 == 0:
            synchronize(device)  # else the queue of a GPU would run ahead of the clock
        if time.perf_counter() - started > seconds:
            break
    synchronize(device)
    elapsed, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    return Speed(images / elapsed, images / max(cpu_seconds, 1e-9))


def compare_loaders(speeds: dict[str, Speed], device: str) -> Choice:
    """Choose the default of the device, or the other loader if it is clearly faster.

    Images per CPU-second count on a CPU, where training needs the cores, and images per second on a GPU.
    """
    if device == "cuda":
        default, other, unit, key = "dali", "torch", "images/s", "images_per_s"
        rates = {name: speed.per_second for name, speed in speeds.items()}
    else:
        default, other, unit, key = "torch", "dali", "images/CPU-s", "images_per_cpu_s"
        rates = {name: speed.per_cpu_second for name, speed in speeds.items()}
    return _choice(rates, default if MIN_SPEEDUP * rates[default] >= rates[other] else other, unit, key)


def _choice(rates: dict[str, float], name: str, unit: str = "images/s", key: str = "images_per_s") -> Choice:
    (other,) = rates.keys() - {name}
    figures = {f"{each}_{key}": round(rate, 1) for each, rate in rates.items()}
    chosen, rejected = (f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}" for rate in (rates[name], rates[other]))
    return Choice(name, f"{chosen} {unit}; {other}: {rejected}", figures)


def choose_block(config: Config, context: RunContext, dataset: Dataset, images: int) -> ModelConfig:
    """Return the model's settings with the form of the dense block to train. A collective call.

    ``auto`` becomes the form that is faster with the run's own network, batch size, precision and number of threads. It
    is ``fused`` without a measurement if the steps are compiled or captured as a CUDA graph (the eager speed says
    little about them), in short runs, and in runs that an older version started without one. `images` is the number of
    training images over all epochs and ranks.
    """
    model = config.model
    if model.block == "reference" or is_custom(model.variant):
        return model
    # On all ranks or none: the forms differ in their collective calls, and kernels may be missing on one node.
    if reason := next(filter(None, gather_objects(unavailable(context.device.type))), None):
        context.note(f"block: reference ({reason})")
        return replace(model, block="reference")
    short = images < MIN_IMAGES * context.world_size
    old = context.run.exists(f"{CHECKPOINTS_FOLDER}/manifest.json") and not context.run.read_json(ENV_FILE).get("block")
    if model.block == "fused" or config.train.compile or config.train.cuda_graph or short or old:
        return replace(model, block="fused")
    measure_both = partial(_measure_blocks, config, context, dataset, images // context.world_size)
    name = _recorded(context, "block", FORMS, measure_both)
    return replace(model, block="fused" if name == "fused" else "reference")


def _measure_blocks(config: Config, context: RunContext, dataset: Dataset, images: int) -> Choice:
    share = max(1, config.train.global_batch_size // (context.world_size * config.train.grad_accum_steps))
    rates = dict.fromkeys(FORMS, 0.0)
    models: dict[str, nn.Module] = {}
    for form in FORMS:
        model = build_model(replace(config.model, block=form), dataset.num_classes, dataset.image_size)
        models[form] = model.to(context.device).train()
    how = dataset.image_size, config.train.precision, context.device

    def measure_steps(count: int) -> None:
        for form, model in models.items():
            rates[form] = max(rates[form], count / _step_seconds(model, count, *how))

    with suppress_out_of_memory():
        for model in models.values():  # builds kernels and allocates
            _step_seconds(model, 2, *how)
        measure_steps(2)
        per_image = sum(1 / rate for rate in rates.values())  # seconds, of both forms
        remaining = min(MAX_SECONDS, MAX_SHARE * images * min(1 / rate for rate in rates.values()))
        count = max(2, min(share, MAX_IMAGES, int(remaining / 2 / per_image)))
        # Steps of two images mostly measure kernel launches, so a GPU measures with its share of a batch, after a
        # warm-up in which cuDNN searches for algorithms.
        if context.device.type == "cuda":
            count, per_image, rates = max(2, share), 0.0, dict.fromkeys(FORMS, 0.0)
            for model in models.values():
                _step_seconds(model, count, *how)
        while remaining > count * per_image:
            started = time.perf_counter()
            measure_steps(count)
            remaining -= time.perf_counter() - started
        return _choice(rates, max(FORMS, key=lambda form: rates[form]))
    return Choice("fused", "the measurement ran out of memory", {})


def _step_seconds(model: nn.Module, count: int, side: int, precision: str, device: torch.device) -> float:
    """Time the forward and backward pass on `count` random images."""
    images = torch.randn(count, 3, side, side, device=device)
    synchronize(device)
    started = time.perf_counter()
    with autocast(device, precision):
        logits = model(images)
    F.cross_entropy(logits.float(), logits.new_zeros(count, dtype=torch.long)).backward()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _recorded(context: RunContext, key: str, names: tuple[str, ...], measure: Callable[[], Choice]) -> str:
    """Return the choice that env.json records under `key` for this type of device, or else measure and record it.

    A collective call. Only rank 0 measures, reports the result and writes env.json.
    """
    name = ""
    if context.rank == 0:
        recorded = context.run.read_json(ENV_FILE).get(key)
        if isinstance(recorded, dict) and recorded.get("device") == context.device.type:
            name = str(recorded.get("name"))
        if name not in names:
            choice = measure()
            name = choice.name
            if context.device.type == "cuda":  # the run's own peak does not include the variants it does not use
                torch.cuda.reset_peak_memory_stats(context.device)
            record = {"name": choice.name, "device": context.device.type, "reason": choice.reason, **choice.figures}
            context.run.update_json(ENV_FILE, **{key: record})
            context.note(f"{key}: {choice.name} ({choice.reason})")
    return broadcast(name)

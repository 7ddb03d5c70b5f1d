"""Which engine makes a run's batches: as configured, or the faster one of the two, measured once a run."""

from __future__ import annotations

import json
from typing import Any

import torch.distributed as dist

from densenet_dist.data.dali_support import dali_installed
from densenet_dist.data.datasets import Dataset
from densenet_dist.data.speed import Speed, endless, measure
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.run_folder import ENV_FILE
from densenet_dist.schema import Config
from densenet_dist.train.context import RunContext
from densenet_dist.train.environment import LOADER_KEY
from densenet_dist.train.inputs import Indices, engine_of, train_loader

MEASURE_SECONDS = 0.4
CLEARLY = 1.1
"""How much faster the other one must be than the usual one of the device: DALI on a GPU, torch on a CPU."""


def choose_loader(config: Config, context: RunContext, dataset: Dataset, indices: Indices) -> str:
    """torch or dali, the same on every rank. A collective call.

    For auto, rank 0 measures both on the run's own images, augmentation and batch size, by images a CPU-second on a CPU
    (where training needs the cores) and by images a second on a GPU; it says so and writes it to env.json, where a
    resumed run finds it.
    """
    if config.data.loader != "auto":
        return config.data.loader
    chosen: list[Any] = [None]
    if context.rank == 0:
        chosen[0] = _recorded(context) or _measured(config, context, dataset, indices)
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, src=0)
    return str(chosen[0])


def _recorded(context: RunContext) -> str | None:
    choice = context.run.read_json(ENV_FILE).get(LOADER_KEY, {})
    return choice.get("name") if choice.get("device") == context.device.type else None


def _measured(config: Config, context: RunContext, dataset: Dataset, indices: Indices) -> str:
    name, reason = "torch", ""
    figures: dict[str, float] = {}
    if not dali_installed():
        reason = "DALI is not installed"
    else:
        try:
            speeds = {loader: _speed(loader, config, context, dataset, indices) for loader in ("torch", "dali")}
        except EnvironmentProblem as error:
            reason = str(error).splitlines()[0]
        else:
            name, reason, figures = compare(speeds, context.device.type)
    choice = {"name": name, "device": context.device.type, "reason": reason, **figures}
    context.run.write(ENV_FILE, json.dumps(context.run.read_json(ENV_FILE) | {LOADER_KEY: choice}, indent=1) + "\n")
    context.report({"kind": "note", "text": f"batches are made by {name}: {reason}"})
    return name


def compare(speeds: dict[str, Speed], device: str) -> tuple[str, str, dict[str, float]]:
    """The name of the one to take, the reason in words, and the figures for env.json."""
    usual, other = ("dali", "torch") if device == "cuda" else ("torch", "dali")
    unit = "second" if device == "cuda" else "CPU-second"
    rates = {name: speed.per_second if device == "cuda" else speed.per_cpu_second for name, speed in speeds.items()}
    name = other if rates[other] > CLEARLY * rates[usual] else usual
    loser = usual if name == other else other
    reason = f"{rates[name]:,.0f} images a {unit}, {loser} {rates[loser]:,.0f}"
    key = "images_per_s" if device == "cuda" else "images_per_cpu_s"
    return name, reason, {f"{loader}_{key}": round(rate) for loader, rate in rates.items()}


def _speed(loader: str, config: Config, context: RunContext, dataset: Dataset, indices: Indices) -> Speed:
    engine = engine_of(config, context.device, dataset, dataset.train, loader)
    batches = endless(train_loader(config, context, dataset, engine, indices))
    return measure(batches, context.device, seconds=MEASURE_SECONDS)

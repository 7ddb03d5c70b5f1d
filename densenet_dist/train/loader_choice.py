"""Which engine makes a run's batches: as configured, or the faster one of the two, measured once a run."""

from __future__ import annotations

from functools import partial

from densenet_dist.data.dali_support import dali_installed
from densenet_dist.data.datasets import Dataset
from densenet_dist.data.speed import Speed, endless, measure
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.schema import Config
from densenet_dist.train.context import RunContext
from densenet_dist.train.inputs import Indices, engine_of, train_loader
from densenet_dist.train.measured_choice import Choice, measured_choice

MEASURE_SECONDS = 0.4
CLEARLY = 1.1
"""How much faster the other one must be than the usual one of the device: DALI on a GPU, torch on a CPU."""


def choose_loader(config: Config, context: RunContext, dataset: Dataset, indices: Indices) -> str:
    """Return torch or dali, the same on every rank. A collective call.

    For auto, both are measured on the run's own images, augmentation and batch size: images per CPU-second on a CPU,
    where training needs the cores, and images per second on a GPU.
    """
    if config.data.loader != "auto":
        return config.data.loader
    return measured_choice(context, "loader", ("torch", "dali"), partial(_measure, config, context, dataset, indices))


def _measure(config: Config, context: RunContext, dataset: Dataset, indices: Indices) -> Choice:
    if not dali_installed():
        return Choice("torch", "DALI is not installed", {})
    try:
        speeds = {loader: _speed(loader, config, context, dataset, indices) for loader in ("torch", "dali")}
    except EnvironmentProblem as error:
        return Choice("torch", str(error).splitlines()[0], {})
    return compare(speeds, context.device.type)


def compare(speeds: dict[str, Speed], device: str) -> Choice:
    """Choose by speed, in favour of the loader that is usual for the type of device."""
    usual, other = ("dali", "torch") if device == "cuda" else ("torch", "dali")
    unit = "images/s" if device == "cuda" else "images/CPU-s"
    rates = {name: speed.per_second if device == "cuda" else speed.per_cpu_second for name, speed in speeds.items()}
    name = other if rates[other] > CLEARLY * rates[usual] else usual
    loser = usual if name == other else other
    reason = f"{rates[name]:,.0f} {unit}; {loser}: {rates[loser]:,.0f}"
    key = "images_per_s" if device == "cuda" else "images_per_cpu_s"
    return Choice(name, reason, {f"{loader}_{key}": round(rate) for loader, rate in rates.items()})


def _speed(loader: str, config: Config, context: RunContext, dataset: Dataset, indices: Indices) -> Speed:
    engine = engine_of(config, context.device, dataset, dataset.train, loader)
    batches = endless(train_loader(config, context, dataset, engine, indices))
    return measure(batches, context.device, seconds=MEASURE_SECONDS)

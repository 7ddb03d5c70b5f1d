"""``densenet-dist bench data``: how fast each loader produces the batches of a configuration on this machine.

Each loader runs in its own process, so that its memory can be measured, and is idle while another one is measured. The
rounds alternate between loaders, and medians are reported. Nothing consumes the batches: this is the maximum rate of
the loaders, not the rate of a training run.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch

from densenet_dist.bench.common import (
    MeasuringProcess,
    conditions,
    conditions_line,
    peak_bytes,
    print_table,
    reset_peak,
)
from densenet_dist.cluster.resources import local_threads
from densenet_dist.config import to_dict, validate
from densenet_dist.data.dali_support import require_dali
from densenet_dist.data.datasets import Dataset
from densenet_dist.data.speed import Speed, endless
from densenet_dist.data.speed import measure as measure_speed
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import Config
from densenet_dist.train.context import RunContext, choose_device
from densenet_dist.train.inputs import engine_of, load_dataset_of, train_and_val, train_loader

Measurement: TypeAlias = tuple[Speed, float, float | None]
"""A speed, the process' peak memory in MiB, and that of torch's tensors on the GPU."""


def bench_data(config: Config, *, batch_sizes: Sequence[int], seconds: float = 1.0, rounds: int = 3) -> dict[str, Any]:
    """Measure every loader at every batch size.

    Args:
        config: the data set, the augmentation and ``cluster.device`` to use.
        batch_sizes: images per batch.
        seconds: approximate duration of each measurement.
        rounds: number of measurements; medians are reported.

    Returns:
        ``rows``: for each loader and batch size the median ``images_per_s`` with its ``spread`` (lowest, highest),
        ``images_per_cpu_s`` over all threads of the process, ``peak_mib`` of the process with data set and libraries,
        and ``gpu_peak_mib`` of torch's tensors (without DALI's own memory); ``notes``, and the `conditions`.

    Raises:
        DataError, ConfigError, EnvironmentProblem: as for training.
    """
    device = choose_device(config.cluster.device)
    notes, loaders = [], ["torch", "dali"]
    try:
        require_dali(device, decoding=config.data.name == "folder")
    except EnvironmentProblem as error:
        loaders.remove("dali")
        notes.append(f"dali skipped: {str(error).splitlines()[0]}")
    load_dataset_of(config)  # raises its errors before any process is started
    results: dict[tuple[str, int], list[Measurement]] = {}
    processes = {name: MeasuringProcess(_prepare, name, to_dict(config), str(device)) for name in loaders}
    try:
        for process in processes.values():
            process.wait()
        for _, batch_size, name in itertools.product(range(rounds), batch_sizes, loaders):
            results.setdefault((name, batch_size), []).append(processes[name].measure(batch_size, seconds))
    finally:
        for process in processes.values():
            process.stop()
    return {
        "rows": [_row(*key, of_key) for key, of_key in results.items()],
        "notes": notes,
        "data": to_dict(config)["data"],
        **conditions(config, device, seconds, rounds),
    }


def _row(loader: str, batch_size: int, results: list[Measurement]) -> dict[str, Any]:
    speeds = [speed.per_second for speed, _, _ in results]
    gpu = [peak for _, _, peak in results if peak is not None]
    return {
        "loader": loader,
        "batch_size": batch_size,
        "images_per_s": round(statistics.median(speeds), 1),
        "spread": (round(min(speeds), 1), round(max(speeds), 1)),
        "images_per_cpu_s": round(statistics.median(speed.per_cpu_second for speed, _, _ in results), 1),
        "peak_mib": round(max(peak for _, peak, _ in results), 1),
        "gpu_peak_mib": round(max(gpu), 1) if gpu else None,
    }


def _prepare(loader: str, plain: dict[str, Any], device_name: str) -> Callable[[int, float], Measurement]:
    config, device = validate(plain), torch.device(device_name)
    torch.set_num_threads(local_threads(config.cluster))
    return partial(_measure, loader, config, load_dataset_of(config), device)


def _measure(
    loader: str, config: Config, dataset: Dataset, device: torch.device, batch_size: int, seconds: float
) -> Measurement:
    config = replace(config, train=replace(config.train, global_batch_size=batch_size))
    reset_peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    engine = engine_of(config, device, dataset, dataset.train, loader)
    context = RunContext(RunFolder(config.storage, config.name), device)
    batches = train_loader(config, context, dataset, engine, train_and_val(config, dataset)[0])
    speed = measure_speed(endless(batches), device, seconds=seconds)
    gpu = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return speed, peak_bytes() / 2**20, gpu


def print_data(found: dict[str, Any]) -> None:
    """Print the result of `bench_data`."""
    gpu = found["device"] != "CPU"
    headings = ["loader", "batch", "images/s", "lowest", "highest", "images/CPU-s", "peak MiB"]
    rows = []
    for row in found["rows"]:
        figures = [row["images_per_s"], *row["spread"], row["images_per_cpu_s"], row["peak_mib"]]
        figures += [row["gpu_peak_mib"]] if gpu else []
        rows.append([row["loader"], str(row["batch_size"]), *(f"{figure:,.0f}" for figure in figures)])
    title = f"{found['data']['name']}, {found['data']['augment']}; {conditions_line(found)}"
    print_table(title, [*headings, "GPU MiB (torch)"] if gpu else headings, rows, found["notes"])

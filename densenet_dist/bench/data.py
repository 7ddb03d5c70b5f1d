"""``densenet-dist bench data``: how fast each loader makes the batches of a configuration on this machine.

Each loader works in a process of its own, so that its memory can be told, and waits while another one is measured; the
rounds go through all of them in turn, and the medians count. Nobody uses the batches: this is the most that the
loaders can give, not what a training run sees.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from densenet_dist.bench.workers import Worker, peak_bytes, reset_peak
from densenet_dist.cluster.resources import local_threads
from densenet_dist.config import to_dict, validate
from densenet_dist.data import augment, reference
from densenet_dist.data.dali_support import require_dali
from densenet_dist.data.datasets import Dataset
from densenet_dist.data.image_files import ImageFiles
from densenet_dist.data.speed import Speed, endless, measure
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import Config
from densenet_dist.train.context import LocalContext, choose_device
from densenet_dist.train.environment import describe_environment
from densenet_dist.train.inputs import (
    augmentation_of,
    engine_of,
    load_dataset_of,
    normalisation,
    train_and_val,
    train_loader,
)

LOADERS = ("torch", "dali", "reference")
BATCH_SIZES = (64, 128, 256, 512, 1024)

_Measured: TypeAlias = tuple[Speed, float, float | None]
"""A speed, the process' peak memory in MiB, and torch's on the GPU."""


@dataclass(frozen=True)
class Row:
    """The medians of one loader at one batch size.

    Attributes:
        loader: torch, dali, or reference: the same in plain NumPy, image by image.
        batch_size: None where it makes no difference.
        images_per_s: with a spread of (lowest, highest) over the rounds.
        images_per_cpu_s: over all threads of the process.
        peak_mib: most memory of the process while it was measured, data set and libraries included.
        gpu_peak_mib: most memory that torch had on the GPU; None without one. DALI's own is not in it.
    """

    loader: str
    batch_size: int | None
    images_per_s: float
    spread: tuple[float, float]
    images_per_cpu_s: float
    peak_mib: float
    gpu_peak_mib: float | None


def bench_data(
    config: Config, *, batch_sizes: tuple[int, ...] = BATCH_SIZES, seconds: float = 1.0, rounds: int = 3
) -> dict[str, Any]:
    """Measure every loader at every batch size.

    Args:
        config: whose data set and augmentation are used, on its ``cluster.device``.
        batch_sizes: images a batch.
        seconds: how long each measurement takes, about.
        rounds: of which the medians count.

    Returns:
        ``rows`` (as `Row`, plain), ``notes``, and what they were measured on and with.

    Raises:
        DataError, ConfigError, EnvironmentProblem: as for training.
    """
    device = choose_device(config.cluster.device)
    notes, loaders = [], list(LOADERS)
    try:
        require_dali(device, decoding=config.data.name == "folder")
    except EnvironmentProblem as error:
        loaders.remove("dali")
        notes.append(f"dali is left out: {str(error).splitlines()[0]}")
    load_dataset_of(config)  # says what is wrong with it before any process is started
    found: dict[tuple[str, int | None], list[_Measured]] = {}
    workers = {name: Worker(_prepare, name, to_dict(config), str(device)) for name in loaders}
    try:
        for worker in workers.values():
            worker.wait()
        for _ in range(rounds):
            for batch_size, (name, worker) in itertools.product(batch_sizes, workers.items()):
                if name != "reference":
                    found.setdefault((name, batch_size), []).append(worker.ask(batch_size, seconds))
            found.setdefault(("reference", None), []).append(workers["reference"].ask(1, seconds))
    finally:
        for worker in workers.values():
            worker.stop()
    return {
        "rows": [asdict(_row(*key, results)) for key, results in found.items()],
        "notes": notes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": local_threads(config.cluster),
        "seconds": seconds,
        "rounds": rounds,
        "data": to_dict(config)["data"],
        "environment": describe_environment(),
    }


def _row(loader: str, batch_size: int | None, results: list[_Measured]) -> Row:
    speeds = [speed.per_second for speed, _, _ in results]
    gpu = [peak for _, _, peak in results if peak is not None]
    return Row(
        loader,
        batch_size,
        round(statistics.median(speeds), 1),
        (round(min(speeds), 1), round(max(speeds), 1)),
        round(statistics.median(speed.per_cpu_second for speed, _, _ in results), 1),
        round(max(peak for _, peak, _ in results), 1),
        round(max(gpu), 1) if gpu else None,
    )


def print_table(found: dict[str, Any]) -> None:
    """The outcome of `bench_data` for people."""
    console = Console(highlight=False)
    data, machine = found["data"], found["environment"]
    gpu = found["device"] != "CPU"
    console.print(
        f"{data['name']}, {data['augment']}; {found['device'] if gpu else machine['cpu']}, {found['threads']} threads; "
        f"medians of {found['rounds']} rounds"
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("loader", "batch", "images/s", "lowest", "highest", "images/CPU-s", "peak MiB"):
        table.add_column(heading, justify="left" if heading == "loader" else "right")
    if gpu:
        table.add_column("GPU MiB (torch's)", justify="right")
    for row in found["rows"]:
        numbers = (row["images_per_s"], *row["spread"], row["images_per_cpu_s"], row["peak_mib"])
        cells = [row["loader"], str(row["batch_size"] or "any"), *(f"{number:,.0f}" for number in numbers)]
        table.add_row(*cells, *([f"{row['gpu_peak_mib']:,.0f}"] if gpu else []))
    console.print(table)
    for note in found["notes"]:
        console.print(note, markup=False)


def _prepare(name: str, plain: dict[str, Any], device_name: str) -> Callable[[int, float], _Measured]:
    config, device = validate(plain), torch.device(device_name)
    torch.set_num_threads(local_threads(config.cluster))
    return partial(_measure, name, config, load_dataset_of(config), device)


def _measure(
    name: str, config: Config, dataset: Dataset, device: torch.device, batch_size: int, seconds: float
) -> _Measured:
    config = replace(config, train=replace(config.train, global_batch_size=batch_size))
    reset_peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if name == "reference":
        speed = _measure_reference(config, dataset, seconds)
    else:
        engine = engine_of(config, device, dataset, dataset.train, name)
        context = LocalContext(RunFolder(config.storage, config.name), device)
        loader = train_loader(config, context, dataset, engine, train_and_val(config, dataset)[0])
        speed = measure(endless(loader), device, seconds=seconds)
    gpu = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return speed, peak_bytes() / 2**20, gpu


def _measure_reference(config: Config, dataset: Dataset, seconds: float) -> Speed:
    """Images one by one, by `data.reference`."""
    images, size = dataset.train.images, dataset.image_size
    files = images if isinstance(images, ImageFiles) else None
    count = min(len(dataset.train.labels), 4096)
    sizes = files.sizes[:count] if files else None
    todo = augment.draw(augmentation_of(config), config.seed, 0, count, size, sizes)
    mean, std = normalisation(config, dataset)
    started, worked = time.perf_counter(), time.process_time()
    for made in itertools.count(1):
        row = made % count
        one = todo.map(partial(_pick, row))
        if files is not None:
            picture = files.decode(row).permute(1, 2, 0).numpy()
            image: Any = reference.shrink_or_enlarge(picture, one.window.tolist(), size)
        else:
            image = np.asarray(images)[row]
        reference.augment_image(image, one, mean, std)
        if time.perf_counter() - started > seconds:
            break
    return Speed(made, time.perf_counter() - started, time.process_time() - worked)


def _pick(row: int, array: Any) -> Any:
    return array[row]

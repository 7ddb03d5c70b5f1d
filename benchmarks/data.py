"""How fast each loader produces the batches of a configuration on this machine.

    python benchmarks/data.py configs/cifar10_notebook.yaml --out loaders.json

The rounds alternate between loaders, and medians are reported. Nothing consumes the batches: this is the maximum rate
of the loaders, not the rate of a training run.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from measuring import (
    conditions,
    conditions_line,
    device_name,
    median_and_spread,
    parser_of,
    print_table,
    write_json,
)

from densenet_dist.cluster.resources import local_threads
from densenet_dist.config import load_config, to_dict
from densenet_dist.data.dali_loader import require_dali
from densenet_dist.data.datasets import Dataset
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import Config
from densenet_dist.train.autotune import Speed, measure_loader
from densenet_dist.train.context import RunContext, choose_device
from densenet_dist.train.inputs import engine_of, load_dataset_of, train_and_val, train_loader


def measure(config: Config, batch_sizes: Sequence[int], seconds: float, rounds: int) -> dict[str, Any]:
    """Measure every loader at every batch size, each time for about `seconds`.

    Returns:
        ``rows``: for each loader and batch size the median ``images_per_s`` with its ``spread`` (lowest, highest)
        and ``images_per_cpu_s`` over all threads of the process; ``notes``, and the `conditions`.

    Raises:
        DataError, ConfigError, EnvironmentProblem: as for training.
    """
    device, threads = choose_device(config.cluster.device), local_threads(config.cluster)
    notes, loaders = [], ["torch", "dali"]
    try:
        require_dali(device, decoding=config.data.name == "folder")
    except EnvironmentProblem as error:
        loaders.remove("dali")
        notes.append(f"dali skipped: {str(error).splitlines()[0]}")
    torch.set_num_threads(threads)
    dataset = load_dataset_of(config)
    results: dict[tuple[str, int], list[Speed]] = {}
    for _, batch_size, loader in itertools.product(range(rounds), batch_sizes, loaders):
        speed = measure_once(loader, config, dataset, device, batch_size, seconds)
        results.setdefault((loader, batch_size), []).append(speed)
    rows = []
    for (loader, batch_size), speeds in results.items():
        median, spread = median_and_spread([speed.per_second for speed in speeds])
        per_cpu, _ = median_and_spread([speed.per_cpu_second for speed in speeds])
        figures = {"images_per_s": median, "spread": spread, "images_per_cpu_s": per_cpu}
        rows.append({"loader": loader, "batch_size": batch_size, **figures})
    about = conditions(device_name(device), threads, seconds, rounds)
    return {"rows": rows, "notes": notes, "data": to_dict(config)["data"], **about}


def measure_once(
    loader: str, config: Config, dataset: Dataset, device: torch.device, batch_size: int, seconds: float
) -> Speed:
    config = replace(config, train=replace(config.train, global_batch_size=batch_size))
    engine = engine_of(config, device, dataset, dataset.train, loader)
    context = RunContext(RunFolder(config.storage, config.name), device)
    batches = train_loader(config, context, dataset, engine, train_and_val(config, dataset)[0])
    return measure_loader(batches, device, seconds=seconds)


def print_rows(found: dict[str, Any]) -> None:
    """Print the result of `measure`."""
    headings = ["loader", "batch", "images/s", "lowest", "highest", "images/CPU-s"]
    rows = []
    for row in found["rows"]:
        figures = [row["images_per_s"], *row["spread"], row["images_per_cpu_s"]]
        rows.append([row["loader"], str(row["batch_size"]), *(f"{figure:,.0f}" for figure in figures)])
    title = f"{found['data']['name']}, {found['data']['augment']}; {conditions_line(found)}"
    print_table(title, headings, rows, found["notes"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 128, 256, 512, 1024])
    args = parser.parse_intermixed_args(arguments)
    found = measure(load_config(*args.sources), args.batch_sizes, args.seconds, args.rounds)
    print_rows(found)
    write_json(found, args.out)


if __name__ == "__main__":
    main()

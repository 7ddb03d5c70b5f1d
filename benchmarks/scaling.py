"""How training speeds up with the number of workers (docs/scaling.md).

    python benchmarks/scaling.py configs/cifar10_notebook.yaml --workers 1 2 --out scaling.json

The training step is measured on random images in memory, on 1, 2, ... Ray Train workers. Weak scaling gives every
worker the same number of images: the efficiency is T(1) / T(n). Strong scaling splits one batch: T(1) / (n T(n)).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from time import perf_counter
from typing import Any, Final, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from measuring import (
    conditions,
    conditions_line,
    device_name,
    interval,
    median_and_spread,
    num_classes,
    number,
    parser_of,
    print_table,
    rounded,
    with_spread,
    write_json,
)

from densenet_dist.cluster.connection import connected
from densenet_dist.cluster.launch import absolute
from densenet_dist.cluster.resources import count_fitting, plan_resources
from densenet_dist.config import load_config, to_dict
from densenet_dist.data.datasets import Dataset
from densenet_dist.data.image_files import Split
from densenet_dist.data.loader import Batch
from densenet_dist.errors import ConfigError
from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import Config, ScheduleConfig
from densenet_dist.train.autotune import synchronize
from densenet_dist.train.context import RunContext
from densenet_dist.train.loop import train_step
from densenet_dist.train.network import no_sync
from densenet_dist.train.preflight import check_run
from densenet_dist.train.trainer import Trainer

MODES: Final = ("weak", "strong")

Probe: TypeAlias = Callable[[Trainer, dict[int, Batch]], Any]
"""An additional measurement of a trainer; it gets this rank's share of a batch by size of the global batch."""

Timings: TypeAlias = dict[tuple[int, bool], list[float]]
"""A rank's seconds per training step in each round, by size of the global batch and whether gradients are all-reduced
or stay on their rank (DDP's ``no_sync``)."""


def measure(
    config: Config,
    *,
    workers: Sequence[int] = (1, 2),
    modes: Sequence[str] = MODES,
    seconds: float = 1.0,
    rounds: int = 3,
    probe: Probe | None = None,
) -> dict[str, Any]:
    """Measure with every number of workers, each time for about `seconds`.

    Args:
        config: ``train.global_batch_size`` is the number of images per worker in weak scaling, and of all workers
            together in strong scaling.
        workers: the numbers of workers; 1 is always measured.
        probe: an additional measurement on every rank.

    Returns:
        Plain values: the figures of `rows`, and the conditions; ``probed``: the result of the probe on rank 0, by
        number of workers.

    Raises:
        ConfigError, EnvironmentProblem: as for training, or for more workers than images or GPUs.
    """
    config, counts = absolute(config), sorted({1, *workers})
    if "strong" in modes and counts[-1] > config.train.global_batch_size:
        raise ConfigError(
            f"--workers: {counts[-1]} workers cannot share train.global_batch_size={config.train.global_batch_size}\n"
            "  raise it, or measure weak scaling alone with --modes weak"
        )
    check_run(config)
    timings: dict[int, list[Timings]] = {}
    about: dict[int, dict[str, Any]] = {}
    with connected(config.cluster) as is_private:
        import ray

        for count in counts:
            print(f"{count} of {', '.join(map(str, counts))} workers", file=sys.stderr, flush=True)
            sizes = list(dict.fromkeys(images_of(config, mode, count) for mode in modes))
            arguments = (config, num_classes(config), sizes, seconds, rounds, probe)
            ranks = run_on_workers(count, arguments, config, is_private)
            timings[count], about[count] = [of_rank for of_rank, _ in ranks], ranks[0][1]
        available = ray.cluster_resources()
    single, threads = replace(config.cluster, workers=1), config.cluster.cpus_per_worker
    room = count_fitting(available, plan_resources(single, available, fixed=False).per_worker)
    return {
        "rows": rows(config, timings, modes, room),
        "notes": ["*: more workers than cores: the times show how cores are shared"] if counts[-1] > room else [],
        "name": config.name,
        "model": to_dict(config)["model"],
        "parameters": about[1]["parameters"],
        "precision": config.train.precision,
        "gradient_compression": config.train.gradient_compression,
        "images": config.train.global_batch_size,
        "backend": about[1]["backend"],
        "room": room,
        **conditions(about[1]["device"], 1 if threads == "auto" else threads, seconds, rounds),
        **({"probed": {count: of_count["probed"] for count, of_count in about.items()}} if probe else {}),
    }


def run_on_workers(workers: int, arguments: tuple[Any, ...], config: Config, is_private: bool) -> list[Any]:
    """Call `measure_rank` on every rank of a process group, and return the results by rank.

    Workers may share CPU cores, and are not restarted.
    """
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from densenet_dist.cluster.connection import WORKER_ENV
    from densenet_dist.cluster.controller import NodeAddressTorchConfig

    available = ray.cluster_resources()
    single = plan_resources(replace(config.cluster, workers=1), available, fixed=True)
    share = int(available["CPU"] / workers * 1e4) / 1e4  # Ray counts in ten-thousandths of a core
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            on_rank,
            train_loop_config={"arguments": arguments, "threads": single.threads or 1},
            torch_config=NodeAddressTorchConfig(),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=single.use_gpu,
                resources_per_worker=single.per_worker | {"CPU": min(single.per_worker["CPU"], share)},
            ),
            run_config=RunConfig(
                name="scaling",
                storage_path=folder,  # nothing is saved
                worker_runtime_env=None if is_private else {"env_vars": WORKER_ENV},
            ),
        )
        return list(trainer.fit().return_value)


def on_rank(payload: dict[str, Any]) -> list[Any]:
    import ray.train.torch

    torch.set_num_threads(payload["threads"])
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, measure_rank(ray.train.torch.get_device(), *payload["arguments"]))
    return results


def images_of(config: Config, mode: str, workers: int) -> int:
    """Return the size of the global batch."""
    return config.train.global_batch_size * (workers if mode == "weak" else 1)


def rows(
    config: Config, timings: Mapping[int, Sequence[Timings]], modes: Sequence[str], room: int
) -> list[dict[str, Any]]:
    """Compute the figures for each mode and number of workers, from the timings of their ranks.

    ``step_ms`` is a step of the slowest rank, ``local_ms`` the same without the all-reduce, ``exposed_ms`` their
    difference; the efficiencies are T(1) / T(n) of the two, divided by n for strong scaling.
    """
    made = []
    for mode in modes:
        alone = statistics.median(slowest(timings[1], images_of(config, mode, 1)))
        for count, ranks in timings.items():
            images = images_of(config, mode, count)
            step = [1e3 * seconds for seconds in slowest(ranks, images)]
            step_ms, spread = median_and_spread(step)
            local_ms = 1e3 * statistics.median(slowest(ranks, images, exchange=count == 1))
            ideal = 1e3 * alone / (1 if mode == "weak" else count)
            made.append(
                {
                    "mode": mode,
                    "workers": count,
                    "images": images,
                    "oversubscribed": count > room,
                    "step_ms": step_ms,
                    "step_ms_spread": spread,
                    "local_ms": rounded(local_ms),
                    "exposed_ms": rounded(statistics.median(step) - local_ms),
                    "images_per_s": rounded(1e3 * images / step_ms),
                    "images_per_s_spread": tuple(rounded(1e3 * images / ms) for ms in reversed(spread)),
                    "efficiency": rounded(ideal / step_ms, 4),
                    "efficiency_spread": tuple(rounded(ideal / ms, 4) for ms in reversed(spread)),
                    "compute_efficiency": rounded(ideal / local_ms, 4),
                }
            )
    return made


def slowest(ranks: Sequence[Timings], images: int, *, exchange: bool = True) -> list[float]:
    """Return the seconds per step of the slowest rank, in each round."""
    return [max(times) for times in zip(*(timings[images, exchange] for timings in ranks), strict=True)]


def print_rows(found: dict[str, Any]) -> None:
    """Print the result of `measure`."""
    headings = ["mode", "workers", "images", "images/s", "lowest-\nhighest", "step\nms", "without\nexchange"]
    headings += ["exposed\nms", "efficiency\n(low-high)", "of com-\nputing"]
    cells = []
    for row in found["rows"]:
        workers = f"{row['workers']}{'*' if row['oversubscribed'] else ''}"
        speed = [number(row["images_per_s"]), interval(row["images_per_s_spread"])]
        times = [number(row[name]) for name in ("step_ms", "local_ms", "exposed_ms")]
        efficiency = [with_spread(row["efficiency"], row["efficiency_spread"]), f"{row['compute_efficiency']:.2f}"]
        cells.append([row["mode"], workers, str(row["images"]), *speed, *times, *efficiency])
    title = f"{found['name']}: {found['model']['variant']}, {found['parameters']:,} parameters"
    line = conditions_line(found, device_suffix=f" per worker, {found['backend']}")
    print_table(f"{title}, {found['precision']}; {line}", headings, cells, found["notes"])


def measure_rank(
    device: torch.device,
    config: Config,
    num_classes: int,
    global_sizes: Sequence[int],
    seconds: float,
    rounds: int,
    probe: Probe | None = None,
) -> tuple[Timings, dict[str, Any]]:
    """Measure on one rank, together with the other ranks of the process group.

    Args:
        global_sizes: sizes of the global batches, each at least one image per rank.
        probe: an additional measurement at the end, on all ranks at once.

    Returns:
        The timings; and the model's number of ``parameters``, the names of ``device`` and ``backend``, and what was
        ``probed``.
    """
    with random_trainer(config, device, num_classes, max(global_sizes)) as trainer:
        whole = next(iter(trainer.train_loader.epoch(0)))
        batches = {}
        for size in global_sizes:
            count = len(range(trainer.context.rank, size, trainer.context.world_size))  # this rank's share
            batches[size] = Batch(whole.images[:count], whole.targets[:count], size)
        return time_rounds(trainer, batches, seconds, rounds), {
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
            "device": device_name(device),
            "backend": dist.get_backend(),
            "probed": probe(trainer, batches) if probe else None,
        }


@contextmanager
def random_trainer(config: Config, device: torch.device, num_classes: int, images: int) -> Iterator[Trainer]:
    """Make a trainer on random images, with a learning rate that barely changes the weights."""
    train = replace(config.train, lr=1e-12, schedule=ScheduleConfig(name="constant"), global_batch_size=images)
    train = replace(train, epochs=1, max_minutes=None, cuda_graph=False, profile=None, class_weights=None)
    data = replace(config.data, loader="torch", val_fraction=0.0, prefetch=1, sampler="uniform")
    model = replace(config.model, weights=None, pretrained=False)
    config = replace(config, model=model, train=train, data=data, cluster=replace(config.cluster, workers="auto"))
    side, random = config.data.resolved_image_size, np.random.default_rng(config.seed)
    pixels = random.integers(0, 256, (images, side, side, 3), dtype=np.uint8)
    split = Split(pixels, random.integers(0, num_classes, images))
    names = tuple(map(str, range(num_classes)))
    dataset = Dataset("random", names, split, split, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    with tempfile.TemporaryDirectory() as folder:
        context = RunContext(RunFolder(folder, "run"), device, dist.get_rank(), dist.get_world_size())
        trainer = Trainer(config, context, dataset)
        trainer.train_model.train()
        try:
            yield trainer
        finally:
            trainer.store.close()


def time_rounds(trainer: Trainer, batches: dict[int, Batch], seconds: float, rounds: int) -> Timings:
    orders = ((True, False), (False, True)) if trainer.context.world_size > 1 else ((True,), (True,))
    timings: Timings = {(size, exchange): [] for size in batches for exchange in orders[0]}
    for size, exchange in timings:
        time_steps(trainer, batches[size], 1, exchange)  # warms up
    for current in range(rounds):
        for size, batch in batches.items():
            count = max(2, int(seconds / longest(time_steps(trainer, batch, 1, True), trainer.context.device)))
            # Alternate the order, so that a drift of the machine's speed does not bias the difference.
            for exchange in orders[current % 2]:
                timings[size, exchange].append(time_steps(trainer, batch, count, exchange))
    return timings


def time_steps(trainer: Trainer, batch: Batch, count: int, exchange: bool) -> float:
    """Run `count` steps, with or without the all-reduce; return the seconds per step."""
    with nullcontext() if exchange else no_sync(trainer.train_model):
        barrier(trainer.context.device)
        started = perf_counter()
        for _ in range(count):
            train_step(trainer, batch)
        synchronize(trainer.context.device)
        return (perf_counter() - started) / count


def longest(seconds: float, device: torch.device) -> float:
    """Return the maximum over all ranks."""
    longest = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)


def barrier(device: torch.device) -> None:
    """Synchronize the device, then all ranks."""
    synchronize(device)
    dist.barrier()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="1 is always measured")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    args = parser.parse_intermixed_args(arguments)
    found = measure(
        load_config(*args.sources), workers=args.workers, modes=args.modes, seconds=args.seconds, rounds=args.rounds
    )
    print_rows(found)
    write_json(found, args.out)


if __name__ == "__main__":
    main()

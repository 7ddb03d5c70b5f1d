"""How fast a configuration's model trains on this machine, and in how much memory.

    python benchmarks/model.py configs/cifar10_notebook.yaml --out model.json

Each variant of the model runs in its own process, so that its memory can be measured, and is idle while another one is
measured. The rounds alternate between variants, and medians are reported. Images are random and already on the device:
this measures the model and the optimizer on one device, without data loading and communication. For deep models,
compiling takes minutes per batch size.
"""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from typing import Any, Final, TypeAlias

import torch
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
from training_step import VARIANTS, Measurement, measure_variant, prepare_variant

from densenet_dist.cluster.resources import local_threads
from densenet_dist.config import load_config, to_dict
from densenet_dist.display.json_lines import finite
from densenet_dist.errors import DenseNetDistError, EnvironmentProblem, OutOfMemory
from densenet_dist.schema import Config
from densenet_dist.train.context import choose_device
from densenet_dist.train.preflight import check_run

FIGURES: Final = (
    *("images_per_s", "images_per_s_spread", "step_ms", "step_ms_spread", "peak_mib", "loss"),
    *("time_ratio", "time_ratio_spread", "memory_ratio"),
)
Case: TypeAlias = tuple[str, int]
"""A variant and a batch size."""


def measure(
    config: Config, *, variants: Sequence[str], batch_sizes: Sequence[int], seconds: float = 1.0, rounds: int = 3
) -> dict[str, Any]:
    """Measure every one of the `VARIANTS` named at every batch size, each time for about `seconds`.

    Returns:
        ``rows``, with the figures of `Measurement` and their ratios to the reference of the same round and batch size,
        or None and a reason in ``note``; ``notes``, and the `conditions`.

    Raises:
        ConfigError: the model cannot be built.
        EnvironmentProblem: there is no such device.
    """
    check_run(config)
    device = choose_device(config.cluster.device)
    usable = [name for name in variants if device.type == "cuda" or not VARIANTS[name].cuda_graph]
    notes = [f"{name} skipped: it needs a GPU" for name in variants if name not in usable]
    if config.data.name == "folder":
        notes.append(f"the folder is not read: measured with {num_classes(config)} classes")
    sizes = tuple(dict.fromkeys(batch_sizes))
    results, failures = measure_all(config, device, usable, sizes, seconds, rounds)
    settings = to_dict(config)
    found: dict[str, Any] = finite(
        {
            "rows": [
                {
                    "arm": name,
                    "batch_size": size,
                    "note": failures.get((name, size), ""),
                    **dict.fromkeys(FIGURES),
                    **figures_of(size, measured, results.get(("reference", size), [])),
                    "rounds": [asdict(one) for one in measured],
                }
                for (name, size), measured in results.items()
            ],
            "model": config.model.network,
            "precision": config.train.precision,
            "optimizer": settings["train"]["optimizer"],
            "image_size": config.data.resolved_image_size,
            "classes": num_classes(config),
            "notes": notes,
            **conditions(device_name(device), local_threads(config.cluster), seconds, rounds),
        }
    )
    return found


def measure_all(
    config: Config, device: torch.device, variants: Sequence[str], sizes: Sequence[int], seconds: float, rounds: int
) -> tuple[dict[Case, list[Measurement]], dict[Case, str]]:
    """Return the measurements of all rounds, and why those that are missing failed."""
    results: dict[Case, list[Measurement]] = {case: [] for case in itertools.product(variants, sizes)}
    failures: dict[Case, str] = {}
    others = set(multiprocessing.active_children())
    processes = {name: measuring_process() for name in variants}
    try:
        prepared = {
            name: processes[name].submit(prepare_variant, VARIANTS[name], config, num_classes(config), device)
            for name in variants
        }
        for name, task in prepared.items():  # all of them, so that preparing disturbs no measurement
            try:
                result_of(task)
            except DenseNetDistError as error:
                failures |= {(name, size): str(error) for size in sizes}
        for current, size, name in itertools.product(range(1, rounds + 1), sizes, variants):
            if (name, size) in failures:
                continue
            print(f"round {current} of {rounds}: {name}, batch size {size}", file=sys.stderr, flush=True)
            try:
                results[name, size].append(result_of(processes[name].submit(measure_variant, size, seconds)))
            except OutOfMemory as error:
                failures[name, size] = str(error)
            except DenseNetDistError as error:  # a process may be unusable after a kernel failed in it
                failures |= {(name, other): str(error) for other in sizes}
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:  # do not wait for the end of a measurement
            child.kill()
        raise
    finally:
        for process in processes.values():
            process.shutdown(cancel_futures=True)
    return results, failures


def figures_of(batch_size: int, results: Sequence[Measurement], reference: Sequence[Measurement]) -> dict[str, Any]:
    if not results:
        return {}
    step, step_spread = median_and_spread([one.step_ms for one in results])
    fastest, slowest = (batch_size / ms * 1e3 for ms in step_spread)
    figures: dict[str, Any] = {
        "images_per_s": rounded(batch_size / step * 1e3),
        "images_per_s_spread": (rounded(slowest), rounded(fastest)),
        "step_ms": step,
        "step_ms_spread": step_spread,
        "peak_mib": rounded(statistics.median(one.peak_bytes for one in results) / 2**20),
        "loss": results[0].loss,
    }
    pairs = list(zip(results, reference, strict=False))  # of the same round; either may have failed in a later one
    if pairs:
        ratios = [one.step_ms / other.step_ms for one, other in pairs]
        figures["time_ratio"], figures["time_ratio_spread"] = median_and_spread(ratios, 4)
        memory = statistics.median(one.peak_bytes / max(other.peak_bytes, 1.0) for one, other in pairs)
        figures["memory_ratio"] = rounded(memory, 4)
    return figures


def print_rows(found: dict[str, Any]) -> None:
    """Print the result of `measure`."""
    headings = ["variant", "batch", "images/s", "lowest-\nhighest", "step\nms", "peak\nMiB"]
    headings += ["time/ref.\n(low-high)", "mem.\n/ref."]
    rows = []
    for row in found["rows"]:
        figures = [number(row["images_per_s"]), interval(row["images_per_s_spread"])]
        figures += [number(row["step_ms"]), number(row["peak_mib"])]
        ratio = "-" if row["time_ratio"] is None else with_spread(row["time_ratio"], row["time_ratio_spread"])
        memory = "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
        rows.append([row["arm"], str(row["batch_size"]), *figures, ratio, memory])
    failed = [f"{row['arm']}, batch {row['batch_size']}: {row['note']}" for row in found["rows"] if row["note"]]
    title = f"{found['model']['variant']} on {found['image_size']}x{found['image_size']}, {found['precision']}"
    print_table(f"{title}; {conditions_line(found)}", headings, rows, [*failed, *found["notes"]])


def measuring_process() -> ProcessPoolExecutor:
    """Return a process to measure in; it starts with its first task, and is idle in between."""
    # Ctrl-C reaches the whole process group: with the default handler this process would print a traceback.
    return ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
    )


def result_of(task: Future[Any]) -> Any:
    """Wait for a task of a measuring process; raise its exception, or `EnvironmentProblem` if the process died."""
    try:
        return task.result()
    except BrokenProcessPool:
        raise EnvironmentProblem("the measuring process was killed, perhaps because memory ran out") from None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[64, 128, 256, 512, 1024, 2048])
    default = ["reference", "compiled", "fused", "graph"]
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=default)
    args = parser.parse_intermixed_args(arguments)
    found = measure(
        load_config(*args.sources),
        variants=args.variants,
        batch_sizes=args.batch_sizes,
        seconds=args.seconds,
        rounds=args.rounds,
    )
    print_rows(found)
    write_json(found, args.out)


if __name__ == "__main__":
    main()

"""``densenet-dist bench model``: how fast a configuration's net trains on this machine, and in how much memory.

The net is run in several variants, each in a process of its own, so that its memory can be told, and waits while
another one is measured; the rounds go through all of them in turn, and the medians count. Images are random and lie on
the device: this is the net's and the optimizer's own speed on one device, without loading and without other workers.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch

from densenet_dist.bench.process import MeasuringProcess, median_and_spread, rounded
from densenet_dist.bench.training_step import Measurement, OutOfMemory, Variant, prepare_variant
from densenet_dist.cluster.resources import local_threads
from densenet_dist.config import to_dict
from densenet_dist.data.cifar import SPECS
from densenet_dist.errors import DenseNetDistError
from densenet_dist.schema import Config
from densenet_dist.train.context import choose_device
from densenet_dist.train.environment import describe_environment
from densenet_dist.train.network import check_run

DEFINITIONS = {
    "arm": "how the net is run",
    "reference": "model.block=reference, as PyTorch runs it",
    "compiled": "the same under torch.compile, compiled anew for every batch size",
    "fused": "model.block=fused",
    "graph": "model.block=fused, the whole step in one CUDA graph",
    "compiled_graph": "compiled, the whole step in one CUDA graph",
    "step_ms": "forward, cross entropy, backward, optimizer, gradients to zero",
    "spreads": "lowest and highest of the rounds",
    "peak_mib": "most memory of a step: on a GPU all of torch's tensors, on a CPU what the step added to the process",
    "time_ratio, memory_ratio": "against reference at the same batch size; of times round by round",
    "loss": "of the first step, the same in all variants but for rounding and dropout",
}


_FIGURES = ("images_per_s", "images_per_s_spread", "step_ms", "step_ms_spread", "peak_mib", "loss")
_RATIOS = ("time_ratio", "time_ratio_spread", "memory_ratio")


def bench_model(
    config: Config,
    *,
    variants: Mapping[str, Variant],
    batch_sizes: Sequence[int],
    seconds: float = 1.0,
    rounds: int = 3,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every variant at every batch size.

    Args:
        config: whose model, precision and optimizer are used, on its ``cluster.device``.
        variants: what to measure, such as some of `VARIANTS`.
        batch_sizes: images a step.
        seconds: how long each measurement takes, about, warm-up not counted.
        rounds: of which the medians count.
        on_progress: told what is being measured.

    Returns:
        ``rows``, with the figures of `DEFINITIONS` or None and a ``note`` that says why; ``notes``, and what they were
        measured on and with.

    Raises:
        ConfigError: the net cannot be built.
        EnvironmentProblem: there is no such device.
    """
    check_run(config)
    device = choose_device(config.cluster.device)
    used, notes = dict(variants), []
    for name, variant in variants.items():
        if variant.cuda_graph and device.type != "cuda":
            notes.append(f"{name} is left out: it needs a GPU")
            del used[name]
    if config.data.name == "folder":
        notes.append(f"the classes of a folder are not looked for: measured with {num_classes(config)}")
    sizes, plain = tuple(dict.fromkeys(batch_sizes)), to_dict(config)
    results: dict[tuple[str, int], list[Measurement]] = {(name, size): [] for name in used for size in sizes}
    failures: dict[tuple[str, int], str] = {}
    processes = {
        name: MeasuringProcess(prepare_variant, variant, plain, num_classes(config), str(device))
        for name, variant in used.items()
    }
    try:
        on_progress("getting ready")
        for process in processes.values():
            with suppress(DenseNetDistError):  # `measure` raises it again
                process.wait()
        for number, size, name in itertools.product(range(1, rounds + 1), sizes, used):
            if (name, size) in failures:
                continue
            on_progress(f"round {number} of {rounds}: {name}, batches of {size}")
            try:
                results[name, size].append(processes[name].measure(size, seconds))
            except OutOfMemory as error:
                failures[name, size] = str(error)
            except DenseNetDistError as error:  # a process in which a kernel failed may be of no more use
                failures.update({(name, other): str(error) for other in sizes})
    finally:
        for process in processes.values():
            process.stop()
    return {
        "rows": [
            {
                "arm": name,
                "batch_size": size,
                "note": failures.get((name, size), ""),
                **dict.fromkeys((*_FIGURES, *_RATIOS)),
                **_figures(size, found, results.get(("reference", size), [])),
                "rounds": [{key: _finite(value) for key, value in asdict(one).items()} for one in found],
            }
            for (name, size), found in results.items()
        ],
        "model": plain["model"],
        "precision": config.train.precision,
        "optimizer": plain["train"]["optimizer"],
        "image_size": config.data.side,
        "classes": num_classes(config),
        "notes": notes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": local_threads(config.cluster),
        "seconds": seconds,
        "rounds": rounds,
        "definitions": DEFINITIONS,
        "environment": describe_environment(),
    }


def num_classes(config: Config) -> int:
    """How many classes the data set has; a folder's are not looked for."""
    return SPECS[config.data.name].num_classes if config.data.name in SPECS else 10


def _figures(batch_size: int, results: Sequence[Measurement], reference: Sequence[Measurement]) -> dict[str, Any]:
    if not results:
        return {}
    step, step_spread = median_and_spread([one.step_ms for one in results])
    fastest, slowest = (batch_size / ms * 1e3 for ms in step_spread)
    figures: dict[str, Any] = {
        "images_per_s": rounded(batch_size / step * 1e3),
        "images_per_s_spread": (rounded(slowest), rounded(fastest)),
        "step_ms": step,
        "step_ms_spread": step_spread,
        "peak_mib": _finite(rounded(statistics.median(one.peak_bytes for one in results) / 2**20)),
        "loss": _finite(results[0].loss),
    }
    pairs = list(zip(results, reference, strict=False))  # of the same round; either may have failed in a later one
    if pairs:
        ratios = [one.step_ms / other.step_ms for one, other in pairs]
        figures["time_ratio"], figures["time_ratio_spread"] = median_and_spread(ratios, 4)
        memory = statistics.median(one.peak_bytes / max(other.peak_bytes, 1.0) for one, other in pairs)
        figures["memory_ratio"] = _finite(rounded(memory, 4))
    return figures


def _finite(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None

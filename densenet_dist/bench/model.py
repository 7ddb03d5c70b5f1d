"""``densenet-dist bench model``: how fast a configuration's net trains on this machine, and in how much memory.

The net is run in several ways ("arms"), each in a process of its own, so that its memory can be told, and waits while
another one is measured; the rounds go through all of them in turn, and the medians count. Images are random and lie on
the device: this is the net's and the optimizer's own speed on one device, without loading and without other workers.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from densenet_dist.bench.arms import Measurement, OutOfMemory, prepare_arm
from densenet_dist.bench.roofline import Roofline, count_flops, prepare_roofline, traffic
from densenet_dist.bench.ways import ARMS, WAYS, configured_for
from densenet_dist.bench.workers import Worker, median_and_spread, rounded
from densenet_dist.cluster.launch import check_model
from densenet_dist.cluster.resources import local_threads
from densenet_dist.config import to_dict
from densenet_dist.data.cifar import SPECS
from densenet_dist.errors import ConfigError, DenseNetDistError
from densenet_dist.schema import Config
from densenet_dist.train.context import choose_device
from densenet_dist.train.environment import describe_environment
from densenet_dist.train.network import AUTOCAST, build_model

BATCH_SIZES = (64, 128, 256, 512, 1024, 2048)

DEFINITIONS = {
    "reference": "model.block=reference, as PyTorch runs it",
    "compiled": "the same under torch.compile, compiled anew for every batch size",
    "fused": "model.block=fused",
    "graph": "model.block=fused, the whole step in one CUDA graph",
    "padded": "the reference form, widths padded to multiples of 8 inside the blocks",
    "compiled_graph": "compiled, the whole step in one CUDA graph",
    "step_ms": "forward, cross entropy, backward, optimizer, gradients to zero; forward_ms has the cross entropy in it",
    "spreads": "lowest and highest of the rounds",
    "tflop_per_s": "FLOPs of the net's definition (2 a multiplication and addition; forward and backward; the same for "
    "all arms) in the time of a step",
    "gb_per_s": "modelled, not counted: the bytes of feature maps that the arm's kernels must at least read and write "
    "(densenet_dist/bench/roofline.py), in the time of a step",
    "share_of_compute, share_of_bandwidth": "of what a large matrix product and a large copy (read and written) "
    "reached in the same run; of a model's bytes it can pass 1 where maps stay in a cache",
    "ceilings": "images a second with nothing but these operations, or bytes, at that speed",
    "peak_mib": "most memory of a step: on a GPU all of torch's tensors, on a CPU what the step added to the process",
    "saved_mib_per_image": "kept by autograd from forward for backward, parameters left out; with mixed precision the "
    "weights' low-precision copies are in it",
    "time_ratio, memory_ratio": "against reference at the same batch size; of times round by round",
    "loss": "of the first step, the same in all arms but for rounding and dropout",
}


@dataclass(frozen=True)
class Row:
    """The medians of one arm at one batch size; None where there is nothing, and a note that says why.

    Attributes:
        arm: one of `WAYS`.
        batch_size: None where the arm does not work at all.
        note: why there are no figures; empty where there are.

    The others are in `DEFINITIONS`.
    """

    arm: str
    batch_size: int | None
    note: str = ""
    images_per_s: float | None = None
    images_per_s_spread: tuple[float, float] | None = None
    step_ms: float | None = None
    step_ms_spread: tuple[float, float] | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    tflop_per_s: float | None = None
    share_of_compute: float | None = None
    gb_per_s: float | None = None
    share_of_bandwidth: float | None = None
    peak_mib: float | None = None
    saved_mib_per_image: float | None = None
    time_ratio: float | None = None
    time_ratio_spread: tuple[float, float] | None = None
    memory_ratio: float | None = None
    loss: float | None = None
    rounds: tuple[dict[str, Any], ...] = ()


def bench_model(
    config: Config,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    arms: Sequence[str] = ARMS,
    seconds: float = 1.0,
    rounds: int = 3,
    listener: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure every arm at every batch size.

    Args:
        config: whose model, precision and optimizer are used, on its ``cluster.device``.
        batch_sizes: images a step.
        arms: of `WAYS`.
        seconds: how long each measurement takes, about, warm-up not counted.
        rounds: of which the medians count.
        listener: told what is being measured.

    Returns:
        ``rows`` (as `Row`, plain), ``notes``, the ``roofline``, and what they were measured on and with.

    Raises:
        ConfigError: the net cannot be built, or there is no such arm.
        EnvironmentProblem: there is no such device.
    """
    if unknown := [name for name in arms if name not in WAYS]:
        raise ConfigError(f"--arms: there is no {unknown[0]!r}; choose from {', '.join(WAYS)}")
    check_model(configured_for(config, "reference"))
    device = choose_device(config.cluster.device)
    notes, names = [], list(dict.fromkeys(arms))
    for name in [name for name in names if WAYS[name].captured and device.type != "cuda"]:
        names.remove(name)
        notes.append(f"{name} is left out: it needs a GPU")
    if config.data.name == "folder":
        notes.append(f"the classes of a folder are not looked for: measured with {classes_of(config)}")
    runners = {name: _Runner(name, config, device) for name in names}
    threads, sizes = local_threads(config.cluster), tuple(dict.fromkeys(batch_sizes))
    roof = Worker(prepare_roofline, str(device), config.train.precision, threads)
    try:
        found = _measure(runners, roof, sizes, seconds, rounds, listener or _ignore)
    finally:
        roof.stop()
        for runner in runners.values():
            runner.stop()
    return _evaluate(config, runners, sizes, found) | {
        "notes": notes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": threads,
        "seconds": seconds,
        "rounds": rounds,
        "definitions": DEFINITIONS,
        "environment": describe_environment(),
    }


def classes_of(config: Config) -> int:
    """How many classes the data set has; a folder's are not looked for."""
    return SPECS[config.data.name].num_classes if config.data.name in SPECS else 10


class _Runner:
    """An arm: its process, what was measured of it, and what failed."""

    def __init__(self, name: str, config: Config, device: torch.device) -> None:
        self._arguments = (name, to_dict(config), classes_of(config), str(device))
        self._worker: Worker[Measurement] | None = None
        self.found: dict[int, list[Measurement]] = {}
        self.failed: dict[int, str] = {}
        self.useless = ""

    def start(self) -> Worker[Measurement]:
        """The process, started if there is none."""
        if self._worker is None:
            self._worker = Worker(prepare_arm, *self._arguments)
        return self._worker

    def wait(self) -> None:
        """Until it is ready; an arm that never is will not be asked."""
        try:
            self.start().wait()
        except DenseNetDistError as error:
            self.useless = str(error)

    def measure(self, batch_size: int, seconds: float) -> None:
        """Once more, unless it failed before."""
        if self.useless or batch_size in self.failed:
            return
        try:
            self.found.setdefault(batch_size, []).append(self.start().ask(batch_size, seconds))
        except OutOfMemory as error:
            self.failed[batch_size] = str(error)
        except DenseNetDistError as error:
            self.failed[batch_size] = str(error)
            self.stop()  # a process in which a kernel failed may be of no more use

    def stop(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.stop()
        self._worker = None


def _measure(
    runners: Mapping[str, _Runner],
    roof: Worker[Roofline],
    batch_sizes: Sequence[int],
    seconds: float,
    rounds: int,
    tell: Callable[[str], None],
) -> Roofline:
    """Go through all rounds; gives the best roofline of all of them."""
    tell("getting ready")
    for runner in runners.values():
        runner.start()
    for runner in runners.values():
        runner.wait()
    rooflines = []
    for number in range(1, rounds + 1):
        rooflines.append(roof.ask(min(seconds, 2.0)))
        for batch_size, (name, runner) in itertools.product(batch_sizes, runners.items()):
            tell(f"round {number} of {rounds}: {name}, batches of {batch_size}")
            runner.measure(batch_size, seconds)
    return Roofline(max(one.gb_per_s for one in rooflines), max(one.tflop_per_s for one in rooflines))


def _evaluate(
    config: Config, runners: Mapping[str, _Runner], batch_sizes: Sequence[int], roofline: Roofline
) -> dict[str, Any]:
    """What was measured against what has to be done and what the device can."""
    with torch.device("meta"):
        reference = build_model(configured_for(config, "reference").model, classes_of(config), config.data.side)
    flops = count_flops(reference)
    width = AUTOCAST[config.train.precision].itemsize
    moved = {name: traffic(reference.architecture, name, width) for name in runners}
    rows = []
    for name, runner in runners.items():
        if runner.useless:
            rows.append(Row(name, None, runner.useless))
            continue
        for size in batch_sizes:
            of_reference = runners["reference"].found.get(size, []) if "reference" in runners else []
            note, found = runner.failed.get(size, ""), runner.found.get(size, [])
            figures = _figures(size, found, of_reference, flops, moved[name], roofline) if found else {}
            rows.append(Row(name, size, note, **figures))
    plain = to_dict(config)
    return {
        "rows": [asdict(row) for row in rows],
        "roofline": asdict(roofline),
        "flops_per_image": flops,
        "bytes_per_image": {name: round(value) for name, value in moved.items()},
        "ceilings": {
            "compute": rounded(roofline.tflop_per_s * 1e12 / flops),
            "bandwidth": {name: rounded(roofline.gb_per_s * 1e9 / value) for name, value in moved.items()},
        },
        "model": plain["model"],
        "precision": config.train.precision,
        "optimizer": plain["train"]["optimizer"],
        "image_size": config.data.side,
        "classes": classes_of(config),
    }


def _figures(
    batch_size: int,
    found: Sequence[Measurement],
    of_reference: Sequence[Measurement],
    flops: float,
    moved: float,
    roofline: Roofline,
) -> dict[str, Any]:
    """A row's figures; `flops` and `moved` bytes are an image's."""
    step, step_spread = median_and_spread([one.step_ms for one in found])
    per_s = batch_size / step * 1e3
    fastest, slowest = (batch_size / ms * 1e3 for ms in step_spread)
    tflop, gb = per_s * flops / 1e12, per_s * moved / 1e9
    peak = statistics.median(one.peak_bytes for one in found)
    figures: dict[str, Any] = {
        "images_per_s": rounded(per_s),
        "images_per_s_spread": (rounded(slowest), rounded(fastest)),
        "step_ms": step,
        "step_ms_spread": step_spread,
        "tflop_per_s": rounded(tflop),
        "share_of_compute": rounded(tflop / roofline.tflop_per_s),
        "gb_per_s": rounded(gb),
        "share_of_bandwidth": rounded(gb / roofline.gb_per_s),
        "peak_mib": _known(rounded(peak / 2**20)),
        "saved_mib_per_image": rounded(found[0].saved_bytes_per_image / 2**20),
        "loss": _known(found[0].loss),
        "rounds": tuple({name: _known(value) for name, value in asdict(one).items()} for one in found),
    }
    for part in ("forward_ms", "backward_ms"):
        times = [time for one in found if (time := getattr(one, part)) is not None]
        figures[part] = rounded(statistics.median(times)) if times else None
    pairs = list(zip(found, of_reference, strict=False))  # of the same round; either may have failed in a later one
    if pairs:
        ratios = [one.step_ms / other.step_ms for one, other in pairs]
        figures["time_ratio"], figures["time_ratio_spread"] = median_and_spread(ratios, 4)
        memory = statistics.median(one.peak_bytes / max(other.peak_bytes, 1.0) for one, other in pairs)
        figures["memory_ratio"] = _known(rounded(memory, 4))
    return figures


def _known(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None


def _ignore(_: str) -> None:
    pass

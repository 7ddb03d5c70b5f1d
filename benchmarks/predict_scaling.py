"""How training scales with workers here, and what a model of the communication predicts of it and of up to 1024 GPUs.

    python benchmarks/predict_scaling.py configs/cifar10_notebook.yaml --workers 1 2 4 --out scaling.json \\
        --plot scaling.png
    python benchmarks/predict_scaling.py configs/cifar10_notebook.yaml --measured scaling.json --gpu-step-ms 12

The first measures as scaling.py does, and besides it when DDP's buckets are filled, and isolated
all-reduces. The latter give latency and bandwidth, with which ``communication.py`` predicts each measured step: its
error. The second takes an earlier outcome of the same configuration instead of measuring.

A GPU's step without communication is --gpu-step-ms for --gpu-images images; or what was measured, on GPUs; or else the
roofline of an H100, which is marked as an estimate. --beside draws earlier outcomes of other nets beside this one.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from communication import FABRICS, Bucket, Fabric, Step, all_reduce_s, fit_ring, predict_on
from measuring import median_and_spread, num_classes, number, parser_of, print_table, rounded, write_json
from roofline import count_flops, net_on_meta, traffic
from scaling import MODES, barrier, longest, measure, print_rows

from densenet_dist.config import load_config
from densenet_dist.data.loader import Batch
from densenet_dist.schema import Config
from densenet_dist.train.autotune import synchronize
from densenet_dist.train.loop import train_step
from densenet_dist.train.network import AUTOCAST, bucket_sizes, no_sync
from densenet_dist.train.trainer import Trainer

GPUS: Final = tuple(2**power for power in range(11))
"""How many GPUs predictions are made for."""
SHOWN_GPUS: Final = (8, 16, 64, 256, 1024)
MESSAGES: Final = tuple(4**power for power in range(6, 13))
"""Bytes of the all-reduces that are timed by themselves: 4 KiB to 16 MiB."""
# Of an H100 SXM (NVIDIA's data sheet): dense tensor-core FLOP/s, and bytes/s of its memory.
H100_FLOPS: Final = {"fp32": 494.7e12, "bf16": 989.4e12, "fp16": 989.4e12}
H100_BYTES_PER_S: Final = 3.35e12


# Measuring, on every rank


def probe_exchange(trainer: Trainer, batches: dict[int, Batch], *, rounds: int) -> dict[str, Any]:
    """What the model needs to know of a trainer; a collective call.

    Returns:
        ``buckets``: bytes of gradients of each of DDP's buckets in turn. ``ready``: when the backward pass has filled
        each, as a share of a step without communication, by images of the global batch. ``all_reduces``: seconds of an
        all-reduce on the slowest rank, by its bytes.
    """
    bf16 = trainer.config.train.gradient_compression == "bf16"
    profiles = {size: [filled_buckets(trainer, batch) for _ in range(rounds)] for size, batch in batches.items()}
    buckets = [size for size, _ in next(iter(profiles.values()))[0]]
    ready = {
        size: np.median([[share for _, share in profile] for profile in found], axis=0).tolist()
        for size, found in profiles.items()
    }
    messages = sorted({*MESSAGES, *(size // 2 if bf16 else size for size in buckets)})
    all_reduces: dict[int, list[float]] = {message: [] for message in messages if trainer.context.world_size > 1}
    for _, (message, times) in product(range(rounds), all_reduces.items()):
        times.append(time_all_reduce(message, torch.bfloat16 if bf16 else torch.float32, trainer.context.device))
    return {"buckets": buckets, "ready": ready, "all_reduces": all_reduces}


def filled_buckets(trainer: Trainer, batch: Batch) -> list[tuple[int, float]]:
    """Bytes of each bucket, and when it is filled in a step without communication, as a share of the step."""
    device = trainer.context.device
    marks: list[tuple[int, Any]] = []
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: marks.append((parameter.nbytes, now(device))))
        for parameter in trained
    ]
    try:
        with no_sync(trainer.train_model):
            barrier(device)
            started = now(device)
            train_step(trainer, batch)
            ended = now(device)
            synchronize(device)
    finally:
        for hook in hooks:
            hook.remove()
    marks = marks[-len(trained) :]  # of the last part, where a step has several
    filled = fill_buckets([size for size, _ in marks], bucket_sizes(trainer.model, trainer.config.train))
    step_s = seconds_between(started, ended)
    return [
        (sum(marks[index][0] for index in bucket), seconds_between(started, marks[bucket[-1]][1]) / step_s)
        for bucket in filled
    ]


def fill_buckets(gradients: Sequence[int], limits: Sequence[int]) -> list[list[int]]:
    """Which gradients share a bucket, by DDP's rule: one is closed as soon as it holds its limit.

    Args:
        gradients: bytes of each, in the order in which they come.
        limits: of the buckets in turn; the last one holds for all that follow.

    Returns:
        The gradients' places in `gradients`, bucket by bucket.
    """
    buckets: list[list[int]] = []
    bounds = itertools.chain(limits, itertools.repeat(limits[-1]))
    held, limit = 0, next(bounds)
    opened: list[int] = []
    for place, size in enumerate(gradients):
        opened.append(place)
        held += size
        if held >= limit:
            buckets.append(opened)
            opened, held, limit = [], 0, next(bounds)
    return [*buckets, opened] if opened else buckets


def now(device: torch.device) -> Any:
    """A mark on the device's own clock: on a GPU an event in its queue, which nothing waits for."""
    if device.type != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(before: Any, after: Any) -> float:
    return after - before if isinstance(before, float) else float(before.elapsed_time(after)) / 1e3


def time_all_reduce(message: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of an all-reduce of so many bytes, on the slowest rank; the median of five after the first one."""
    tensor = torch.zeros(max(1, message // dtype.itemsize), dtype=dtype, device=device)
    times = []
    for _ in range(6):
        barrier(device)
        started = perf_counter()
        dist.all_reduce(tensor)
        synchronize(device)
        times.append(perf_counter() - started)
    return longest(statistics.median(times[1:]), device)


# Predicting


@dataclass(frozen=True)
class GpuStep:
    """What predictions for GPUs start from.

    Attributes:
        images: of one GPU.
        step_ms: of a step without communication.
        source: how that is known.
    """

    images: int
    step_ms: float
    source: str


def take_up_probes(outcome: dict[str, Any]) -> None:
    """Put what `probe_exchange` returned, by number of workers, where an outcome has it."""
    probed = outcome.pop("probed")
    outcome["buckets"] = probed[1]["buckets"]
    outcome["ready"] = {
        str(count): {str(n): ready for n, ready in probe["ready"].items()} for count, probe in probed.items()
    }
    outcome["fits"] = {}
    for count, probe in probed.items():
        rows = []
        for message, times in probe["all_reduces"].items():
            ms, spread = median_and_spread([1e3 * seconds for seconds in times])
            rows.append({"bytes": message, "ms": ms, "ms_spread": spread})
        if rows:
            outcome["fits"][str(count)] = {"all_reduces": rows}


def predict_measured(outcome: dict[str, Any]) -> None:
    """Fit each number of workers' all-reduces, and predict the steps that were measured: what the model is worth."""
    fabrics = {}
    for count, fit in outcome["fits"].items():
        samples = [(row["bytes"], row["ms"] / 1e3) for row in fit["all_reduces"]]
        fabric = fabrics[count] = fit_ring(samples, int(count), outcome["backend"])
        fit["latency_us"] = rounded(fabric.inside.ring_latency_s * 1e6)
        fit["gb_per_s"] = rounded(fabric.inside.bytes_per_s / 1e9) if np.isfinite(fabric.inside.bytes_per_s) else None
        for row in fit["all_reduces"]:
            row["fitted_ms"] = rounded(all_reduce_s(row["bytes"], int(count), fabric) * 1e3)
    for row in outcome["rows"]:
        predicted_ms, count = row["local_ms"], row["workers"]  # synchronized batch normalization is in it already
        if count > 1:
            step = step_of(outcome, count, row["images"], row["local_ms"] / 1e3)
            predicted_ms = 1e3 * predict_on(step, count, fabrics[str(count)]).step_s
        row["predicted_ms"] = rounded(predicted_ms)
        row["predicted_error"] = rounded(predicted_ms / row["step_ms"] - 1, 4)


def step_of(
    outcome: dict[str, Any], workers: int, images: int, compute_s: float, blocking: tuple[float, ...] = ()
) -> Step:
    """A step of so many seconds whose buckets are filled at the shares that were measured."""
    sent = 0.5 if outcome["gradient_compression"] == "bf16" else 1.0
    shares = outcome["ready"][str(workers)][str(images)]
    buckets = zip(outcome["buckets"], shares, strict=True)
    return Step(compute_s, tuple(Bucket(size * sent, share) for size, share in buckets), blocking)


def predict_gpus(outcome: dict[str, Any], config: Config, gpu: GpuStep) -> None:
    """Weak scaling of what one GPU does, and strong scaling of the same batch, on every fabric."""
    step = step_of(outcome, 1, outcome["images"], gpu.step_ms / 1e3, sync_bn_messages(config))
    rows = []
    for fabric, count in product(FABRICS, GPUS):
        rows.append(predicted_row("weak", count, fabric, step, gpu))
        if count <= gpu.images:
            # Taken as proportional to images: a GPU with few of them is less efficient, which is left out.
            shared = Step(step.compute_s / count, step.buckets, step.blocking)
            rows.append(predicted_row("strong", count, fabric, shared, gpu))
    outcome["gpu"] = asdict(gpu)
    outcome["message_bytes"] = sum(bucket.message for bucket in step.buckets)
    outcome["predictions"] = rows


def predicted_row(mode: str, gpus: int, fabric: Fabric, step: Step, gpu: GpuStep) -> dict[str, Any]:
    predicted, weak = predict_on(step, gpus, fabric), mode == "weak"
    return {
        "fabric": fabric.name,
        "mode": mode,
        "gpus": gpus,
        "step_ms": rounded(predicted.step_s * 1e3),
        "exposed_ms": rounded(predicted.exposed_s * 1e3),
        "communication_ms": rounded(predicted.communication_s * 1e3),
        "step_ms_without_overlap": rounded(predict_on(step, gpus, fabric, overlap=False).step_s * 1e3),
        "images_per_s": rounded(gpu.images * (gpus if weak else 1) / predicted.step_s),
        "efficiency": rounded(gpu.step_ms / ((1 if weak else gpus) * predicted.step_s * 1e3), 4),
    }


def sync_bn_messages(config: Config) -> tuple[float, ...]:
    """Bytes of the all-reduces of synchronized batch normalization, as torch sends them.

    Forward mean, inverse deviation and count of each channel, backward two sums of its gradient; float32.
    """
    if not config.train.sync_bn:
        return ()
    net = net_of(config)
    widths = [module.num_features for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    return tuple(4.0 * numbers for width in widths for numbers in (2 * width + 1, 2 * width))


def gpu_step_of(outcome: dict[str, Any], config: Config, images: int | None, step_ms: float | None) -> GpuStep:
    """What is given, or was measured, or is estimated, in this order."""
    size = images or outcome["images"]
    if step_ms is not None:
        return GpuStep(size, step_ms, "as given")
    if outcome["device"] != "CPU" and size == outcome["images"]:
        return GpuStep(size, outcome["rows"][0]["local_ms"], f"measured here on one {outcome['device']}")
    net, precision = net_of(config), outcome["precision"]
    arithmetic = count_flops(net) / H100_FLOPS[precision]
    memory = traffic(net.architecture, "fused", AUTOCAST[precision].itemsize) / H100_BYTES_PER_S
    return GpuStep(
        size,
        rounded(size * max(arithmetic, memory) * 1e3),
        "estimate, not measured: the roofline of an H100 SXM, less than a step takes, so communication weighs too much",
    )


def net_of(config: Config) -> Any:
    return net_on_meta(
        {"model": config.model.network, "classes": num_classes(config), "image_size": config.data.resolved_image_size}
    )


# Showing


def print_predictions(outcome: dict[str, Any]) -> None:
    gpu = outcome["gpu"]
    for count, fit in outcome["fits"].items():
        speed = "no limit found" if fit["gb_per_s"] is None else f"{fit['gb_per_s']:.3g} GB/s"
        print(f"all-reduce of {count} {outcome['backend']} workers: {fit['latency_us']:.3g} us a hop, {speed}")
    print_table(
        f"\n{outcome['message_bytes'] / 2**20:.3g} MiB of gradients in {len(outcome['buckets'])} buckets; measured "
        "steps as predicted from these",
        ["mode", "workers", "step ms", "predicted ms", "error"],
        [
            [
                row["mode"],
                str(row["workers"]),
                number(row["step_ms"]),
                number(row["predicted_ms"]),
                f"{row['predicted_error']:+.1%}",
            ]
            for row in outcome["rows"]
        ],
    )
    efficiency = {(row["fabric"], row["mode"], row["gpus"]): row["efficiency"] for row in outcome["predictions"]}
    shown = {
        (fabric.name, mode): [efficiency.get((fabric.name, mode, count)) for count in SHOWN_GPUS]
        for fabric, mode in product(FABRICS, MODES)
    }
    print_table(
        f"\nefficiency of GPUs that take {gpu['step_ms']:.3g} ms for {gpu['images']} images ({gpu['source']})",
        ["connection", "mode", *(f"{count} GPUs" for count in SHOWN_GPUS)],
        [[*key, *("-" if value is None else f"{value:.1%}" for value in values)] for key, values in shown.items()],
    )


def draw(outcomes: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw efficiency and speed against the number of GPUs, a column for each net; what was measured on it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    columns = len(outcomes)
    figure = Figure(figsize=(max(9.5, 5 * columns), 8.4), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False, sharex=True)
    for (efficiency, speed), outcome in zip(axes.T, outcomes, strict=True):
        draw_predicted(efficiency, speed, outcome)
        draw_measured(efficiency, speed, outcome)
        gpu = outcome["gpu"]
        source = "estimated" if gpu["source"].startswith("estimate") else gpu["source"]
        highest = max(row["efficiency_spread"][1] for row in outcome["rows"])
        efficiency.set(
            title=f"{outcome['name']}, {outcome['message_bytes'] / 2**20:.3g} MiB of gradients\n"
            f"a GPU: {gpu['images']} images in {gpu['step_ms']:.3g} ms ({source})",
            ylim=(0, max(1.0, highest) + 0.08),
        )
        efficiency.axhline(1, color="gray", linewidth=0.8)
        speed.set(yscale="log", xlabel="GPUs, or measured workers (open: more than cores)")
        for one in (efficiency, speed):
            one.set_xscale("log", base=2)
            one.set_xticks(GPUS[::2], [str(count) for count in GPUS[::2]])
            one.xaxis.set_minor_locator(NullLocator())
            one.grid(alpha=0.3)
    axes[0, 0].set_ylabel("efficiency")
    axes[1, 0].set_ylabel("images/s")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 if columns < 3 else 4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def draw_predicted(efficiency: Any, speed: Any, outcome: dict[str, Any]) -> None:
    # The first is the widest, so that it shows beneath the others.
    looks = zip(FABRICS, ("tab:green", "tab:blue", "tab:orange"), (4, 2, 1.5), strict=True)
    for (fabric, color, width), (mode, style) in product(looks, (("weak", "-"), ("strong", ":"))):
        rows = [row for row in outcome["predictions"] if (row["fabric"], row["mode"]) == (fabric.name, mode)]
        gpus, look = [row["gpus"] for row in rows], {"color": color, "linestyle": style, "linewidth": width}
        efficiency.plot(gpus, [row["efficiency"] for row in rows], **look, label=f"{fabric.name}, {mode} (predicted)")
        speed.plot(gpus, [row["images_per_s"] for row in rows], **look)


def draw_measured(efficiency: Any, speed: Any, outcome: dict[str, Any]) -> None:
    """Points with bars from the lowest to the highest round; lines from what the model says of them."""
    for mode, marker, aside, style in (("weak", "o", 0.96, "--"), ("strong", "s", 1.04, "-.")):
        rows = [row for row in outcome["rows"] if row["mode"] == mode]
        if not rows:
            continue
        label = f"{outcome['backend']}, {mode}"
        predicted = [row["efficiency"] / (1 + row["predicted_error"]) for row in rows]  # T(1) is the measured one
        places = [aside * row["workers"] for row in rows]
        efficiency.plot(places, predicted, style, color="black", linewidth=1, label=f"{label} (predicted)")
        for place, row in zip(places, rows, strict=True):
            face = "white" if row["oversubscribed"] else "black"
            look = {"marker": marker, "color": "black", "linestyle": "none", "markerfacecolor": face}
            low, high = row["efficiency_spread"]
            bars = ([max(0.0, row["efficiency"] - low)], [max(0.0, high - row["efficiency"])])
            only_once = f"{label} (measured)" if row is rows[0] else None
            efficiency.errorbar(place, row["efficiency"], bars, **look, capsize=3, label=only_once)
            speed.plot(place, row["images_per_s"], **look)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--measured", type=Path, help="an earlier outcome of this script, instead of measuring")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--gpu-images", type=int, help="a step of one GPU; else the configured batch")
    parser.add_argument("--gpu-step-ms", type=float)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--beside", type=Path, action="append", default=[], help="an earlier outcome, to draw as well")
    args = parser.parse_intermixed_args(arguments)
    config = load_config(*args.sources)
    if args.measured:
        outcome = json.loads(args.measured.read_text())
    else:
        outcome = measure(
            config,
            workers=args.workers,
            modes=args.modes,
            seconds=args.seconds,
            rounds=args.rounds,
            probe=partial(probe_exchange, rounds=args.rounds),
        )
        take_up_probes(outcome)
    predict_measured(outcome)
    predict_gpus(outcome, config, gpu_step_of(outcome, config, args.gpu_images, args.gpu_step_ms))
    print_rows(outcome)
    print_predictions(outcome)
    write_json(outcome, args.out)
    if args.plot:
        draw([*(json.loads(path.read_text()) for path in args.beside), outcome], args.plot)


if __name__ == "__main__":
    main()

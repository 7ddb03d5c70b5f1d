"""How many augmented CIFAR-10 images a second, and a CPU-second, this project's loaders and public pipelines make.

    .venv/bin/pip install -r benchmarks/requirements-input-peers.txt
    python benchmarks/input_peers.py --data data --rounds 3 --out benchmarks/results/input_peers.json

All make batches of float32 images, rotated, shifted, zoomed and flipped as in the notebook, in random order:

    keras               ImageDataGenerator.flow in the process itself, the notebook's own pipeline; NHWC in [0, 1]
    torchvision_pil     v2.RandomAffine on PIL images, a DataLoader with two persistent workers; NCHW in [0, 1]
    torchvision_tensor  the same on uint8 tensors
    project_torch       this project's loader with torch ops; channels_last, normalized by mean and deviation
    project_dali        the same with DALI on the CPU

torchvision's pictures are not quite the notebook's: it zooms both axes alike and fills with black what lies outside.

Each pipeline runs in a process of its own, one after the other, in as many rounds as asked; every process, workers too,
has one OpenMP and one torch thread, and none sees a GPU. What is measured begins after a warm-up, so that neither
imports nor the start of workers count, and is a whole number of epochs, so that what an epoch costs at its start counts
in full: at least one, and as many as fill --seconds. CPU-seconds are the user and system time of the process with all
its threads and of all its workers. Memory is the sum over these processes of the peak resident size while measured,
which counts pages that they share once each; PSS, at the end, divides those. The consumer only counts images: in a
training its CPU is missing to the loader, and images a CPU-second say what that costs.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from densenet_dist.environment import describe_environment, package_version

REQUIREMENTS = Path(__file__).with_name("requirements-input-peers.txt")
PEER_PACKAGES = {"keras": "keras", "pillow": "PIL", "psutil": "psutil", "scipy": "scipy"}  # and their modules
EPOCH = 50_000  # images
ONE_THREAD = {
    **{f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")},
    "CUDA_VISIBLE_DEVICES": "",
    "KERAS_BACKEND": "torch",  # the generator itself is NumPy and SciPy; Keras' default would want TensorFlow
}


def keras_batches(folder: str, batch_size: int) -> Iterator[Any]:
    # Keras 3 keeps it for old programs, without a public name of its own.
    from keras.src.legacy.preprocessing.image import ImageDataGenerator

    split = cifar10(folder).train
    generator = ImageDataGenerator(
        rotation_range=20,
        width_shift_range=0.125,
        height_shift_range=0.125,
        zoom_range=0.10,
        horizontal_flip=True,
        fill_mode="nearest",
        rescale=1 / 255,
    )
    for images, _ in generator.flow(split.images, split.labels, batch_size=batch_size):
        yield images


class Samples:
    """A map-style data set, as `DataLoader` wants it."""

    def __init__(self, images: Any, labels: list[int], transform: Callable[[Any], Any]) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.labels[index]


def torchvision_batches(form: str, folder: str, batch_size: int) -> Iterator[Any]:
    import torch
    from PIL import Image
    from torchvision.transforms import v2

    split = cifar10(folder).train
    warp = [
        v2.RandomAffine(
            degrees=20, translate=(0.125, 0.125), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR
        ),
        v2.RandomHorizontalFlip(),
    ]
    to_float = v2.ToDtype(torch.float32, scale=True)
    images: Any
    if form == "pil":  # as torchvision.datasets.CIFAR10 does
        images = split.images
        transform = v2.Compose([Image.fromarray, *warp, v2.PILToTensor(), to_float])
    else:
        images = torch.from_numpy(split.images).permute(0, 3, 1, 2).contiguous()
        transform = v2.Compose([*warp, to_float])
    samples: Any = Samples(images, split.labels.tolist(), transform)
    loader: Any = torch.utils.data.DataLoader(
        samples, batch_size=batch_size, shuffle=True, num_workers=2, persistent_workers=True
    )
    while True:
        for batch, _ in loader:
            yield batch


def project_batches(kind: str, folder: str, batch_size: int) -> Iterator[Any]:
    """This project's training loader as one rank on the CPU; nothing else here knows its interface."""
    from densenet_dist.data.augment import Augmentation
    from densenet_dist.data.engine import engine_class
    from densenet_dist.data.loader import TrainLoader

    data = cifar10(folder)
    loader = TrainLoader(
        engine_class(kind)(data.train, mean=data.mean, std=data.std),
        np.arange(len(data.train.labels)),
        global_batch_size=batch_size,
        augmentation=Augmentation("notebook"),
    )
    for epoch in itertools.count():
        for batch in loader.epoch(epoch):
            yield batch.images


def cifar10(folder: str) -> Any:
    from densenet_dist.data.datasets import load_dataset

    return load_dataset("cifar10", folder, download=False)


PIPELINES: dict[str, Callable[[str, int], Iterator[Any]]] = {
    "keras": keras_batches,
    "torchvision_pil": partial(torchvision_batches, "pil"),
    "torchvision_tensor": partial(torchvision_batches, "tensor"),
    "project_torch": partial(project_batches, "torch"),
    "project_dali": partial(project_batches, "dali"),
}


def measure(name: str, folder: str, batch_size: int, seconds: float, warmup: float) -> dict[str, float]:
    """One pipeline in this process, after its warm-up."""
    import psutil
    import torch

    torch.set_num_threads(1)
    batches = PIPELINES[name](folder, batch_size)
    first = next(batches)
    if not str(first.dtype).endswith("float32") or sorted(first.shape) != sorted((batch_size, 3, 32, 32)):
        raise RuntimeError(f"{name} makes batches of {first.dtype} {tuple(first.shape)}")
    consume(batches, warmup, multiple_of=1)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    for process in processes:
        with contextlib.suppress(OSError):  # a kernel may be built without it: then the peak is that since the start
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    before = cpu_seconds(processes)
    images, wall = consume(batches, seconds, multiple_of=EPOCH)
    cpu = cpu_seconds(processes) - before
    if set(processes[1:]) != set(psutil.Process().children(recursive=True)):
        raise RuntimeError(f"{name} started or ended processes while it was measured: their CPU time is not known")
    return {
        "images": images,
        "wall_s": wall,
        "cpu_s": cpu,
        "images_per_s": images / wall,
        "images_per_cpu_s": images / cpu,
        "processes": len(processes),
        "peak_rss_mib": sum(peak_rss_kib(process.pid) for process in processes) / 2**10,
        "pss_mib": sum(process.memory_full_info().pss for process in processes) / 2**20,
    }


def consume(batches: Iterator[Any], seconds: float, multiple_of: int) -> tuple[int, float]:
    """Takes batches for `seconds`, and on to the next multiple of so many images; how many images, in how long."""
    images, started = 0, time.perf_counter()
    while True:
        images += len(next(batches))
        elapsed = time.perf_counter() - started
        if elapsed >= seconds and images % multiple_of == 0:
            return images, elapsed


def cpu_seconds(processes: Sequence[Any]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def peak_rss_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def measure_apart(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, f"--only={name}", f"--data={arguments.data}", f"--warmup={arguments.warmup}",
               f"--seconds={arguments.seconds}", f"--batch-size={arguments.batch_size}"]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}; what it said is above")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarize(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Median, least and greatest of each figure, and of the ratio to the project's best in the same round."""
    summary = {name: {key: spread([one[name][key] for one in rounds]) for key in rounds[0][name]} for name in rounds[0]}
    ours = [name for name in summary if name.startswith("project_")]
    if ours:
        best = max(ours, key=lambda name: summary[name]["images_per_cpu_s"]["median"])
        for name, figures in summary.items():
            ratios = [one[best]["images_per_cpu_s"] / one[name]["images_per_cpu_s"] for one in rounds]
            figures["project_best_over_this"] = spread(ratios)
    return summary


def print_table(summary: dict[str, dict[str, dict[str, float]]]) -> None:
    print("\nmedian (least to greatest)\n")
    print("| pipeline | images/s | images/CPU-s | project's best / this, per CPU-s | peak RSS MiB | PSS MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, figures in summary.items():
        cells = [
            "{median:,.{digits}f} ({min:,.{digits}f} to {max:,.{digits}f})".format(**figures[key], digits=digits)
            if key in figures
            else "-"
            for key, digits in (("images_per_s", 0), ("images_per_cpu_s", 0), ("project_best_over_this", 2))
        ]
        memory = [f"{figures[key]['median']:,.0f}" for key in ("peak_rss_mib", "pss_mib")]
        print("| " + " | ".join([name, *cells, *memory]) + " |")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="the folder that holds cifar-10-batches-bin (default: data)")
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=list(PIPELINES), help="default: all")
    parser.add_argument("--only", choices=PIPELINES, help="measure this one in this very process and print JSON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0, help="measured at least, then to the end of an epoch")
    parser.add_argument("--warmup", type=float, default=2.0, help="seconds after the first batch")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    missing = [name for name, module in PEER_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}; pip install -r {os.path.relpath(REQUIREMENTS)} brings them")
    os.environ.update(ONE_THREAD)  # before anything that reads it is imported; the processes started inherit it
    if arguments.only:
        options = (arguments.data, arguments.batch_size, arguments.seconds, arguments.warmup)
        print(json.dumps(measure(arguments.only, *options)))
        return
    rounds = []
    for _ in range(arguments.rounds):
        rounds.append({name: measure_apart(name, arguments) for name in arguments.pipelines})
        print(json.dumps(rounds[-1]), flush=True)
    summary = summarize(rounds)
    print_table(summary)
    if arguments.out:
        environment = describe_environment()
        environment["packages"].update({name: package_version(name) for name in PEER_PACKAGES})
        settings = {key: getattr(arguments, key) for key in ("batch_size", "seconds", "warmup")}
        result = {"settings": settings, "summary": summary, "rounds": rounds, "environment": environment}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

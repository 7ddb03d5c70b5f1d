"""``densenet-dist bench``: measure this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from densenet_dist.cli.options import Debug, Sources, load, local_path, require_writable, status, write_json
from densenet_dist.errors import ConfigError

if TYPE_CHECKING:
    from densenet_dist.schema import Config

BatchSizes = Annotated[str, typer.Option("--batch-sizes", help="Comma-separated numbers of images per batch.")]
Seconds = Annotated[float, typer.Option(min=0.05, help="Duration of each measurement.")]
Rounds = Annotated[int, typer.Option(min=1, help="Number of measurements; medians are reported.")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", parser=local_path, help="Also write the results to this file."),
]

bench_app = typer.Typer(
    help="Measure the speed of a model, the data loaders, or scaling on this machine.", no_args_is_help=True
)


def _load(sources: list[str] | None) -> Config:
    from densenet_dist.custom import PARTS, names_in

    config = load(sources)
    if found := next(names_in(config), None):
        raise ConfigError(f"{PARTS[found[0]].key}: bench measures the parts of this package only, not {found[1]}")
    return config


@bench_app.command("data")
def bench_data(
    sources: Sources = None,
    batch_sizes: BatchSizes = "64,128,256,512,1024",
    seconds: Seconds = 1.0,
    rounds: Rounds = 3,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Measure the throughput of each data loader: images per second and per CPU-second.

    densenet-dist bench data configs/cifar10_notebook.yaml --out loaders.json
    """
    with status("loading PyTorch"):
        from densenet_dist.bench.data import bench_data as measure
        from densenet_dist.bench.data import print_data

    config, sizes = _load(sources), parse_numbers("--batch-sizes", batch_sizes)
    require_writable(out)
    with status("measuring"):
        outcome = measure(config, batch_sizes=sizes, seconds=seconds, rounds=rounds)
    print_data(outcome)
    write_json(outcome, out)


@bench_app.command("model")
def bench_model(
    sources: Sources = None,
    batch_sizes: BatchSizes = "64,128,256,512,1024,2048",
    variants: Annotated[
        str,
        typer.Option(help="Comma-separated; also padded, compiled_graph, padded_compiled_graph."),
    ] = "reference,compiled,fused,graph",
    seconds: Seconds = 1.0,
    rounds: Rounds = 3,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Measure the training speed and the memory of a model.

    Images are random and already on the device. For deep models, compiling takes minutes per batch size.

    densenet-dist bench model configs/cifar10_notebook.yaml --out model.json
    """
    with status("loading PyTorch"):
        from densenet_dist.bench.model import bench_model as measure
        from densenet_dist.bench.model import print_model
        from densenet_dist.bench.training_step import VARIANTS

    config, sizes = _load(sources), parse_numbers("--batch-sizes", batch_sizes)
    names = [name.strip() for name in variants.split(",")]
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"--variants: there is no {name!r}; choose from {', '.join(VARIANTS)}")
    chosen = {name: VARIANTS[name] for name in names}
    require_writable(out)
    with status("preparing") as shown:
        outcome = measure(
            config, variants=chosen, batch_sizes=sizes, seconds=seconds, rounds=rounds, on_progress=shown.update
        )
    print_model(outcome)
    write_json(outcome, out)


@bench_app.command("scaling")
def bench_scaling(
    sources: Sources = None,
    workers: Annotated[str, typer.Option(help="Comma-separated numbers of workers; 1 is always measured.")] = "1,2",
    mode: Annotated[
        Literal["weak", "strong", "both"],
        typer.Option(help="weak: the batch size is per worker; strong: the batch is split."),
    ] = "both",
    seconds: Seconds = 1.0,
    rounds: Rounds = 3,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Measure the speedup of training with the number of Ray Train workers (docs/scaling.md).

    Images are random and already in memory.

    densenet-dist bench scaling configs/cifar10_notebook.yaml --workers 1,2 --out scaling.json
    """
    with status("loading PyTorch"):
        from densenet_dist.bench.scaling import MODES, print_scaling
        from densenet_dist.bench.scaling import bench_scaling as measure

    config, counts = _load(sources), parse_numbers("--workers", workers)
    modes = MODES if mode == "both" else (mode,)
    require_writable(out)
    with status("preparing") as shown:
        outcome = measure(config, workers=counts, modes=modes, seconds=seconds, rounds=rounds, on_progress=shown.update)
    print_scaling(outcome)
    write_json(outcome, out)


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Parse comma-separated numbers from 1 to a million."""
    for number in text.split(","):
        if not number.strip().isdecimal() or not 1 <= int(number) <= 10**6:
            raise ConfigError(f"{option}: {number!r} is not a number from 1 to 1,000,000; write them as 1,2,4")
    return tuple(map(int, text.split(",")))

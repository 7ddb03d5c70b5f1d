"""``densenet-dist bench``: measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from densenet_dist.cli.options import (
    BatchSizes,
    Debug,
    Out,
    Rounds,
    Seconds,
    Sources,
    load,
    parse_batch_sizes,
    require_writable,
    write_json,
)
from densenet_dist.errors import ConfigError

bench_app = typer.Typer(
    help="Measure this machine: a model, the data loaders, how training scales.", no_args_is_help=True
)


@bench_app.command("data")
def bench_data(
    sources: Sources = None,
    batch_sizes: BatchSizes = "64,128,256,512,1024",
    seconds: Seconds = 1.0,
    rounds: Rounds = 3,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Measure how fast each loader makes a configuration's batches: images a second and a CPU-second, and memory.

    densenet-dist bench data configs/cifar10_notebook.yaml --out loaders.json
    """
    from densenet_dist.bench.data import bench_data as measure
    from densenet_dist.bench.data import print_table

    config = load(sources)
    sizes = parse_batch_sizes(batch_sizes)
    require_writable(out)
    found = measure(config, batch_sizes=sizes, seconds=seconds, rounds=rounds)
    print_table(found)
    write_json(found, out)


@bench_app.command("model")
def bench_model(
    sources: Sources = None,
    batch_sizes: BatchSizes = "64,128,256,512,1024,2048",
    arms: Annotated[
        str,
        typer.Option(help="Ways to run the net, separated by commas; also padded and compiled_graph."),
    ] = "reference,compiled,fused,graph",
    seconds: Seconds = 1.0,
    rounds: Rounds = 3,
    out: Out = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw speed and memory there too.")] = None,
    debug: Debug = False,
) -> None:
    """Measure how fast a configuration's net trains, and in how much memory, beside what this machine could do at most.

    Images are random and lie on the device. Compiling takes minutes for each batch size of a deep net.

    densenet-dist bench model configs/cifar10_notebook.yaml --out model.json --plot model.png
    """
    from rich.console import Console

    from densenet_dist.bench.model import bench_model as measure
    from densenet_dist.bench.model_report import draw, print_table

    config = load(sources)
    sizes, names = parse_batch_sizes(batch_sizes), tuple(name.strip() for name in arms.split(","))
    require_picture(plot)
    for path in (out, plot):
        require_writable(path)
    with Console(stderr=True).status("") as status:  # on a terminal only
        found = measure(config, batch_sizes=sizes, arms=names, seconds=seconds, rounds=rounds, listener=status.update)
    print_table(found)
    write_json(found, out)
    if plot is not None:
        draw(found, plot)


@bench_app.command("scaling")
def bench_scaling(
    sources: Sources = None,
    workers: Annotated[str, typer.Option(help="How many, separated by commas; 1 is measured always.")] = "1,2",
    mode: Annotated[
        str, typer.Option(help="weak: the batch is that of each worker; strong: that of all together; or both.")
    ] = "both",
    seconds: Seconds = 1.0,
    rounds: Rounds = 3,
    gpu_images: Annotated[
        int | None, typer.Option(min=1, help="Images a step of one GPU in predictions; else the configured batch.")
    ] = None,
    gpu_step_ms: Annotated[
        float | None, typer.Option(min=1e-6, help="Its time for them; else as measured on GPUs, or an estimate.")
    ] = None,
    out: Out = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw efficiency and speed there too.")] = None,
    beside: Annotated[
        list[Path] | None, typer.Option(metavar="FILE.json", help="Earlier outcomes, to draw beside this one.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure how training speeds up with Ray Train workers, and predict it for up to 1024 GPUs (docs/scaling.md).

    The step is that of training, on random images that lie ready.

    densenet-dist bench scaling configs/cifar10_notebook.yaml --out scaling.json --plot scaling.png
    """
    from rich.console import Console

    from densenet_dist.bench.scaling import MODES
    from densenet_dist.bench.scaling import bench_scaling as measure
    from densenet_dist.bench.scaling_report import draw, print_table

    config, counts = load(sources), parse_numbers("--workers", workers)
    require_picture(plot)
    for path in (out, plot):
        require_writable(path)
    others = [read_outcome("--beside", path, "predictions") for path in beside or []]
    with Console(stderr=True).status("") as status:  # on a terminal only
        found = measure(
            config,
            workers=counts,
            modes=MODES if mode == "both" else (mode,),
            seconds=seconds,
            rounds=rounds,
            gpu_images=gpu_images,
            gpu_step_ms=gpu_step_ms,
            listener=status.update,
        )
    print_table(found)
    write_json(found, out)
    if plot is not None:
        draw([*others, found], plot)


@bench_app.command("time-to-accuracy")
def bench_time_to_accuracy(
    sources: Sources = None,
    targets: Annotated[str, typer.Option(help="Test top-1 to reach, in percent, separated by commas.")] = "92.66,94",
    seeds: Annotated[int, typer.Option(min=1, help="How many, from the configured one on.")] = 5,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Begin no seed that would not end within so many minutes.")
    ] = None,
    out: Out = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw accuracy over seconds there too.")] = None,
    debug: Debug = False,
) -> None:
    """Measure the seconds of training to a test accuracy, over several seeds, on one device.

    Written to FILE.json after every seed; the same command again trains those that are missing there.

    densenet-dist bench time-to-accuracy configs/cifar10_fast.yaml --out fast.json --plot fast.png
    """
    from rich.console import Console

    from densenet_dist.bench.accuracy_report import draw, print_table
    from densenet_dist.bench.time_to_accuracy import time_to_accuracy

    config, shares = load(sources), parse_percents("--targets", targets)
    require_picture(plot)
    for path in (out, plot):
        require_writable(path)
    before = read_outcome("--out", out, "runs") if out is not None and out.exists() else None
    with Console(stderr=True).status("") as status:  # on a terminal only

        def show(found: dict[str, Any], epoch: dict[str, Any] | None) -> None:
            if epoch is None:
                write_json(found, out)
            else:
                status.update(f"seed {epoch['seed']}, epoch {epoch['epoch']}: {epoch['test/top1']:.2%}")

        limit_s = None if minutes is None else 60 * minutes
        found = time_to_accuracy(config, targets=shares, seeds=seeds, before=before, limit_s=limit_s, listener=show)
    print_table(found)
    if len(found["runs"]) < seeds:
        typer.echo(f"{len(found['runs'])} of {seeds} seeds; the same command goes on with the others")
    write_json(found, out)
    if plot is not None and found["runs"]:
        draw(found, plot)


def require_picture(path: Path | None) -> None:
    """Say so before the work where a picture's ending names no format."""
    if path is not None and path.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--plot: {path} must end in .png, .pdf or .svg")


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Numbers above zero, as an option lists them."""
    for number in text.split(","):
        if not number.strip().isdecimal() or int(number) == 0:
            raise ConfigError(f"{option}: {number!r} is no number above zero; write them as 1,2,4")
    return tuple(map(int, text.split(",")))


def parse_percents(option: str, text: str) -> tuple[float, ...]:
    """Shares of 1, as an option lists them in percent, the lowest first."""
    try:
        shares = sorted(float(number) / 100 for number in text.split(","))
    except ValueError:
        shares = []
    if not shares or not 0 < shares[0] <= shares[-1] <= 1:
        raise ConfigError(f"{option}: {text!r} are no percentages; write them as 92.66,94")
    return tuple(shares)


def read_outcome(option: str, path: Path, has: str) -> dict[str, Any]:
    """What the same command wrote earlier, which has such an entry."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}: {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or has not in found:
        raise ConfigError(f"{option}: {path} is not what this command writes")
    return found

"""``densenet-dist bench``: measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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

bench_app = typer.Typer(help="Measurements on this machine.", no_args_is_help=True)


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
        typer.Option(help="Ways to run the net, separated by commas; also padded, compiled_graph and triton."),
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
    if plot is not None and plot.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--plot: {plot} must end in .png, .pdf or .svg")
    for path in (out, plot):
        require_writable(path)
    with Console(stderr=True).status("") as status:  # on a terminal only
        found = measure(config, batch_sizes=sizes, arms=names, seconds=seconds, rounds=rounds, listener=status.update)
    print_table(found)
    write_json(found, out)
    if plot is not None:
        draw(found, plot)

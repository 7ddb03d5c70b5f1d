"""``densenet-dist train`` and ``tune``: runs and sweeps."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from densenet_dist.cli.options import AsJson, Debug, Quiet, Sources, complete_name, load, status
from densenet_dist.errors import ConfigError, Interrupted, TrainingError

if TYPE_CHECKING:
    from densenet_dist.schema import Config


def train(
    sources: Sources = None,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="RUN", help="Resume this run from its last checkpoint."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a model, test it and write a report.

    densenet-dist train quickstart
    densenet-dist train configs/cifar10_notebook.yaml model.growth_rate=24 name=k24
    densenet-dist train --resume runs/k24
    """
    from densenet_dist.cluster.signals import handle
    from densenet_dist.display.console import Console, RunSummary
    from densenet_dist.display.json_lines import RunJsonLines
    from densenet_dist.run_folder import RunFolder, join_location

    handle(raise_interrupt)
    with RunJsonLines() if as_json else Console(quiet) as console:
        config = load(sources) if resume is None else _resumed_config(resume, sources or [])
        if config.cluster.engine == "local" and os.environ.get("RANK") not in (None, "", "0"):  # torchrun
            console.mute()
        location = join_location(config.storage, config.name)
        console({"kind": "run", "name": config.name, "run": location, "resumed": resume is not None})
        try:
            from densenet_dist.cluster.launch import fit  # PyTorch takes seconds, so this comes after the first output

            result = fit(config, resume=resume is not None, listener=console)
        except KeyboardInterrupt as stop:  # typer would turn it into an abort
            raise Interrupted(location, *stop.args) from None
        console.finish(RunSummary.read(RunFolder(config.storage, config.name), result.summary))


def _resumed_config(run: str, settings: list[str]) -> Config:
    from densenet_dist.cluster.resuming import resume_config
    from densenet_dist.run_folder import open_run

    for text in settings:
        if "=" not in text:
            raise ConfigError(f"{text}: a resumed run has its own config.yaml; only key=value settings can be given")
    return resume_config(open_run(run), settings)


def tune(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SWEEP [key=value]...",
            help="A sweep file, or a name from `densenet-dist config --list`, then settings of the sweep (trials=8), "
            "the base configuration (train.epochs=3) or the space ('space.train.lr={loguniform: [0.01, 1]}').",
            show_default=False,
            autocompletion=complete_name,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="SWEEP",
            help="Resume this sweep: its folder, or its name in runs/. trials=N extends it.",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Search for the best settings with many runs of one configuration.

    densenet-dist tune sweep_quickstart
    densenet-dist tune configs/sweep_cifar10.yaml trials=32 name=wide
    densenet-dist tune --resume runs/wide
    densenet-dist tune --resume runs/wide trials=64
    """
    from densenet_dist.cluster.signals import handle
    from densenet_dist.sweep.display import SweepConsole, SweepJsonLines

    handle(raise_interrupt)
    with SweepJsonLines() if as_json else SweepConsole(quiet) as console:
        if resume is None:
            if not sources:
                raise ConfigError("name a sweep file, such as sweep_quickstart (or --resume SWEEP)")
            from densenet_dist.sweep.definition import load_sweep

            sweep = load_sweep(*sources)
        with status("loading PyTorch"):
            from densenet_dist.cluster.sweep import open_sweep
            from densenet_dist.cluster.sweep import tune as run_sweep
        if resume is not None:
            sweep = open_sweep(resume, *sources or ())
        try:
            result = run_sweep(sweep, resume=resume is not None, listener=console)
        except KeyboardInterrupt as stop:
            number = stop.args[0] if stop.args else signal.SIGINT
            raise Interrupted(sweep.folder, number, "tune") from None
        console.finish(result)
        if result.best is None and result.ended_by is None:
            raise TrainingError(f"no trial of {result.folder} has a value of the metric; see the causes above")


def raise_interrupt(number: int, frame: Any) -> NoReturn:
    """Handle a signal."""
    raise KeyboardInterrupt(number)

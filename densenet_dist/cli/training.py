"""``densenet-dist train`` and ``tune``: runs and sweeps."""

from __future__ import annotations

import os
import signal
from typing import Annotated, Any, NoReturn

import typer

from densenet_dist.cli.options import AsJson, Debug, Quiet, Sources, Trust, complete_name, load, only_settings, status
from densenet_dist.custom import trust_option
from densenet_dist.errors import ConfigError, Interrupted, TrainingError


def train(
    sources: Sources = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            help="Resume this run from its last checkpoint; train.epochs=N and train.max_minutes=N extend it if its "
            "schedule allows that.",
        ),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="Start a new run from the best weights of this run, with its configuration if no other is given.",
        ),
    ] = None,
    trust: Trust = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a model, test it and write a report.

    densenet-dist train quickstart
    densenet-dist train configs/cifar10_notebook.yaml model.growth_rate=24 name=k24
    densenet-dist train --resume runs/k24
    densenet-dist train --from runs/k24 train.lr=0.01 name=k24-again
    """
    from densenet_dist.cluster.resuming import resume_config
    from densenet_dist.cluster.signals import handle
    from densenet_dist.display.console import Console
    from densenet_dist.display.json_lines import RunJsonLines
    from densenet_dist.run_folder import RunFolder, join_location, open_run

    handle(raise_interrupt)
    location = resume
    with RunJsonLines() if as_json else Console(quiet) as console:
        try:
            if resume is not None and start_from is not None:
                raise ConfigError("--resume continues a run and --from starts a new one; give one of them")
            if resume is None:
                config = load(sources, None if start_from is None else open_run(start_from), trust)
            else:
                config = resume_config(open_run(resume), only_settings(sources), trust=trust)
            if config.cluster.engine == "local" and os.environ.get("RANK") not in (None, "", "0"):  # torchrun
                console.mute()
            location = join_location(config.storage, config.name)
            console({"kind": "run", "name": config.name, "run": location, "resumed": resume is not None})
            from densenet_dist.cluster.launch import fit  # PyTorch takes seconds, so this comes after the first output

            result = fit(config, resume=resume is not None, listener=console)
        except KeyboardInterrupt as interrupt:
            raise ended_by(interrupt, location, "train") from None
        console.finish(RunFolder(config.storage, config.name), result.summary)


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
    trust: Trust = False,
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
    folder = resume
    with SweepJsonLines() if as_json else SweepConsole(quiet) as console:
        try:
            if resume is None:
                if not sources:
                    raise ConfigError("name a sweep file, such as sweep_quickstart (or --resume SWEEP)")
                from densenet_dist.sweep.definition import load_sweep

                sweep = load_sweep(*sources, trust=trust or None)
                folder = sweep.folder
            with status("loading PyTorch"):
                from densenet_dist.cluster.sweep import open_sweep
                from densenet_dist.cluster.sweep import tune as run_sweep
            if resume is not None:
                sweep = open_sweep(resume, *sources or (), trust=trust)
                folder = sweep.folder
            result = run_sweep(sweep, resume=resume is not None, listener=console)
        except KeyboardInterrupt as interrupt:
            raise ended_by(interrupt, folder, "tune") from None
        console.finish(result)
        if result.best is None and result.ended_by is None:
            raise TrainingError(f"no trial of {result.folder} has a value of the metric; see the errors above")


class SignalInterrupt(KeyboardInterrupt):
    """A signal. If KeyboardInterrupt itself leaves an exec(), Python ends with SIGINT although it was handled."""


def raise_interrupt(number: int, frame: Any) -> NoReturn:
    """Handle a signal."""
    raise SignalInterrupt(number)


def ended_by(interrupt: KeyboardInterrupt, folder: str | None, command: str) -> Interrupted | SystemExit:
    """Return what ends the process with the code of the signal; typer would end it with 130."""
    number = interrupt.args[0] if interrupt.args else signal.SIGINT
    return SystemExit(128 + number) if folder is None else Interrupted(folder, number, command, trust_option())

"""``densenet-dist train`` and ``tune``: runs and sweeps, from the first word to the summary."""

from __future__ import annotations

import json
import os
import shlex
import signal
from typing import Annotated, Any, NoReturn

import typer

from densenet_dist.cli.options import Debug, Sources, load
from densenet_dist.errors import ConfigError, Interrupted, TrainingError
from densenet_dist.schema import Config


def train(
    sources: Sources = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="RUN", help="Go on with this run from its last checkpoint.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing but errors.")] = False,
    debug: Debug = False,
) -> None:
    """Train a model and test it once.

    densenet-dist train configs/quickstart.yaml
    densenet-dist train configs/cifar10_notebook.yaml model.growth_rate=24 name=k24
    densenet-dist train --resume runs/k24
    """
    from densenet_dist.train.logs import Console

    signal.signal(signal.SIGTERM, raise_interrupt)
    # Under torchrun every rank runs this; one of them speaks.
    with Console(quiet or os.environ.get("RANK", "0") != "0") as console:
        if resume is not None:
            _resume(resume, sources or [], console)
        else:
            _fit(load(sources), console)


def tune(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SWEEP.yaml [key=value]...",
            help="A sweep file, then settings: its own (trials=8), the base configuration's (train.epochs=3) or the "
            "space's (space.train.lr={loguniform: [0.01, 1]}).",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="SWEEP", help="Go on with this sweep: its folder, or its name.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing but errors.")] = False,
    debug: Debug = False,
) -> None:
    """Search settings: many runs of one configuration, the best of them kept.

    densenet-dist tune configs/sweep_quickstart.yaml
    densenet-dist tune configs/sweep_cifar10.yaml trials=32 name=wide
    densenet-dist tune --resume runs/wide
    """
    from densenet_dist.cluster.resources import lacking_here
    from densenet_dist.cluster.sweep import open_sweep
    from densenet_dist.sweep.console import SweepConsole
    from densenet_dist.sweep.definition import load_sweep

    signal.signal(signal.SIGTERM, raise_interrupt)
    with SweepConsole(quiet) as console:
        if resume is None:
            if not sources:
                raise ConfigError("name a sweep file, such as configs/sweep_quickstart.yaml (or --resume SWEEP)")
            _tune(load_sweep(*sources, lacking=lacking_here), console)
            return
        if sources:
            raise ConfigError(f"{sources[0]}: a sweep that is resumed has its own sweep.yaml; nothing can follow")
        _tune(open_sweep(resume), console, resume=True)


def _fit(config: Config, console: Any, *, resume: bool = False) -> None:
    from densenet_dist.cluster.launch import fit
    from densenet_dist.train.run_folder import join_location

    location = join_location(config.storage, config.name)
    try:
        result = fit(config, resume=resume, listener=console)
    except KeyboardInterrupt as stop:  # caught here: the parser has its own idea of what it means
        raise Interrupted(location, *stop.args) from None
    _summarise(console, result.page.rpartition("/")[0], location, dict(result.summary))


def _tune(sweep: Any, console: Any, *, resume: bool = False) -> None:
    from densenet_dist.cluster.sweep import tune as search
    from densenet_dist.sweep.results import BEST_FILE, PAGE_FILE, RESULTS_FILE, TABLE_FILE

    try:
        result = search(sweep, resume=resume, listener=console)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        raise Interrupted(sweep.folder, number, "tune") from None
    console.table(sweep, result.trials)
    rows = {"sweep folder": result.folder}
    if result.best is not None:
        rows["best trial"] = f"{result.best.name}   ({sweep.settings.metric} {result.best.metric:.4f})"
        query = sweep.settings.storage.partition("?")[1:]
        rows["train it again"] = f"densenet-dist train {shlex.quote(''.join((result.folder, '/', BEST_FILE, *query)))}"
    rows["page"] = f"{result.folder}/{PAGE_FILE}"
    rows["results"] = f"{result.folder}/{{{RESULTS_FILE},{TABLE_FILE}}}"
    rows["TensorBoard"] = f"tensorboard --logdir {result.folder}"
    console.summary(f"{result.ended_by or 'finished'}: {sweep.settings.name}", rows)
    if result.best is None and result.ended_by is None:
        raise TrainingError(f"no trial of {result.folder} came to its first figure; see their causes above")


def _resume(run: str, settings: list[str], console: Any) -> None:
    from densenet_dist.cluster.resuming import resume_config
    from densenet_dist.train.evaluation import open_run
    from densenet_dist.train.run_folder import SUMMARY_FILE, join_location

    for text in settings:
        if "=" not in text:
            raise ConfigError(f"{text}: a resumed run has its own config.yaml; only key=value settings can follow")
    folder = open_run(run)
    config = resume_config(folder, settings)
    if folder.exists(SUMMARY_FILE):
        console({"kind": "note", "text": f"the run {folder.uri} is finished already"})
        _summarise(
            console,
            folder.uri,
            join_location(folder.storage, folder.name),
            json.loads(folder.fetch(SUMMARY_FILE).read_text()),
        )
        return
    _fit(config, console, resume=True)


def _summarise(console: Any, run: str, location: str, summary: dict[str, Any]) -> None:
    best = summary["best"]
    rows = {"test top-1": f"{summary['test/top1']:.2%}   (top-5 {summary['test/top5']:.2%})"}
    if "val/top1" in best:
        rows["validation top-1"] = f"{best['val/top1']:.2%}   (best, epoch {best['epoch']})"
    seconds = summary["train_seconds"]
    rows["trained"] = f"{summary['epochs']} epochs, {summary['global_step']:,} steps in {seconds:,.0f} s"
    rows["run folder"] = run
    rows["page"] = f"{run}/report.html"
    rows["TensorBoard"] = f"tensorboard --logdir {run.rpartition('/')[0]}"
    rows["test it again"] = f"densenet-dist evaluate {shlex.quote(location)}"
    console.summary(f"{summary['status']}: {run.rpartition('/')[2]}", rows)


def raise_interrupt(number: int, frame: Any) -> NoReturn:
    """A signal handler."""
    raise KeyboardInterrupt(number)

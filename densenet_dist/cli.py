"""The commands. Each is thin over the Python interface; what is heavy is imported only by the command that needs it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from densenet_dist.config import load_config, to_yaml
from densenet_dist.errors import ConfigError, DenseNetDistError, Interrupted, StorageError, TrainingError
from densenet_dist.schema import Config
from densenet_dist.yaml_settings import read_yaml

app = typer.Typer(
    help="Train DenseNets from a laptop's CPU to a GPU cluster.",
    epilog="Exit codes: 0 done, 1 training failed, 2 usage or configuration, 3 environment, 4 data, 5 storage, "
    "6 checkpoint does not fit, 130 or 143 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
bench_app = typer.Typer(help="Measurements on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG.yaml [key=value]...",
        help="YAML files and dotted.key=value settings; later ones win over earlier ones.",
        show_default=False,
    ),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder (path or s3:// URI), or its name in runs/.")]
BatchSizes = Annotated[str, typer.Option("--batch-sizes", help="Images a batch, separated by commas.")]
Seconds = Annotated[float, typer.Option(min=0.05, help="Time for each measurement.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often all of it is measured; medians count.")]
Out = Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write everything there too.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Split(StrEnum):
    """Which images `evaluate` looks at."""

    test = "test"
    val = "val"
    train = "train"


class Which(StrEnum):
    """Which checkpoint `evaluate` loads."""

    best = "best"
    last = "last"


@app.command()
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

    signal.signal(signal.SIGTERM, _terminated)
    # Under torchrun every rank runs this; one of them speaks.
    with Console(quiet or os.environ.get("RANK", "0") != "0") as console:
        if resume is not None:
            _resume(resume, sources or [], console)
        else:
            _fit(_load(sources), console)


@app.command()
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
    from densenet_dist.cluster.sweep import open_sweep
    from densenet_dist.sweep.console import SweepConsole
    from densenet_dist.sweep.definition import load_sweep

    signal.signal(signal.SIGTERM, _terminated)
    with SweepConsole(quiet) as console:
        if resume is None:
            if not sources:
                raise ConfigError("name a sweep file, such as configs/sweep_quickstart.yaml (or --resume SWEEP)")
            _tune(load_sweep(*sources), console)
            return
        if sources:
            raise ConfigError(f"{sources[0]}: a sweep that is resumed has its own sweep.yaml; nothing can follow")
        _tune(open_sweep(resume), console, resume=True)


@app.command()
def evaluate(
    run: Run,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Changes, such as data.root=DIR.")
    ] = None,
    split: Annotated[Split, typer.Option(help="Which images.")] = Split.test,
    checkpoint: Annotated[Which, typer.Option(help="Which checkpoint.")] = Which.best,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Judge a run's checkpoint again."""
    from densenet_dist.train.evaluation import evaluate as judge

    figures = judge(run, split=split.value, checkpoint=checkpoint.value, overrides=tuple(settings or ()))
    if as_json:
        typer.echo(json.dumps({"run": run, "split": split.value, "checkpoint": checkpoint.value, **figures}))
    else:
        typer.echo(
            f"{split.value}: loss {figures['loss']:.4f}, top-1 {figures['top1']:.2%}, top-5 {figures['top5']:.2%} "
            f"of {figures['images']:,.0f} images"
        )


@data_app.command("prepare")
def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="cifar10, cifar100, shapes or folder.")],
    root: Annotated[Path, typer.Option(help="The folder for data sets.")] = Path("data"),
    url: Annotated[str | None, typer.Option(help="Download from here instead (a mirror).")] = None,
    download: Annotated[bool, typer.Option(help="Whether a missing set may be downloaded.")] = True,
    debug: Debug = False,
) -> None:
    """Download, unpack and verify a data set; of a folder of pictures, name all that cannot be used.

    densenet-dist data prepare cifar10
    densenet-dist data prepare folder --root my_photos
    """
    from densenet_dist.data.datasets import DATASET_NAMES, prepare_dataset

    if name not in DATASET_NAMES:
        raise ConfigError(f"there is no data set {name!r}; known: {', '.join(DATASET_NAMES)}")
    folder = prepare_dataset(name, root, download=download, url=url, progress=True)
    typer.echo(f"{name}: verified in {folder}" if name != "shapes" else "shapes: generated when used")


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

    config = _load(sources)
    sizes = _batch_sizes(batch_sizes)
    _require_writable(out)
    found = measure(config, batch_sizes=sizes, seconds=seconds, rounds=rounds)
    print_table(found)
    _write_json(found, out)


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

    config = _load(sources)
    sizes, names = _batch_sizes(batch_sizes), tuple(name.strip() for name in arms.split(","))
    if plot is not None and plot.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--plot: {plot} must end in .png, .pdf or .svg")
    for path in (out, plot):
        _require_writable(path)
    with Console(stderr=True).status("") as status:  # on a terminal only
        found = measure(config, batch_sizes=sizes, arms=names, seconds=seconds, rounds=rounds, listener=status.update)
    print_table(found)
    _write_json(found, out)
    if plot is not None:
        draw(found, plot)


@app.command()
def config(sources: Sources = None, debug: Debug = False) -> None:
    """Check a configuration, or a sweep file, and print all of it as YAML."""
    from densenet_dist.cluster.launch import check_model

    if any(map(_is_sweep, sources or [])):
        from densenet_dist.sweep.definition import load_sweep

        typer.echo(load_sweep(*(sources or [])).to_yaml(), nl=False)
        return
    resolved = _load(sources)
    check_model(resolved)
    typer.echo(to_yaml(resolved), nl=False)


@app.command()
def doctor(sources: Sources = None, debug: Debug = False) -> None:
    """Check whether this machine can do the job: versions, GPUs, DALI, Ray, storage, data.

    With a configuration, the storage and data it names are checked; without one, the defaults.
    """
    from densenet_dist.doctor import examine

    if not examine(load_config(*(sources or []))):
        raise typer.Exit(3)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit with its code; `arguments` defaults to the command line's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Before torch is imported: spinning OpenMP threads of several workers on shared cores slow each other down.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # a tenth of a millisecond: from one pass to the next, no longer
    try:
        code = app(arguments, prog_name="densenet-dist", standalone_mode=False)
    except DenseNetDistError as error:
        _fail(str(error), error.exit_code, arguments)
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # the parser's own usage errors
            error.show()
            code = error.exit_code
        else:
            _fail(f"{type(error).__name__}: {error}\n  this is a fault of the program: see --debug", 1, arguments)
    raise SystemExit(code or 0)


def _load(sources: list[str] | None) -> Config:
    if not sources:
        raise ConfigError("name a configuration, such as configs/quickstart.yaml (or --resume RUN to go on with a run)")
    sources = list(map(_fetched, sources))
    for source in filter(_is_sweep, sources):
        raise ConfigError(f"{source} is a sweep file, whose trials are run by: densenet-dist tune {source}")
    return load_config(*sources)


def _fetched(source: str) -> str:
    """A configuration file that lies on an object store, such as a sweep's best.yaml, as a local file."""
    if not re.match(r"[a-z0-9]+://", source):
        return source
    from densenet_dist.train.run_folder import RunFolder, split_location

    folder, file = split_location(source)
    return str(RunFolder(*split_location(folder)).fetch(file))


def _is_sweep(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml") and Path(source).is_file() and "space" in read_yaml(Path(source))


def _batch_sizes(text: str) -> tuple[int, ...]:
    for size in text.split(","):
        if not size.strip().isdecimal() or int(size) == 0:
            raise ConfigError(f"--batch-sizes: {size!r} is no number of images; write them as 64,128,256")
    return tuple(int(size) for size in text.split(","))


def _require_writable(path: Path | None) -> None:
    """Say so before the work, not after it, where a result could not be written."""
    if path is None:
        return
    try:
        new = not path.exists()
        with path.open("a"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error


def _write_json(found: dict[str, Any], path: Path | None) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error


def _fit(config: Config, console: Any, *, resume: bool = False) -> None:
    from densenet_dist.cluster.launch import fit

    try:
        result = fit(config, resume=resume, listener=console)
    except KeyboardInterrupt as stop:  # caught here: the parser has its own idea of what it means
        raise Interrupted(f"{config.storage.rstrip('/')}/{config.name}", *stop.args) from None
    _summarise(console, result.run, dict(result.summary))


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
    from densenet_dist.cluster.launch import resume_config
    from densenet_dist.train.evaluation import open_run
    from densenet_dist.train.run_folder import SUMMARY_FILE

    for text in settings:
        if "=" not in text:
            raise ConfigError(f"{text}: a resumed run has its own config.yaml; only key=value settings can follow")
    folder = open_run(run)
    config = resume_config(folder, settings)
    if folder.exists(SUMMARY_FILE):
        console({"kind": "note", "text": f"the run {folder.uri} is finished already"})
        _summarise(console, folder.uri, json.loads(folder.fetch(SUMMARY_FILE).read_text()))
        return
    _fit(config, console, resume=True)


def _summarise(console: Any, run: str, summary: dict[str, Any]) -> None:
    best = summary["best"]
    rows = {"test top-1": f"{summary['test/top1']:.2%}   (top-5 {summary['test/top5']:.2%})"}
    if "val/top1" in best:
        rows["validation top-1"] = f"{best['val/top1']:.2%}   (best, epoch {best['epoch']})"
    seconds = summary["train_seconds"]
    rows["trained"] = f"{summary['epochs']} epochs, {summary['global_step']:,} steps in {seconds:,.0f} s"
    rows["run folder"] = run
    rows["curves"] = f"{run}/curves.png"
    rows["TensorBoard"] = f"tensorboard --logdir {run.rpartition('/')[0]}"
    rows["test it again"] = f"densenet-dist evaluate {run}"
    console.summary(f"{summary['status']}: {run.rpartition('/')[2]}", rows)


def _terminated(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt(number)


def _fail(message: str, code: int, arguments: list[str]) -> NoReturn:
    if "--debug" in arguments:
        traceback.print_exc()
    typer.echo(f"error: {message}", err=True)
    raise SystemExit(code)

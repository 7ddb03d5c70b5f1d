"""The commands. Each is thin over the Python interface; what is heavy is imported only by the command that needs it."""

from __future__ import annotations

import io
import json
import os
import platform
import sys
import traceback
from contextlib import suppress
from functools import partial
from typing import Annotated, Literal, NoReturn

import typer

from densenet_dist import __version__, bundled
from densenet_dist.cli.bench import bench_app
from densenet_dist.cli.options import Checkpoint, Debug, Run, Sources, is_sweep, load
from densenet_dist.cli.predicting import export, predict
from densenet_dist.cli.reporting import report
from densenet_dist.cli.running import train, tune
from densenet_dist.cli.submitting import submit
from densenet_dist.credentials import without_credentials
from densenet_dist.environment import package_version
from densenet_dist.errors import DenseNetDistError, storage_errors

app = typer.Typer(
    help="""Train DenseNets from a laptop's CPU to a GPU cluster.

    First: densenet-dist train quickstart    (no download, two minutes on two cores)
    What else there is: densenet-dist config --list
    Whether this machine can do it: densenet-dist doctor
    """,
    epilog="Exit codes: 0 done, 1 training failed, 2 usage or configuration, 3 environment, 4 data, 5 storage, "
    "6 checkpoint does not fit, 129, 130 or 143 interrupted.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data sets: download, unpack, verify.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")


def show_versions(wanted: bool) -> None:
    """Print the versions of this package and of what results and speed depend on, and exit; nothing is imported."""
    if not wanted:
        return
    typer.echo(f"densenet-dist {__version__}\n  python {platform.python_version()}")
    for name, package in (("torch", "torch"), ("ray", "ray"), ("dali", "nvidia-dali-cuda130")):
        typer.echo(f"  {name} {package_version(package) or 'not installed'}")
    raise typer.Exit


@app.callback()
def program(
    show: Annotated[
        bool, typer.Option("--version", callback=show_versions, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Options of the program itself; the help text is the app's."""


def evaluate(
    run: Run,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="Changes, such as data.root=DIR.", show_default=False),
    ] = None,
    split: Annotated[Literal["test", "val", "train"], typer.Option(help="Which images.")] = "test",
    checkpoint: Checkpoint = "best",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Evaluate a run's checkpoint again: loss, top-1 and top-5.

    densenet-dist evaluate runs/k24
    densenet-dist evaluate k24 --split val --checkpoint last --json
    densenet-dist evaluate s3://bucket/runs/k24 data.root=/data
    """
    from densenet_dist.train.evaluation import evaluate as figures_of

    notify = partial(typer.echo, err=True)
    figures = figures_of(run, split=split, checkpoint=checkpoint, overrides=tuple(settings or ()), notify=notify)
    if as_json:
        typer.echo(json.dumps({"run": run, "split": split, "checkpoint": checkpoint, **figures}))
    else:
        typer.echo(
            f"{split}: loss {figures['loss']:.4f}, top-1 {figures['top1']:.2%}, top-5 {figures['top5']:.2%} "
            f"of {figures['images']:,.0f} images"
        )


@data_app.command("prepare")
def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="cifar10, cifar100, shapes or folder.")],
    root: Annotated[str, typer.Option(help="The folder for data sets, or s3://bucket/path.")] = "data",
    url: Annotated[str | None, typer.Option(help="Download from here instead (a mirror).")] = None,
    download: Annotated[bool, typer.Option(help="Whether a missing set may be downloaded.")] = True,
    debug: Debug = False,
) -> None:
    """Download, unpack and verify a data set; of a folder of pictures, name all that cannot be used.

    densenet-dist data prepare cifar10
    densenet-dist data prepare folder --root my_photos
    densenet-dist data prepare cifar10 --root s3://bucket/data    (puts it there, for nodes to take it)
    """
    from densenet_dist.config import load_config
    from densenet_dist.data.datasets import GENERATED, prepare_dataset, publish_dataset
    from densenet_dist.object_store import is_uri

    root = load_config({"data.root": root}).data.root
    if is_uri(root) and name not in GENERATED:
        typer.echo(f"{name}: {publish_dataset(name, root, download=download, url=url)}")
    folder, found = prepare_dataset(name, root, download=download, url=url)
    typer.echo(f"{name}: {found}" if name in GENERATED else f"{name}: verified in {folder}: {found}")


def config(
    sources: Sources = None,
    list_them: Annotated[bool, typer.Option("--list", help="Show those that come with the package.")] = False,
    debug: Debug = False,
) -> None:
    """Check a configuration, or a sweep file, and print all of it as YAML.

    densenet-dist config --list
    densenet-dist config quickstart train.epochs=10 > mine.yaml    (then: densenet-dist train mine.yaml)
    densenet-dist config sweep_cifar10
    """
    from densenet_dist.config import to_yaml
    from densenet_dist.train.network import check_run

    if list_them:
        for name in bundled.names():
            typer.echo(f"{name:22}  {bundled.headline(name)}")
        typer.echo(f"\nThe files, with all that is known of them: {bundled.folder()}", err=True)
        return
    if any(map(is_sweep, sources or [])):
        from densenet_dist.sweep.definition import load_sweep

        typer.echo(load_sweep(*(sources or [])).to_yaml(), nl=False)
        return
    resolved = load(sources)
    check_run(resolved)
    typer.echo(to_yaml(resolved), nl=False)


def doctor(sources: Sources = None, debug: Debug = False) -> None:
    """Check whether this machine can do the job: versions, GPUs, DALI, Ray, storage, data.

    With a configuration, the storage and data it names are checked; without one, the defaults.

    densenet-dist doctor
    densenet-dist doctor cifar10_notebook storage=s3://bucket/runs
    """
    from densenet_dist.config import load_config
    from densenet_dist.doctor import examine

    if not examine(load_config(*(sources or []))):
        raise typer.Exit(3)


# In the order in which a newcomer meets them.
for _command in (train, evaluate, report, predict, export, tune, config, doctor):
    app.command()(_command)
app.command(context_settings={"allow_interspersed_args": False})(submit)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit with its code; `arguments` defaults to the command line's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Before torch is imported: spinning OpenMP threads of several workers on shared cores slow each other down.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # a tenth of a millisecond: from one pass to the next, no longer
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of names and bars that its encoding lacks
    try:
        with storage_errors():
            code = app(arguments, prog_name="densenet-dist", standalone_mode=False)
    except DenseNetDistError as error:
        _fail(str(error), error.exit_code, arguments)
    except typer.Exit as stop:
        code = stop.exit_code
    except typer.Abort:  # Ctrl-C, where a command has nothing to say of it
        code = 130
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show") and hasattr(error, "message"):  # a usage error
            error.message = without_credentials(error.message)
            with suppress(OSError):
                error.show()
            code = error.exit_code
        else:
            _fail(f"{type(error).__name__}: {error}\n  this is a fault of the program: see --debug", 1, arguments)
    _exit(code or 0)


def _fail(message: str, code: int, arguments: list[str]) -> NoReturn:
    with suppress(OSError):
        if "--debug" in arguments:
            typer.echo(without_credentials(traceback.format_exc()), err=True, nl=False)
        typer.echo(f"error: {without_credentials(message)}", err=True)
    _exit(code)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again, and exit with 120
            from densenet_dist.display.console import redirect_to_null

            redirect_to_null(stream)
    raise SystemExit(code)

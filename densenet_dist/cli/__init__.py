"""The command line. Commands are thin wrappers of the Python interface and import heavy packages only when they run."""

from __future__ import annotations

import io
import json
import os
import sys
import textwrap
import traceback
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer

from densenet_dist import __version__
from densenet_dist.cli.options import Debug, Sources, Trust, is_sweep, load, status
from densenet_dist.cli.submitting import submit
from densenet_dist.cli.trained import evaluate, export, predict, report
from densenet_dist.cli.training import train, tune
from densenet_dist.credentials import without_credentials
from densenet_dist.errors import DenseNetDistError, storage_errors
from densenet_dist.yaml_settings import BUNDLED, bundled_names, flatten

app = typer.Typer(
    help="""Train DenseNets on a laptop's CPU, a GPU or a cluster.

    Start here: densenet-dist train quickstart    (no download, two minutes on two cores)
    List the bundled configurations: densenet-dist config --list
    Check this machine: densenet-dist doctor
    """,
    epilog="Exit codes: 0 success, 1 training failed, 2 usage or configuration, 3 environment, 4 data, 5 storage, "
    "6 checkpoint damaged or of another model, 129, 130 or 143 interrupted.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Download, unpack and verify data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def show_version(requested: bool) -> None:
    """Print the version and exit."""
    if requested:
        typer.echo(f"densenet-dist {__version__}")
        raise typer.Exit


@app.callback()
def program(
    show: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Handle the options of the program itself; its help text is that of `app`."""


@data_app.command("prepare")
def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="cifar10, cifar100, shapes or folder.")],
    root: Annotated[str, typer.Option(help="The folder of data sets, or s3://bucket/path.")] = "data",
    url: Annotated[str | None, typer.Option(help="Download from this address (a mirror).")] = None,
    download: Annotated[bool, typer.Option(help="Download the data set if it is missing.")] = True,
    debug: Debug = False,
) -> None:
    """Download, unpack and verify a data set; for a folder of images, list the unusable files.

    densenet-dist data prepare cifar10
    densenet-dist data prepare folder --root my_photos
    densenet-dist data prepare cifar10 --root s3://bucket/data    (copies it there, for the nodes of a cluster)
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
    list_them: Annotated[
        bool, typer.Option("--list", help="List the configurations that come with the package.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of configurations; with a sweep file, of sweeps.")
    ] = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Check a configuration or a sweep file, and print all settings as YAML.

    densenet-dist config --list
    densenet-dist config quickstart train.epochs=10 > mine.yaml    (then: densenet-dist train mine.yaml)
    densenet-dist config sweep_cifar10
    """
    if list_them:
        for name in bundled_names():
            comment = (BUNDLED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[1]  # the first is for editors
            purpose = comment.removeprefix("# ").rstrip(".")
            typer.echo(f"{name:22}  {textwrap.shorten(purpose, 100, placeholder=' ...')}")
        typer.echo(f"\nThe files and their comments: {BUNDLED}", err=True)
        return
    sweeps = any(map(is_sweep, sources or []))
    if schema:
        from densenet_dist.sweep.definition import json_schema

        typer.echo(json.dumps(json_schema(sweeps), indent=1))
        return
    if sweeps:
        from densenet_dist.sweep.definition import load_sweep

        typer.echo(load_sweep(*(sources or []), trust=trust or None).to_yaml(), nl=False)
        return
    from densenet_dist.config import to_yaml
    from densenet_dist.train.preflight import check_run

    resolved = load(sources, trust=trust)
    check_run(resolved)
    typer.echo(to_yaml(resolved), nl=False)


def doctor(sources: Sources = None, debug: Debug = False) -> None:
    """Check this machine: versions, GPUs, DALI, Ray, storage, data.

    The storage and the data are those of the configuration, or the defaults without one.

    densenet-dist doctor
    densenet-dist doctor cifar10_notebook storage=s3://bucket/runs
    """
    from densenet_dist.config import load_config

    config = load(sources) if sources else load_config()
    with status("loading PyTorch"):
        from densenet_dist.doctor import examine
    if not examine(config):
        raise typer.Exit(3)


# In the order in which a new user needs them.
for _command in (train, evaluate, report, predict, export, tune, config, doctor):
    app.command()(_command)
app.command(context_settings={"allow_interspersed_args": False})(submit)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit with its code; `arguments` defaults to those of the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Before torch is imported: OpenMP threads that spin slow down other workers on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # 0.1 ms: the time between two passes
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for characters that the encoding lacks
    try:
        with storage_errors():
            code = app(arguments, prog_name="densenet-dist", standalone_mode=False)
    except DenseNetDistError as error:
        _fail(str(error), error.exit_code, arguments)
    except typer.Abort:  # Ctrl-C in a command that does not handle it
        code = 130
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show") and hasattr(error, "message"):  # a usage error
            error.message = without_credentials(error.message + _hint(error, arguments))
            with suppress(OSError):
                error.show()
            code = error.exit_code
        else:
            _fail(f"{type(error).__name__}: {error}\n  this is a bug: --debug shows the traceback", 1, arguments)
    _exit(code or 0)


def _hint(error: Any, arguments: list[str]) -> str:
    """Return what to type instead, if it is known: for ``--epochs 3`` it is ``train.epochs=3``."""
    from densenet_dist.config import load_config, to_dict

    option = str(getattr(error, "option_name", ""))
    name = option.lstrip("-").replace("-", "_")
    keys = [key for key in flatten(to_dict(load_config())) if key.rpartition(".")[2] == name]
    if not keys:
        return ""
    following = [*arguments[arguments.index(option) + 1 :], "..."][0] if option in arguments else "..."
    return f"\nSettings are given without dashes: {' or '.join(f'{key}={following}' for key in keys)}"


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
        except OSError:  # at exit Python would try again and return 120
            from densenet_dist.display.json_lines import redirect_to_null

            redirect_to_null(stream)
    raise SystemExit(code)

"""Arguments and helpers that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from densenet_dist.errors import ConfigError
from densenet_dist.object_store import fetch_file, is_uri
from densenet_dist.yaml_settings import bundled_names, find_file, is_override, read_yaml

if TYPE_CHECKING:
    from rich.status import Status

    from densenet_dist.run_folder import RunFolder
    from densenet_dist.schema import Config


def complete_name(incomplete: str) -> list[str]:
    """Complete the names of the bundled configurations; if none matches, the shell completes files."""
    return [name for name in bundled_names() if name.startswith(incomplete)]


def local_path(text: str | Path) -> Path:
    """Make a path of an argument; shells leave the ``~`` of ``--out=~/file`` to the program."""
    return Path(os.path.expanduser(text))


def only_settings(arguments: list[str] | None) -> list[str]:
    """Return the arguments after a run; raise a ConfigError if one is a file, since a run has its own settings."""
    for text in arguments or []:
        if not is_override(text):
            raise ConfigError(f"{text}: the run has its own config.yaml; only key=value settings can be given")
    return arguments or []


Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG [key=value]...",
        help="YAML files, or names from `densenet-dist config --list`, and settings as dotted.key=value; later ones "
        "override earlier ones.",
        show_default=False,
        autocompletion=complete_name,
    ),
]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="The folder of a run (path or s3:// URI), or its name in runs/.")
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value]...",
        help="Changed settings, such as data.root=DIR.",
        show_default=False,
        callback=only_settings,
    ),
]
Checkpoint = Annotated[Literal["best", "last"], typer.Option(help="Which checkpoint of the run to use.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show only warnings and errors.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Write one JSON object per line (docs/commands.md), including errors.")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Import the custom parts that the folder of a run or sweep, an export or a URI names. Their code runs, so "
        "check it first.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def load(sources: list[str] | None, start_from: RunFolder | None = None, trust: bool = False) -> Config:
    """Load the configuration from a command's arguments, for a new run from the weights of `start_from` if given.

    With `trust`, custom parts that files of runs and sweeps name may be imported.
    """
    # Takes 0.2 s, which --help and completion need not wait for.
    from densenet_dist.config import load_config, load_run_config

    changes: dict[str, Any] = {}
    if start_from is not None:
        changes = {"model": {"weights": start_from.location, "pretrained": False}}
        if all(is_override(source) and not is_uri(source) for source in sources or ()):
            return load_run_config(start_from.fetch("config.yaml"), *(sources or ()), changes, trust=trust)
    if not sources:
        raise ConfigError(
            "name a configuration, such as quickstart (or --resume RUN to resume a run)\n"
            "  list those that come with the package: densenet-dist config --list"
        )
    # The best.yaml of a sweep may be on an object store.
    sources = [str(fetch_file(source)) if is_uri(source) else source for source in sources]
    for source in filter(is_sweep, sources):
        raise ConfigError(f"{source} is a sweep file\n  run its trials: densenet-dist tune {source}")
    return load_config(*sources, changes, trust=trust or None)


def is_sweep(source: str) -> bool:
    """Return whether an argument names a sweep file."""
    path = find_file(source)
    return path.suffix in (".yaml", ".yml") and os.path.isfile(path) and "space" in read_yaml(path)


def status(text: str) -> Status:
    """Show what a command is waiting for within a ``with`` block, on a terminal only."""
    from rich.console import Console

    return Console(stderr=True).status(text, spinner="line")

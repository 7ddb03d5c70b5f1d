"""What several commands take, and what they make of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from densenet_dist import bundled
from densenet_dist.errors import ConfigError, storage_errors
from densenet_dist.object_store import fetch_file, is_uri

if TYPE_CHECKING:
    from densenet_dist.schema import Config


def complete_name(incomplete: str) -> list[str]:
    """The configurations that come with the package, for completion; where none fits, the shell offers files."""
    return [name for name in bundled.names() if name.startswith(incomplete)]


Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG [key=value]...",
        help="YAML files, or names that `densenet-dist config --list` shows, and dotted.key=value settings; later ones "
        "win over earlier ones.",
        show_default=False,
        autocompletion=complete_name,
    ),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder (path or s3:// URI), or its name in runs/.")]
Checkpoint = Annotated[Literal["best", "last"], typer.Option(help="Which checkpoint of a run.")]
BatchSizes = Annotated[str, typer.Option("--batch-sizes", help="Images a batch, separated by commas.")]
Seconds = Annotated[float, typer.Option(min=0.05, help="Time for each measurement.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often all of it is measured; medians count.")]
Out = Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write everything there too.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but warnings and errors.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Write one JSON object a line, for programs (docs/console.md); errors too.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def load(sources: list[str] | None) -> Config:
    """The configuration that a command line names."""
    from densenet_dist.config import load_config  # a fifth of a second, which --help and completion need not wait for

    if not sources:
        raise ConfigError(
            "name a configuration, such as quickstart (or --resume RUN to go on with a run)\n"
            "  those that come with the package: densenet-dist config --list"
        )
    # A sweep's best.yaml may lie on an object store.
    sources = [str(fetch_file(source)) if is_uri(source) else source for source in sources]
    for source in filter(is_sweep, sources):
        raise ConfigError(f"{source} is a sweep file, whose trials are run by: densenet-dist tune {source}")
    return load_config(*sources)


def is_sweep(source: str) -> bool:
    """Whether a file is a sweep."""
    from densenet_dist.yaml_settings import read_yaml

    path = bundled.find(source)
    return path.suffix in (".yaml", ".yml") and os.path.isfile(path) and "space" in read_yaml(path)


def require_writable(path: Path | None) -> None:
    """Say so before the work, not after it, where a result could not be written."""
    if path is None:
        return
    with storage_errors(path):
        new = not path.exists()
        with path.open("a"):
            pass
        if new:
            path.unlink()


def write_json(found: dict[str, Any], path: Path | None) -> None:
    """Write what was measured, where that was asked for."""
    if path is not None:
        with storage_errors(path):
            path.write_text(json.dumps(found, indent=1) + "\n")

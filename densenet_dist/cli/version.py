"""``densenet-dist --version``: what is installed, without importing any of it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import typer

from densenet_dist import __version__


def show_version(wanted: bool) -> None:
    """Print the version, then those of what results and speed depend on, and end."""
    if wanted:
        typer.echo(f"densenet-dist {__version__}")
        for name, value in versions().items():
            typer.echo(f"  {name} {value}")
        raise typer.Exit


def versions() -> dict[str, str]:
    """Python's, and those of the libraries that do the work."""
    found = {"python": platform.python_version()}
    for name, package in (("torch", "torch"), ("ray", "ray"), ("dali", "nvidia-dali-cuda130")):
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found

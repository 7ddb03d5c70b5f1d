"""``densenet-dist report``: the page of a run, or of several side by side."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from densenet_dist.cli.options import Debug, require_writable
from densenet_dist.errors import ConfigError


def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Runs' folders (paths or s3:// URIs), or their names in runs/."),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.html",
            help="Where the page goes; by default report.html in the run's folder, or of several runs in this one.",
            show_default=False,
        ),
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate/--no-evaluate",
            "--judge/--no-judge",
            help="Whether to evaluate the test set of a run without stored test results; needs the data set.",
        ),
    ] = True,
    root: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Where the data set lies, if not where the run had it.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a run's page: one HTML file that shows everything, and pictures beside it.

    densenet-dist report runs/k24
    densenet-dist report s3://bucket/runs/k24    (the page goes there)
    densenet-dist report runs/seed0 runs/seed1 runs/k24 --out compared.html
    """
    from densenet_dist.report.page import write_report
    from densenet_dist.run_folder import PAGE_FILE

    if out is not None and "://" in out:
        raise ConfigError(f"--out {out}: is a file of this machine; a run on an object store has its page there anyway")
    overrides = () if root is None else (f"data.root={root}",)
    path = None if out is None else Path(out)
    notify = partial(typer.echo, err=True)
    if len(runs) > 1:
        path = path or Path(PAGE_FILE)
    require_writable(path)
    written = write_report(runs, path, evaluate=evaluate, overrides=overrides, notify=notify)
    typer.echo(f"page: {written}")

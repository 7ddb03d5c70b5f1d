"""``densenet-dist submit``: a command that runs on a cluster elsewhere, as if it ran here."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from densenet_dist.cli.options import Debug
from densenet_dist.cli.running import raise_interrupt


def submit(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND ...",
            help="train, tune, evaluate or doctor, with its arguments; files must lie in the working directory.",
        ),
    ],
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The cluster's dashboard: http://HEAD:8265; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine.",
        ),
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="The folder to send, without data, runs and .venv.")
    ] = Path(),
    wait: Annotated[bool, typer.Option(help="Whether to show its output until it ends.")] = True,
    debug: Debug = False,
) -> None:
    """Run a command as a job on a Ray cluster, show its output, and end with its exit code.

    Options of submit come first, then the command as it would be given here. Ctrl-C asks whether the job is to end too.

    densenet-dist submit --address http://HEAD:8265 train configs/cifar10_notebook.yaml storage=s3://bucket/runs
    densenet-dist submit tune configs/sweep_cifar10.yaml storage=/shared/runs name=wide
    densenet-dist submit train --resume /shared/runs/k24
    """
    from densenet_dist.cluster.submit import submit as send

    signal.signal(signal.SIGTERM, raise_interrupt)
    job = send(arguments, working_dir, address)
    typer.echo(f"job {job.id} on {job.address}", err=True)
    if not wait:
        typer.echo(f"  follow it: {job.follow_command}\n  end it:    {job.stop_command}", err=True)
        return
    raise typer.Exit(_followed(job))


def _followed(job: Any) -> int:
    from densenet_dist.cluster.submit import exit_code, follow, stop

    try:
        details = follow(job, _show)
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        if not _wants_it_ended(number):
            typer.echo(
                f"\nthe job goes on\n  follow it: {job.follow_command}\n  end it:    {job.stop_command}", err=True
            )
            return 128 + int(number)
        stop(job)
        details = follow(job, lambda piece: None)
    code = exit_code(details)
    said = f": {details.message.partition(', last available logs')[0]}" if code and details.message else ""
    typer.echo(f"job {job.id} {details.status.value.lower()}{said}", err=True)
    return code


def _wants_it_ended(number: int) -> bool:
    # Without a terminal nobody can be asked, and what trains may have cost hours.
    if number != signal.SIGINT or not sys.stdin.isatty():
        return False
    try:
        return typer.confirm("\nend the job too? (it can go on later from its last checkpoint)", err=True)
    except (KeyboardInterrupt, typer.Abort):
        return False


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()

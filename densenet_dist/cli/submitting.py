"""``densenet-dist submit``: run a command on a remote Ray cluster."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from densenet_dist.cli.options import Debug, local_path, status
from densenet_dist.cli.training import raise_interrupt
from densenet_dist.credentials import without_credentials

if TYPE_CHECKING:
    from densenet_dist.cluster.submit import Job


def submit(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND ...",
            help="train, tune, evaluate or doctor, with its arguments; files must be in the working directory.",
        ),
    ],
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The dashboard of the cluster: http://HEAD:8265. By default RAY_API_SERVER_ADDRESS, RAY_ADDRESS or "
            "this machine.",
        ),
    ] = None,
    working_dir: Annotated[
        Path,
        typer.Option(
            metavar="DIRECTORY", parser=local_path, help="The folder to upload, without data, runs and .venv."
        ),
    ] = Path(),
    wait: Annotated[bool, typer.Option(help="Show the output until the job ends.")] = True,
    debug: Debug = False,
) -> None:
    """Run a command as a job on a Ray cluster, show its output, and exit with its exit code.

    The options of submit come first, then the command. After Ctrl-C the job continues.

    densenet-dist submit --address http://HEAD:8265 train configs/cifar10_notebook.yaml storage=s3://bucket/runs
    densenet-dist submit tune configs/sweep_cifar10.yaml storage=/shared/runs name=wide
    densenet-dist submit train --resume /shared/runs/k24
    """
    from densenet_dist.cluster.signals import handled_by

    job = None
    with handled_by(raise_interrupt):
        try:
            with status("checking the command"):
                from densenet_dist.cluster.submit import prepare, send

                job = prepare(arguments, working_dir, address)
            send(job)
            typer.echo(f"job {job.id} on {without_credentials(job.address)}", err=True)
            if not wait:
                _show_commands(job)
                raise typer.Exit(0)
            code = _follow(job)
        except KeyboardInterrupt as interrupt:
            if job is not None:
                typer.echo("\nthe job may still be running", err=True)
                _show_commands(job)
            code = 128 + interrupt.args[0]
    raise typer.Exit(code)


def _follow(job: Job) -> int:
    """Show the output of the job until it ends; return its exit code."""
    from densenet_dist.cluster.submit import exit_code, follow

    details = follow(job, partial(print, end="", flush=True))
    code = exit_code(details)
    message = f": {details.message.partition(', last available logs')[0]}" if code and details.message else ""
    typer.echo(f"job {job.id} {details.status.value.lower()}{message}", err=True)
    return code


def _show_commands(job: Job) -> None:
    typer.echo(f"  follow it: {job.command('logs --follow')}\n  stop it:   {job.command('stop')}", err=True)

"""``densenet-dist submit``: a command that runs on a cluster elsewhere, as if it ran here."""

from __future__ import annotations

import concurrent.futures
import signal
import sys
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from densenet_dist.cli.options import Debug
from densenet_dist.credentials import without_credentials

if TYPE_CHECKING:
    from densenet_dist.cluster.submit import Interrupts, Job

_ANSWER_S = 10.0


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
    from densenet_dist.cluster.signals import NUMBERS, handled_by
    from densenet_dist.cluster.submit import Interrupts, prepare

    job, interrupts = None, Interrupts()
    with handled_by(interrupts.hear):
        try:
            prepared = prepare(arguments, working_dir, address)
            interrupts.check()
            job = prepared
            code = _run(job, wait, interrupts)
        except KeyboardInterrupt:  # before the job was sent, or a second one
            for number in NUMBERS:
                signal.signal(number, signal.SIG_IGN)
            if job is not None:
                _show_commands(job, "\nthe job may go on")
            code = 128 + interrupts.number
    raise typer.Exit(code)


def _run(job: Job, wait: bool, interrupts: Interrupts) -> int:
    from densenet_dist.cluster.submit import exit_code, follow, in_thread, send

    sending: Future[None] = Future()
    try:
        interrupts.wait(in_thread(lambda: send(job), sending))
        typer.echo(f"job {job.id} on {without_credentials(job.address)}", err=True)
        if not wait:
            _show_commands(job)
            return 0
        details = follow(job, partial(print, end="", flush=True), interrupts)
    except KeyboardInterrupt:
        details = _interrupted(job, sending, interrupts)
        if details is None:
            return 128 + interrupts.number
    code = exit_code(details)
    said = f": {details.message.partition(', last available logs')[0]}" if code and details.message else ""
    typer.echo(f"job {job.id} {details.status.value.lower()}{said}", err=True)
    return code


def _interrupted(job: Job, sending: Future[None], interrupts: Interrupts) -> Any:
    """End the job if the user wants it; what it ended with, or None where it goes on."""
    from densenet_dist.cluster.submit import follow, in_thread, stop

    interrupts.handled()
    number = interrupts.number
    if not sending.done():
        typer.echo("\nwaiting for the cluster's answer, whether it has taken the job", err=True)
        concurrent.futures.wait([sending], timeout=_ANSWER_S)
    if not sending.done():
        _show_commands(job, "\nit is not known whether the cluster has taken the job")
        return None
    sending.result()
    if not _wants_it_ended(number):
        interrupts.check()
        _show_commands(job, "\nthe job goes on")
        return None
    interrupts.wait(in_thread(lambda: stop(job)))
    return follow(job, lambda piece: None, interrupts)


def _show_commands(job: Job, title: str | None = None) -> None:
    if title is not None:
        typer.echo(title, err=True)
    typer.echo(f"  follow it: {job.follow_command}\n  end it:    {job.stop_command}", err=True)


def _wants_it_ended(number: int) -> bool:
    # Without a terminal nobody can be asked, and what trains may have cost hours.
    if number != signal.SIGINT or not sys.stdin.isatty():
        return False
    try:
        return typer.confirm("\nend the job too? (it can go on later from its last checkpoint)", err=True)
    except typer.Abort:  # Ctrl-C again, or Ctrl-D
        return False

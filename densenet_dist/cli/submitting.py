"""``densenet-dist submit``: run a command on a remote Ray cluster."""

from __future__ import annotations

import signal
import sys
import threading
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from densenet_dist.cli.options import Debug, local_path, status
from densenet_dist.cli.training import SignalInterrupt
from densenet_dist.credentials import without_credentials

if TYPE_CHECKING:
    from densenet_dist.cluster.submit import Job

_RESPONSE_TIMEOUT_S = 10.0
_AGAIN_S = 0.5


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

    The options of submit come first, then the command. Ctrl-C asks whether to stop the job.

    densenet-dist submit --address http://HEAD:8265 train configs/cifar10_notebook.yaml storage=s3://bucket/runs
    densenet-dist submit tune configs/sweep_cifar10.yaml storage=/shared/runs name=wide
    densenet-dist submit train --resume /shared/runs/k24
    """
    from densenet_dist.cluster.signals import NUMBERS, handled_by

    job = None
    with handled_by(_interrupt):
        try:
            with status("checking the command"):
                from densenet_dist.cluster.submit import prepare

                job = prepare(arguments, working_dir, address)
            code = _run(job, wait)
        except KeyboardInterrupt as interrupt:  # before the job was sent, or a second one
            for number in (*NUMBERS, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)
            if job is not None:
                _show_commands(job, "\nthe job may still be running")
            code = 128 + interrupt.args[0]
    raise typer.Exit(code)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Raise SignalInterrupt, and again in half a second unless `_interrupted` handles it.

    Python drops an exception that is raised in a destructor, such as that of a socket.
    """
    signal.signal(signal.SIGALRM, lambda alarm, frame: _interrupt(number, frame))
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
    raise SignalInterrupt(number)


def _run(job: Job, wait: bool) -> int:
    from densenet_dist.cluster.submit import exit_code, follow

    sending: Future[None] = Future()
    try:
        _send_in_thread(job, sending)
        sending.result()
        typer.echo(f"job {job.id} on {without_credentials(job.address)}", err=True)
        if not wait:
            _show_commands(job)
            return 0
        details = follow(job, partial(print, end="", flush=True))
    except KeyboardInterrupt as interrupt:
        number: int = interrupt.args[0]
        details = _interrupted(job, sending, number)
        if details is None:
            return 128 + number
    code = exit_code(details)
    message = f": {details.message.partition(', last available logs')[0]}" if code and details.message else ""
    typer.echo(f"job {job.id} {details.status.value.lower()}{message}", err=True)
    return code


def _send_in_thread(job: Job, sending: Future[None]) -> None:
    """Submit the job in a thread, so that after an interrupt the cluster's confirmation can still be waited for."""
    from densenet_dist.cluster.submit import send

    def run() -> None:
        try:
            send(job)
            sending.set_result(None)
        except BaseException as error:
            sending.set_exception(error)

    threading.Thread(target=run, name="submit", daemon=True).start()  # must not keep the process alive


def _interrupted(job: Job, sending: Future[None], number: int) -> Any:
    """Stop the job if the user confirms; return its final details, or None if it continues."""
    from densenet_dist.cluster.submit import follow, stop

    signal.setitimer(signal.ITIMER_REAL, 0)
    if not sending.done():
        typer.echo("\nwaiting for the cluster to confirm the job", err=True)
    try:
        sending.result(_RESPONSE_TIMEOUT_S)
    except TimeoutError:
        _show_commands(job, "\nthe cluster has not confirmed the job, which may be running")
        return None
    if not _confirms_stop(number):
        _show_commands(job, "\nthe job continues")
        return None
    stop(job)
    return follow(job, lambda piece: None)


def _show_commands(job: Job, title: str | None = None) -> None:
    if title is not None:
        typer.echo(title, err=True)
    typer.echo(f"  follow it: {job.command('logs --follow')}\n  stop it:   {job.command('stop')}", err=True)


def _confirms_stop(number: int) -> bool:
    # Without a terminal nobody can confirm, and the job may have trained for hours.
    if number != signal.SIGINT or not sys.stdin.isatty():
        return False
    try:
        return typer.confirm("\nstop the job too? (it can be resumed from its last checkpoint)", err=True)
    except typer.Abort:  # Ctrl-C again, or Ctrl-D
        return False

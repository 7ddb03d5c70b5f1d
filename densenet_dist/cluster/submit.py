"""A command as a job of a Ray cluster that is elsewhere: the folder is sent with it, its output followed to the end."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from densenet_dist import bundled
from densenet_dist.cluster.launch import check_model, require_lasting
from densenet_dist.config import held_credentials, load_config
from densenet_dist.errors import ConfigError, EnvironmentProblem
from densenet_dist.schema import Config
from densenet_dist.sweep.definition import load_sweep

COMMANDS = ("train", "tune", "evaluate", "doctor")
EXCLUDED = (
    *("/data/", "/runs/", ".venv/", ".git/", "__pycache__/", "*.pyc"),
    *(".env", ".env.*", ".netrc", ".aws/", ".ssh/", "*.pem", "*.key"),  # whoever reaches the cluster can read the job
)
_OUR_CODES = range(1, 7)
_AGENT_S = 60.0
_LOST_S = 120.0


@dataclass(frozen=True)
class Job:
    """A job that a cluster has taken.

    Attributes:
        id: its submission id.
        address: of the cluster's dashboard.
    """

    id: str
    address: str

    @property
    def follow_command(self) -> str:
        """What shows its output again."""
        return f"ray job logs --follow --address {shlex.quote(self.address)} {self.id}"

    @property
    def stop_command(self) -> str:
        """What ends it."""
        return f"ray job stop --address {shlex.quote(self.address)} {self.id}"


def submit(arguments: Sequence[str], folder: Path, address: str | None = None) -> Job:
    """Check a command as far as that can be done here, and send it with the folder it is to run in.

    Args:
        arguments: of ``densenet-dist``, the subcommand first (one of `COMMANDS`).
        folder: becomes the job's working directory, without what .gitignore, .rayignore and `EXCLUDED` name.
        address: of the cluster's dashboard, such as ``http://HEAD:8265``; by default what RAY_API_SERVER_ADDRESS or
            RAY_ADDRESS says, else this machine's.

    Raises:
        ConfigError: where the command cannot work, or could lose what it makes.
        EnvironmentProblem: where the cluster cannot be reached, or does not take the job.
    """
    sent, name = _prepared(list(arguments), folder)
    client, address = _client(address)
    job = Job(f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}", address)
    runtime_env = {"working_dir": str(folder), "excludes": list(EXCLUDED)}
    entrypoint = shlex.join(["python", "-m", "densenet_dist", *sent])
    deadline = time.monotonic() + _AGENT_S
    while True:
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=job.id, runtime_env=runtime_env)
            return job
        except Exception as error:  # RuntimeError, and what requests and Ray's packing raise
            # A cluster takes no jobs in the first seconds in which it answers.
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise EnvironmentProblem(f"{address} does not take the job: {_last_line(error)}") from error
        time.sleep(1)


def follow(job: Job, write: Callable[[str], object]) -> Any:
    """Pass a job's output on until it ends, through lost connections.

    Args:
        job: from `submit`.
        write: is given pieces of text as they come.

    Returns:
        Ray's JobDetails: ``status``, ``message``, ``driver_exit_code``.

    Raises:
        EnvironmentProblem: where the cluster has not answered for two minutes.
    """
    client, _ = _client(job.address)
    return asyncio.run(_follow(client, job, write))


def stop(job: Job) -> None:
    """Ask a job to end; `follow` shows how it does."""
    _client(job.address)[0].stop_job(job.id)


def exit_code(details: Any) -> int:
    """What `densenet-dist` would have ended with, had it run here: 130 where the job was stopped.

    Ray's own command ends with 0 for a job that was stopped, and with 1 whatever made it fail.
    """
    status = details.status.value
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return 128 + signal.SIGINT
    code = details.driver_exit_code
    return int(code) if code in (*_OUR_CODES, 128 + signal.SIGINT, 128 + signal.SIGTERM) else 1


def _prepared(arguments: list[str], folder: Path) -> tuple[list[str], str]:
    """The arguments as they hold in the job's working directory, and a name for the job."""
    if not arguments or arguments[0] not in COMMANDS:
        raise ConfigError(f"say what the cluster is to run: {', '.join(COMMANDS)}, and what follows it")
    for argument in arguments:
        key, _, value = (
            argument.rpartition("=") if "=" in argument.partition("://")[0] else ("an argument", "", argument)
        )
        if problem := next(held_credentials(**{key: value}), None):
            raise ConfigError(f"{problem}\n  a cluster shows the command lines of its jobs")
    command, rest = arguments[0], [_inside(argument, folder) for argument in arguments[1:]]
    if command not in ("train", "tune") or any(argument.startswith("--resume") for argument in rest):
        return [command, *rest], f"densenet-{command}"  # of a run that lies there
    sources = [str(folder / source) if _is_file(source) else source for source in rest if not source.startswith("-")]
    if not sources:
        raise ConfigError(f"name a configuration for {command}, such as configs/quickstart.yaml")
    if command == "train":
        return [command, *rest], _checked(load_config(*sources))
    sweep = load_sweep(*sources)
    _checked(sweep.config(sweep.settings.name, {}, storage=sweep.settings.storage))
    return [command, *rest], sweep.settings.name


def _checked(config: Config) -> str:
    check_model(config)
    require_lasting(config.storage)
    return config.name


def _is_file(argument: str) -> bool:
    return Path(argument).suffix in (".yaml", ".yml") and "=" not in argument and "://" not in argument


def _inside(argument: str, folder: Path) -> str:
    if not _is_file(argument):
        return argument
    path = Path(argument).absolute()
    if not path.is_file() and bundled.find(argument).is_file():
        return bundled.find(argument).stem  # the cluster has the package, and what comes with it
    if not path.is_file():
        raise ConfigError(f"there is no file {argument}")
    try:
        return str(path.relative_to(folder.absolute()))
    except ValueError:
        raise ConfigError(
            f"{argument} is not in {folder}, which is what the cluster gets\n  name a folder that has it: --working-dir"
        ) from None


def _client(address: str | None) -> tuple[Any, str]:
    from ray.job_submission import JobSubmissionClient

    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    where = where or "http://127.0.0.1:8265"
    try:
        client = JobSubmissionClient(where)
    except Exception as error:  # ConnectionError, AuthenticationError, and what requests raises
        raise EnvironmentProblem(
            f"there is no Ray cluster at {where}: {_last_line(error)}\n"
            "  give its dashboard's address with --address or RAY_API_SERVER_ADDRESS, and its token with RAY_AUTH_TOKEN"
        ) from error
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)  # else it tells what it packs and leaves out, file by file
    return client, where


async def _follow(client: Any, job: Job, write: Callable[[str], object]) -> Any:
    shown, answered = 0, time.monotonic()
    while True:
        try:
            passed = 0  # every connection begins with the first line
            async for piece in client.tail_job_logs(job.id):
                _heed_interrupts()
                write(piece[max(0, shown - passed) :])
                passed += len(piece)
                shown, answered = max(shown, passed), time.monotonic()
            details = await asyncio.to_thread(client.get_job_info, job.id)
            answered = time.monotonic()
            if details.status.is_terminal():
                return details
        except Exception as error:  # of aiohttp, requests and Ray: the connection, or the head for a moment
            if time.monotonic() - answered > _LOST_S:
                raise EnvironmentProblem(
                    f"{job.address} does not answer any more: {_last_line(error)}\n"
                    f"  the job may go on; see what it says with: {job.follow_command}"
                ) from error
        _heed_interrupts()
        await asyncio.sleep(0.5)


def _heed_interrupts() -> None:
    """Ctrl-C cancels the task that follows; what runs in it may have taken that for a matter of its own connection."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

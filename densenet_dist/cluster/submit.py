"""Run a command as a job on a remote Ray cluster: upload the folder, follow the output, return the exit code."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from densenet_dist.cluster.connection import EXCLUDED
from densenet_dist.cluster.launch import require_permanent
from densenet_dist.cluster.signals import HANDLED_SIGNALS
from densenet_dist.config import load_config
from densenet_dist.credentials import held_credentials, without_credentials
from densenet_dist.errors import ConfigError, EnvironmentProblem
from densenet_dist.sweep.definition import find_base, load_sweep
from densenet_dist.train.preflight import check_run
from densenet_dist.yaml_settings import BUNDLED, find_file, read_yaml

COMMANDS = ("train", "tune", "evaluate", "doctor")
_EXIT_CODES = (*range(1, 7), *(128 + number for number in HANDLED_SIGNALS))
_START_TIMEOUT_S = 60.0
_LOST_TIMEOUT_S = 120.0
_RESPONSE_TIMEOUT_S = 30.0
_POLL_S = 0.5
_CHARACTERS_PER_S = 100_000
"""Each request returns the whole output, so long output is requested less often."""
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


@dataclass(frozen=True)
class Job:
    """A command line to run on the cluster whose dashboard has this address, in a copy of a folder."""

    id: str
    address: str
    entrypoint: str
    folder: str

    def command(self, verb: str) -> str:
        """Return Ray's command for the job: ``logs --follow`` or ``stop``."""
        return f"ray job {verb} --address {shlex.quote(without_credentials(self.address))} {self.id}"


def prepare(arguments: Sequence[str], folder: Path, address: str | None = None) -> Job:
    """Check a command on this machine, and return it as a job.

    Args:
        arguments: of ``densenet-dist``, starting with the subcommand (one of `COMMANDS`).
        folder: the job's working directory; files listed in .gitignore, .rayignore and `EXCLUDED` are not uploaded.
        address: URL of the cluster's dashboard, such as ``http://HEAD:8265``; by default RAY_API_SERVER_ADDRESS or
            RAY_ADDRESS, else this machine's.

    Raises:
        ConfigError: the command is wrong, or its results would be lost with the job.
    """
    if not folder.is_dir():
        raise ConfigError(f"--working-dir: there is no folder {folder}")
    sent, name = _checked_command(list(arguments), folder)
    if address:  # Ray's client would prefer the variables
        for variable in _ADDRESS_VARIABLES:
            os.environ.pop(variable, None)
    else:
        address = next(filter(None, map(os.environ.get, _ADDRESS_VARIABLES)), None)
    return Job(
        id=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
        address=address or "http://127.0.0.1:8265",
        entrypoint=shlex.join(["python", "-m", "densenet_dist", *sent]),
        folder=str(folder),
    )


def send(job: Job) -> None:
    """Submit a job.

    Raises:
        EnvironmentProblem: the cluster cannot be reached, or does not accept the job.
    """
    client = _client(job.address)
    runtime_env = {"working_dir": job.folder, "excludes": list(EXCLUDED)}
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            client.submit_job(entrypoint=job.entrypoint, submission_id=job.id, runtime_env=runtime_env)
            return
        except Exception as error:  # RuntimeError, and errors of requests and of Ray's packaging
            # A cluster that is starting responds before it accepts jobs.
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise EnvironmentProblem(f"{job.address} does not accept the job: {_last_line(error)}") from error
        time.sleep(1)


def follow(job: Job, write: Callable[[str], object]) -> Any:
    """Write the output of a job until it ends, and return Ray's JobDetails; lost connections are retried.

    Raises:
        EnvironmentProblem: the cluster has not responded for two minutes.
    """
    client = _client(job.address)
    shown, responded = 0, time.monotonic()
    while True:
        try:
            details = client.get_job_info(job.id)  # before the output, so that the output of an ended job is complete
            text = client.get_job_logs(job.id)
        except Exception as error:  # a lost connection, or a cluster that is busy
            if time.monotonic() - responded > _LOST_TIMEOUT_S:
                raise EnvironmentProblem(
                    f"{job.address} does not respond any more: {_last_line(error)}\n"
                    f"  the job may still be running; show its output with: {job.command('logs --follow')}"
                ) from error
        else:
            responded = time.monotonic()
            write(text[shown:])
            shown = max(shown, len(text))
            if details.status.is_terminal():
                return details
        time.sleep(max(_POLL_S, shown / _CHARACTERS_PER_S))


def exit_code(details: Any) -> int:
    """Return the exit code of the job's `densenet-dist` command; 130 if the job was stopped.

    Ray's own command returns 0 for a stopped job, and 1 for every failure.
    """
    status = details.status.value
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return 128 + signal.SIGINT
    code = details.driver_exit_code
    return int(code) if code in _EXIT_CODES else 1


def _checked_command(arguments: list[str], folder: Path) -> tuple[list[str], str]:
    """Return the arguments with paths relative to the working directory, and a name for the job."""
    if not arguments or arguments[0] not in COMMANDS:
        raise ConfigError(f"the command to run is missing: {', '.join(COMMANDS)}, and its arguments")
    for argument in arguments:
        key = argument.partition("=")[0]
        if problem := next(held_credentials("an argument" if "://" in key else key, argument), None):
            raise ConfigError(f"{problem}\n  a cluster shows the command lines of its jobs")
    command, rest = arguments[0], [_relative(argument, folder) for argument in arguments[1:]]
    if command not in ("train", "tune") or any(argument.startswith(("--resume", "--from")) for argument in rest):
        return [command, *rest], f"densenet-{command}"  # the run is on the cluster
    sources = [str(folder / source) if _is_file(source) else source for source in rest if not source.startswith("-")]
    if not sources:
        raise ConfigError(f"{command} needs a configuration, such as configs/quickstart.yaml")
    trust = "--trust" in rest or None
    if command == "train":
        config = load_config(*sources, trust=trust)
    else:
        sweep = load_sweep(*sources, trust=trust)
        for source in filter(_is_file, sources):
            base = find_base(Path(source), str(read_yaml(Path(source)).get("base", "")))
            if base.is_file() and not base.is_relative_to(BUNDLED):
                _relative(str(base), folder)
        config = sweep.config(sweep.settings.name, {}, storage=sweep.settings.storage)
    check_run(config)
    require_permanent(config.storage)
    return [command, *rest], config.name


def _is_file(argument: str) -> bool:
    return Path(argument).suffix in (".yaml", ".yml") and "=" not in argument and "://" not in argument


def _relative(argument: str, folder: Path) -> str:
    if not _is_file(argument):
        return argument
    path = Path(os.path.abspath(argument))  # without .., which relative_to would accept
    if not path.is_file() and find_file(argument).is_file():
        return find_file(argument).stem  # part of the package, which the cluster has
    if not path.is_file():
        raise ConfigError(f"there is no file {argument}")
    try:
        return str(path.relative_to(folder.absolute()))
    except ValueError:
        raise ConfigError(
            f"{argument} is not in the folder to upload, {folder}\n  use a folder that contains it: --working-dir"
        ) from None


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]  # Ray's classes are untyped
        def _do_request(self, method: str, endpoint: str, **given: Any) -> Any:
            timeout_s = None if method == "PUT" else _RESPONSE_TIMEOUT_S  # an upload may take long
            return super()._do_request(method, endpoint, timeout=timeout_s, **given)

    try:
        client = Client(address)
    except Exception as error:  # ConnectionError, AuthenticationError, and errors of requests
        raise EnvironmentProblem(
            f"there is no Ray cluster at {address}: {_last_line(error)}\n"
            "  set the dashboard's address, http://HEAD:8265, with --address, RAY_API_SERVER_ADDRESS or RAY_ADDRESS, "
            "and its token with RAY_AUTH_TOKEN; requests also follow http_proxy and no_proxy"
        ) from error
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)  # else it lists every file that it packs
    return client


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

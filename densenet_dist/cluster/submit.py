"""A command as a job of a Ray cluster that is elsewhere: the folder is sent with it, its output followed to the end."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from densenet_dist import bundled
from densenet_dist.cluster.launch import require_lasting
from densenet_dist.cluster.signals import NUMBERS
from densenet_dist.config import load_config
from densenet_dist.credentials import held_credentials, without_credentials
from densenet_dist.errors import ConfigError, EnvironmentProblem
from densenet_dist.schema import Config
from densenet_dist.sweep.definition import load_sweep
from densenet_dist.train.checks import check_run

COMMANDS = ("train", "tune", "evaluate", "doctor")
EXCLUDED = (
    *("/data/", "/runs/", ".venv/", ".git/", "__pycache__/", "*.pyc"),
    *(".env", ".env.*", ".netrc", ".aws/", ".ssh/", "*.pem", "*.key"),  # whoever reaches the cluster can read the job
)
_OUR_CODES = range(1, 7)
_AGENT_S = 60.0
_LOST_S = 120.0
_ANSWER_S = 30.0
_LETTERS_PER_S = 100_000
"""Of output, which every request brings as a whole: longer output is asked for less often."""
_CHECK_S = 0.5
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """A job for a Ray cluster.

    Attributes:
        id: its submission id.
        address: of the cluster's dashboard.
        entrypoint: its command line.
        folder: the folder that it runs in.
    """

    id: str
    address: str
    entrypoint: str = ""
    folder: str = ""

    @property
    def follow_command(self) -> str:
        """What shows its output again."""
        return f"ray job logs --follow --address {shlex.quote(without_credentials(self.address))} {self.id}"

    @property
    def stop_command(self) -> str:
        """What ends it."""
        return f"ray job stop --address {shlex.quote(without_credentials(self.address))} {self.id}"


class Interrupts:
    """SIGINT, SIGTERM and SIGHUP for a command whose main thread only waits.

    A signal raises KeyboardInterrupt in the main thread. Python drops an exception that is raised in a destructor or a
    callback from C, and an import may catch it; then the next `check` raises it again, within half a second.

    Attributes:
        number: the signal that came last.
    """

    def __init__(self) -> None:
        self.number = int(signal.SIGINT)
        self._pending = False

    def hear(self, number: int, frame: FrameType | None) -> NoReturn:
        """The handler of all of them."""
        self.number, self._pending = number, True
        raise KeyboardInterrupt(number)

    def handled(self) -> None:
        """Forget the signal that came: the next one is a new one."""
        self._pending = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came that nobody has handled."""
        if self._pending:
            raise KeyboardInterrupt(self.number)

    def wait(self, work: Future[T]) -> T:
        """Wait for the result of a thread."""
        while not work.done():
            self.check()
            wait([work], timeout=_CHECK_S)
        return work.result()


def in_thread(work: Callable[[], T], result: Future[T] | None = None) -> Future[T]:
    """Call a function in a thread that does not keep the process alive, whatever it waits for."""
    result = result or Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="submit", daemon=True).start()
    return result


def prepare(arguments: Sequence[str], folder: Path, address: str | None = None) -> Job:
    """Check a command as far as that can be done here.

    Args:
        arguments: of ``densenet-dist``, the subcommand first (one of `COMMANDS`).
        folder: becomes the job's working directory, without what .gitignore, .rayignore and `EXCLUDED` name.
        address: of the cluster's dashboard, such as ``http://HEAD:8265``; by default what RAY_API_SERVER_ADDRESS or
            RAY_ADDRESS says, else this machine's.

    Raises:
        ConfigError: where the command cannot work, or could lose what it makes.
    """
    import ray.job_submission  # noqa: F401  # here, since no thread may be in the middle of it when the process ends

    sent, name = _prepared(list(arguments), folder)
    address = address or next(filter(None, map(os.environ.get, _ADDRESS_VARIABLES)), None)
    return Job(
        id=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
        address=address or "http://127.0.0.1:8265",
        entrypoint=shlex.join(["python", "-m", "densenet_dist", *sent]),
        folder=str(folder),
    )


def send(job: Job) -> None:
    """Have the cluster start a job.

    Raises:
        EnvironmentProblem: where the cluster cannot be reached, or does not take the job.
    """
    client = _client(job.address)
    runtime_env = {"working_dir": job.folder, "excludes": list(EXCLUDED)}
    deadline = time.monotonic() + _AGENT_S
    while True:
        try:
            client.submit_job(entrypoint=job.entrypoint, submission_id=job.id, runtime_env=runtime_env)
            return
        except Exception as error:  # RuntimeError, and what requests and Ray's packing raise
            # A cluster takes no jobs in the first seconds in which it answers.
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise EnvironmentProblem(f"{job.address} does not take the job: {_last_line(error)}") from error
        time.sleep(1)


def follow(job: Job, write: Callable[[str], object], interrupts: Interrupts) -> Any:
    """Pass a job's output on until it ends, through lost connections.

    Args:
        job: that was sent.
        write: is given pieces of text as they come.
        interrupts: end the following.

    Returns:
        Ray's JobDetails: ``status``, ``message``, ``driver_exit_code``.

    Raises:
        EnvironmentProblem: where the cluster has not answered for two minutes.
        KeyboardInterrupt: a signal came.
    """
    client = _client(job.address)
    shown, answered = 0, time.monotonic()
    while True:
        interrupts.check()
        try:
            details = client.get_job_info(job.id)  # before its output, so that the last lines come with its end
            text = client.get_job_logs(job.id)
        except Exception as error:  # the connection, or the head for a moment
            if time.monotonic() - answered > _LOST_S:
                raise EnvironmentProblem(
                    f"{job.address} does not answer any more: {_last_line(error)}\n"
                    f"  the job may go on; see what it says with: {job.follow_command}"
                ) from error
        else:
            answered = time.monotonic()
            write(text[shown:])
            shown = max(shown, len(text))
            if details.status.is_terminal():
                return details
        time.sleep(max(_CHECK_S, shown / _LETTERS_PER_S))


def stop(job: Job) -> None:
    """Ask a job to end, until the cluster says that it has asked it or that it has ended; `follow` shows how it ends.

    Raises:
        EnvironmentProblem: where the cluster has not answered for two minutes.
    """
    answered = time.monotonic()
    while True:
        try:
            client = _client(job.address)
            if client.stop_job(job.id) or client.get_job_info(job.id).status.is_terminal():
                return
            answered = time.monotonic()  # it has not started yet
        except Exception as error:
            if time.monotonic() - answered > _LOST_S:
                raise EnvironmentProblem(
                    f"{job.address} does not end the job: {_last_line(error)}\n  try again: {job.stop_command}"
                ) from error
        time.sleep(_CHECK_S)


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
    return int(code) if code in (*_OUR_CODES, *(128 + number for number in NUMBERS)) else 1


def _prepared(arguments: list[str], folder: Path) -> tuple[list[str], str]:
    """The arguments as they hold in the job's working directory, and a name for the job."""
    if not arguments or arguments[0] not in COMMANDS:
        raise ConfigError(f"say what the cluster is to run: {', '.join(COMMANDS)}, and what follows it")
    for argument in arguments:
        key = argument.partition("=")[0]
        if problem := next(held_credentials("an argument" if "://" in key else key, argument), None):
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
    check_run(config)
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


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]  # Ray's classes are untyped
        def _do_request(self, method: str, endpoint: str, **given: Any) -> Any:
            timeout_s = None if method == "PUT" else _ANSWER_S  # an upload may take long
            return super()._do_request(method, endpoint, timeout=timeout_s, **given)

    try:
        client = Client(address)
    except Exception as error:  # ConnectionError, AuthenticationError, and what requests raises
        raise EnvironmentProblem(
            f"there is no Ray cluster at {address}: {_last_line(error)}\n"
            "  give its dashboard's address with --address or RAY_API_SERVER_ADDRESS, and its token with RAY_AUTH_TOKEN"
            + "".join(f"\n  {hint}" for hint in _hints(address))
        ) from error
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.ERROR)  # else it tells what it packs and leaves out, file by file
    return client


def _hints(address: str) -> Iterator[str]:
    """Say which variables have led to an address and away from it."""
    for name in _ADDRESS_VARIABLES:
        if os.environ.get(name) == address:
            yield f"the address comes from {name}"
    if address.startswith("ray://"):
        yield "ray:// is the port of Ray Client; the dashboard of the same cluster is http://HEAD:8265"
    parts = urlsplit(address if "://" in address else f"http://{address}")
    for kind in (parts.scheme, "all"):
        if kind in getproxies() and not proxy_bypass(parts.hostname or ""):
            yield f"{kind}_proxy sends requests through a proxy; without it: no_proxy={parts.hostname}"


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

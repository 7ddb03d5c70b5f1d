"""Send the records of metrics.jsonl to W&B or MLflow from a background thread, so that no run waits for a server.

Records are sent in order. If a server does not respond, the run continues, a warning is given once, and the tracker
retries at the next record. The position and the service's run id are stored in the run's folder, so that a resumed run
continues there. Keys and passwords come from the environment and are never written. The packages of the services are
imported in the sending thread.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import queue
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from pydantic import Field

from densenet_dist.config import to_dict
from densenet_dist.credentials import without_credentials
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.run_folder import TRIAL_FILE, RunFolder, split_location
from densenet_dist.schema import Config
from densenet_dist.yaml_settings import flatten

_MAX_MESSAGE: Final = 300
_FINISH_TIMEOUT_S: Final = 30.0
"""How long a finished run waits for its last records to be sent."""
_ABORT_TIMEOUT_S: Final = 5.0
"""The same for a run that was stopped or failed."""
_WANDB_SETTINGS: Final[dict[str, Any]] = {
    # Send only metrics and settings: no console output, code, git state, packages, command line or machine details.
    **{"console": "off", "disable_code": True, "disable_git": True, "x_save_requirements": False},
    **{"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True},
    **{"silent": True, "init_timeout": 20, "finish_timeout": 20, "reinit": "create_new"},
}
_MLFLOW_DEFAULTS: Final = {
    # MLflow's defaults are a timeout of two minutes and seven retries with backoff.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_MLFLOW_STATUS: Final = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_MLFLOW_MAX_VALUE: Final = 500

Record: TypeAlias = dict[str, Any]
Status: TypeAlias = Literal["finished", "stopped", "failed"]


@dataclass
class _State:
    """The file of a tracker in the run's folder: the service's id and address of the run, and the records sent."""

    id: str | None = None
    url: str | None = None
    sent: Annotated[int, Field(ge=0)] = 0


class Tracker(ABC):
    """Sends a run's records to one service. The abstract methods run in its own thread and may raise any exception.

    Args:
        config: of the run.
        run: the run's folder.
        records: the records that the run already has.

    Attributes:
        name: of the service, in messages.
        module: the name of its Python module and of its settings in ``log``.
        package: what to install.
        file: where the state is stored in the run's folder.
    """

    name: ClassVar[str]
    module: ClassVar[str]
    package: ClassVar[str]
    file: ClassVar[str]

    def __init__(self, config: Config, run: RunFolder, records: Sequence[Record]) -> None:
        self._config, self._run = config, run
        # The sweep that the run is a trial of.
        self._sweep = split_location(config.storage)[1] if run.exists(TRIAL_FILE) else None
        self._records = list(records)
        self._state = self.read_state(run)
        self._state.sent = min(self._state.sent, len(records))  # epochs that are repeated are sent again
        self._connected = self._warned = self._detached = False
        self._last: tuple[Status, Record] | None = None
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._wake.set()
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._thread.start()

    @classmethod
    def read_state(cls, run: RunFolder) -> _State:
        """Read the state from the run's folder; a new one if there is none or it is damaged."""
        return run.read(cls.file, _State, strict=False) or _State()

    def add(self, record: Record) -> None:
        """Queue a record."""
        self._records.append(record)
        self._wake.set()

    def messages(self) -> Iterator[str]:
        """Yield the messages for the user since the last call."""
        while not self._messages.empty():
            yield self._messages.get()

    def finish(self, status: Status, summary: Record) -> None:
        """Send the remaining records and end the service's run, within a time limit."""
        best = {f"best/{key}": value for key, value in summary.get("best", {}).items()}
        self._last = (status, {key: value for key, value in summary.items() if key != "best"} | best)
        self._wake.set()
        self._thread.join(_FINISH_TIMEOUT_S if status == "finished" else _ABORT_TIMEOUT_S)
        if self._thread.is_alive():
            self._messages.put(f"{self.name} did not accept all records before the timeout; metrics.jsonl has them")

    def detach(self) -> None:
        """Stop sending, but leave the service's run open: the run continues in another process."""
        self._detached = True
        self._wake.set()

    @abstractmethod
    def _connect(self, run_id: str | None) -> tuple[str, str | None]:
        """Reopen the service's run `run_id`, or create one. Return its id, and where to view it if anywhere."""

    @abstractmethod
    def _send(self, record: Record) -> None:
        """Send a record of metrics.jsonl at its global step."""

    @abstractmethod
    def _end(self, status: Status, summary: Record) -> None:
        """Mark the run as ended, with summary.json, in which the best epoch's metrics are called ``best/...``."""

    def _work(self) -> None:
        while not self._detached:
            self._wake.wait()
            self._wake.clear()
            last = self._last
            try:
                self._send_new()
                if last is not None and not self._detached:
                    self._end(*last)
                self._warned = False
            except Exception as error:  # a service must not fail the run
                if not self._warned:
                    text = without_secrets(f"{type(error).__name__}: {error}".strip().splitlines()[0])
                    problem = f"{self.name} accepts no records; training continues, and they are sent later: {text}"
                    self._messages.put(problem)
                self._warned = True
            if last is not None:
                return

    def _send_new(self) -> None:
        state = self._state
        if not self._connected:
            run_id, state.url = self._connect(state.id)
            if run_id != state.id:  # new, or lost at the service
                state.id, state.sent = run_id, 0
            self._connected = True
            if state.url:
                self._messages.put(f"{self.name}: {state.url}")
        while state.sent < len(self._records) and not self._detached:
            self._send(self._records[state.sent])
            state.sent += 1
        if not self._detached:
            self._run.write(self.file, json.dumps(asdict(state)) + "\n")


class WandbTracker(Tracker):
    """A run at Weights & Biases or in its offline files; it reads WANDB_API_KEY, WANDB_MODE and WANDB_BASE_URL."""

    name, module, package, file = "W&B", "wandb", "wandb", "trackers/wb.json"

    def _connect(self, run_id: str | None) -> tuple[str, str | None]:
        import wandb

        require_wandb_key()
        settings = self._config.log.wandb
        self._session = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=self._sweep,
            job_type="trial" if self._sweep else None,
            name=self._config.name,
            id=run_id or uuid.uuid4().hex[:12],
            resume=None if _is_offline() else "allow",  # offline the same id is enough
            dir=str(self._run.path),
            config=flat_settings(self._config),
            settings=wandb.Settings(**_WANDB_SETTINGS),
        )
        self._session.define_metric("global_step")
        self._session.define_metric("*", step_metric="global_step")
        return str(self._session.id), None if _is_offline() else self._session.url

    def _send(self, record: Record) -> None:
        self._session.log({key: value for key, value in record.items() if key != "time"})

    def _end(self, status: Status, summary: Record) -> None:
        self._session.summary.update(summary)
        self._session.finish(exit_code=1 if status == "failed" else 0)
        self._run.publish("wandb")


def require_wandb_key() -> None:
    """Check that there is a key if one is needed; W&B would prompt for it on the terminal.

    Raises:
        PermissionError: there is none.
    """
    if _is_offline():
        return
    import requests

    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not (os.environ.get("WANDB_API_KEY") or requests.utils.get_netrc_auth(address)):
        raise PermissionError(
            f"no key for {address}: set WANDB_API_KEY or run 'wandb login', or set WANDB_MODE=offline"
        )


def _is_offline() -> bool:
    return os.environ.get("WANDB_MODE", "online") != "online"


class MlflowTracker(Tracker):
    """A run at an MLflow server; user and password are MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""

    name, module, package, file = "MLflow", "mlflow", "mlflow-skinny", "trackers/mlflow.json"

    def _connect(self, run_id: str | None) -> tuple[str, str | None]:
        os.environ.update({name: value for name, value in _MLFLOW_DEFAULTS.items() if name not in os.environ})
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        address = self._config.log.mlflow.tracking_uri or os.environ["MLFLOW_TRACKING_URI"]
        self._client = MlflowClient(tracking_uri=address)
        try:
            if run_id is not None and self._client.get_run(run_id).info.lifecycle_stage == "deleted":
                run_id = None
            if run_id is not None:
                self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run_id = None  # another server
        self._id = run_id or self._create()
        experiment = self._client.get_run(self._id).info.experiment_id
        base = without_secrets(address).replace("***@", "").rstrip("/")
        return self._id, f"{base}/#/experiments/{experiment}/runs/{self._id}" if base.startswith("http") else None

    def _create(self) -> str:
        from mlflow.entities import Param

        tags = {"densenet_dist.folder": self._run.uri} | ({"densenet_dist.sweep": self._sweep} if self._sweep else {})
        name = f"{self._sweep}/{self._config.name}" if self._sweep else self._config.name
        run_id = str(self._client.create_run(self._experiment(), tags=tags, run_name=name).info.run_id)
        settings = flat_settings(self._config)
        params = [Param(key, str(value)[:_MLFLOW_MAX_VALUE]) for key, value in settings.items()]
        self._client.log_batch(run_id, params=params)
        return run_id

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._config.log.mlflow.experiment
        found = self._client.get_experiment_by_name(name)
        try:
            return str(found.experiment_id if found else self._client.create_experiment(name))
        except MlflowException:  # another trial has just created it
            return str(self._client.get_experiment_by_name(name).experiment_id)

    def _send(self, record: Record) -> None:
        values = {key: value for key, value in record.items() if key not in ("time", "global_step")}
        self._log(values, record["global_step"], record["time"])

    def _end(self, status: Status, summary: Record) -> None:
        best = {key: value for key, value in summary.items() if key.startswith("best/")}
        self._log(best, summary.get("global_step", 0), time.time())
        self._client.set_terminated(self._id, _MLFLOW_STATUS[status])

    def _log(self, values: Record, step: int, seconds: float) -> None:
        from mlflow.entities import Metric

        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        stamp = round(seconds * 1000)
        metrics = [Metric(key, value, stamp, step) for key, value in numbers.items() if math.isfinite(value)]
        self._client.log_batch(self._id, metrics=metrics)


_KINDS: Final[tuple[type[Tracker], ...]] = (WandbTracker, MlflowTracker)


def _enabled(config: Config) -> list[type[Tracker]]:
    return [kind for kind in _KINDS if getattr(config.log, kind.module).enabled]


def require_trackers(config: Config) -> None:
    """Check that the packages for ``log.wandb`` and ``log.mlflow`` are installed and MLflow's server is configured.

    Raises:
        EnvironmentProblem: they are not.
    """
    for kind in _enabled(config):
        if importlib.util.find_spec(kind.module) is None:
            raise EnvironmentProblem(
                f"log.{kind.module}.enabled: the package {kind.package} is not installed here\n"
                f"  pip install {kind.package} (or densenet-dist[{kind.module}]), on all machines of a cluster"
            )
    mlflow = config.log.mlflow
    if mlflow.enabled and not (mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
        raise EnvironmentProblem(
            "log.mlflow.enabled: the address of the server is not set\n"
            "  set log.mlflow.tracking_uri=http://HOST:5000 or the environment variable MLFLOW_TRACKING_URI"
        )


def open_trackers(config: Config, run: RunFolder, records: Sequence[Record]) -> list[Tracker]:
    """Start the configured trackers; arguments and errors are those of `Tracker` and `require_trackers`."""
    require_trackers(config)
    return [kind(config, run, records) for kind in _enabled(config)]


def links(run: RunFolder) -> dict[str, str]:
    """Return where to view a run, by service, for the services that were reached and have an address."""
    addresses = {kind.name: kind.read_state(run).url for kind in _KINDS}
    return {name: url for name, url in addresses.items() if url is not None}


def without_secrets(text: str) -> str:
    """Mask the credentials of addresses and the keys of the services, and shorten the text."""
    text = without_credentials(text)
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        if os.environ.get(name):
            text = text.replace(os.environ[name], "***")
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}..."


def flat_settings(config: Config) -> dict[str, Any]:
    """Return the settings of a run that are not None, by dotted key."""
    return {key: value for key, value in flatten(to_dict(config)).items() if value is not None}

"""Send the records of metrics.jsonl to W&B or MLflow from a background thread, so that no run waits for a server.

Records are sent in order. If a server does not respond, the run continues, a warning is given once, and the tracker
retries at the next record. The position and the service's run id are stored in the run's folder, so that a resumed run
continues there. Keys and passwords come from the environment and are never written.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import threading
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

WANDB: Final = "W&B"
MLFLOW: Final = "MLflow"
_PACKAGES: Final = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
_STATE_FILES: Final = {WANDB: "trackers/wb.json", MLFLOW: "trackers/mlflow.json"}
_MAX_MESSAGE: Final = 300
_FINISH_TIMEOUT_S: Final = 30.0
"""How long a finished run waits for its last records to be sent."""
_ABORT_TIMEOUT_S: Final = 5.0
"""The same for a run that was stopped or failed."""

Record: TypeAlias = dict[str, Any]
Status: TypeAlias = Literal["finished", "stopped", "failed"]


@dataclass
class _State:
    """The file of a tracker in the run's folder: the service's id and address of the run, and the records sent."""

    id: str | None = None
    url: str | None = None
    sent: Annotated[int, Field(ge=0)] = 0


def _read_state(run: RunFolder, name: str) -> _State:
    return run.read(_STATE_FILES[name], _State, strict=False) or _State()


class Tracker(ABC):
    """Sends a run's records to one service. The abstract methods run in its own thread and may raise any exception.

    Args:
        config: of the run.
        run: the run's folder.
        records: the records that the run already has.
    """

    name: ClassVar[str]

    def __init__(self, config: Config, run: RunFolder, records: Sequence[Record]) -> None:
        self.config, self.run = config, run
        self._records = list(records)
        self._state = _read_state(run, self.name)
        self._state.sent = min(self._state.sent, len(records))  # epochs that are repeated are sent again
        self._connected = self._warned = self._detached = False
        self._end: tuple[Status, Record] | None = None
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._wake.set()
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._thread.start()

    @abstractmethod
    def connect(self, run_id: str | None) -> tuple[str, str | None]:
        """Reopen the service's run `run_id`, or create one. Return its id, and where to view it if anywhere."""

    @abstractmethod
    def send(self, record: Record) -> None:
        """Send a record of metrics.jsonl."""

    @abstractmethod
    def end(self, status: Status, summary: Record) -> None:
        """Mark the run as ended, with the contents of summary.json."""

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
        self._end = (status, summary)
        self._wake.set()
        self._thread.join(_FINISH_TIMEOUT_S if status == "finished" else _ABORT_TIMEOUT_S)
        if self._thread.is_alive():
            self._messages.put(
                f"{self.name} is too slow: the run ended before all records were sent; metrics.jsonl has them"
            )

    def detach(self) -> None:
        """Stop sending, but leave the service's run open: the run continues in another process."""
        self._detached = True
        self._wake.set()

    def _work(self) -> None:
        while not self._detached:
            self._wake.wait()
            self._wake.clear()
            end = self._end
            try:
                self._send_new()
                if end is not None and not self._detached:
                    self.end(*end)
                self._warned = False
            except Exception as error:  # a service must not fail the run
                if not self._warned:
                    text = without_secrets(f"{type(error).__name__}: {error}".strip().splitlines()[0])
                    problem = f"{self.name} cannot be reached; training continues and it will be retried: {text}"
                    self._messages.put(problem)
                self._warned = True
            if end is not None:
                return

    def _send_new(self) -> None:
        state = self._state
        if not self._connected:
            run_id, state.url = self.connect(state.id)
            if run_id != state.id:  # new, or lost at the service
                state.id, state.sent = run_id, 0
            self._connected = True
            if state.url:
                self._messages.put(f"{self.name}: {state.url}")
        while state.sent < len(self._records) and not self._detached:
            self.send(self._records[state.sent])
            state.sent += 1
        if not self._detached:
            self.run.write(_STATE_FILES[self.name], json.dumps(asdict(state)) + "\n")


def require_trackers(config: Config) -> None:
    """Check that the packages for ``log.wandb`` and ``log.mlflow`` are installed and MLflow's server is configured.

    Raises:
        EnvironmentProblem: they are not.
    """
    for name, package in _PACKAGES.items():
        if getattr(config.log, name).enabled and importlib.util.find_spec(name) is None:
            raise EnvironmentProblem(
                f"log.{name}.enabled: the package {package} is not installed here\n  pip install {package}"
                f" (or densenet-dist[{name}]), on all machines of a cluster"
            )
    mlflow = config.log.mlflow
    if mlflow.enabled and not (mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
        raise EnvironmentProblem(
            "log.mlflow.enabled: the address of the server is not set\n"
            "  set log.mlflow.tracking_uri=http://HOST:5000 or the environment variable MLFLOW_TRACKING_URI"
        )


def open_trackers(config: Config, run: RunFolder, records: Sequence[Record]) -> list[Tracker]:
    """Start the configured trackers; arguments and errors are those of `Tracker` and `require_trackers`."""
    from densenet_dist.trackers.mlflow_tracker import MlflowTracker
    from densenet_dist.trackers.wandb_tracker import WandbTracker

    require_trackers(config)
    kinds = ((config.log.wandb, WandbTracker), (config.log.mlflow, MlflowTracker))
    return [kind(config, run, records) for settings, kind in kinds if settings.enabled]


def links(run: RunFolder) -> dict[str, str]:
    """Where to view a run, by service, for the services that were reached and have an address."""
    addresses = {name: _read_state(run, name).url for name in _STATE_FILES}
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


def sweep_of(config: Config, run: RunFolder) -> str | None:
    """The name of the sweep that a run is a trial of."""
    return split_location(config.storage)[1] if run.exists(TRIAL_FILE) else None

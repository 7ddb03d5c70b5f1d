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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, Literal, Protocol, TypeAlias

from densenet_dist.config import to_dict
from densenet_dist.credentials import without_credentials
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.run_folder import TRIAL_FILE, RunFolder, split_location
from densenet_dist.schema import Config
from densenet_dist.yaml_settings import flatten

WANDB: Final = "W&B"
MLFLOW: Final = "MLflow"
_STATE_FILES: Final = {WANDB: "trackers/wb.json", MLFLOW: "trackers/mlflow.json"}
_MAX_MESSAGE: Final = 300
_FINISH_TIMEOUT_S: Final = 30.0
"""How long a finished run waits for its last records to be sent."""
_ABORT_TIMEOUT_S: Final = 5.0
"""The same for a run that was stopped or failed."""

Record: TypeAlias = dict[str, Any]
Status: TypeAlias = Literal["finished", "stopped", "failed"]


class Session(Protocol):
    """One run at a service. Every method may raise any exception.

    Attributes:
        id: the service's identifier of the run.
        url: where to view the run, if anywhere.
        is_new: whether nothing has been sent to it yet.
    """

    id: str
    url: str | None
    is_new: bool

    def send(self, record: Record) -> None:
        """Send a record of metrics.jsonl."""

    def end(self, status: Status, summary: Record) -> None:
        """Mark the run as ended, with the contents of summary.json."""


def require_trackers(config: Config) -> None:
    """Check that the packages for ``log.wandb`` and ``log.mlflow`` are installed and MLflow's server is configured.

    Raises:
        EnvironmentProblem: they are not.
    """
    log = config.log
    for name, package, enabled in (
        ("wandb", "wandb", log.wandb.enabled),
        ("mlflow", "mlflow-skinny", log.mlflow.enabled),
    ):
        if enabled and importlib.util.find_spec(name) is None:
            raise EnvironmentProblem(
                f"log.{name}.enabled: the package {package} is not installed here\n  pip install {package}"
                f" (or densenet-dist[{name}]), on all machines of a cluster"
            )
    if log.mlflow.enabled and not (log.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
        raise EnvironmentProblem(
            "log.mlflow.enabled: the address of the server is not set\n"
            "  set log.mlflow.tracking_uri=http://HOST:5000 or the environment variable MLFLOW_TRACKING_URI"
        )


def open_trackers(config: Config, run: RunFolder, records: Sequence[Record]) -> list[Tracker]:
    """Start the configured trackers.

    Raises:
        EnvironmentProblem: a package is missing here.
    """
    from densenet_dist.trackers.mlflow_session import MlflowSession
    from densenet_dist.trackers.wandb_session import WandbSession

    require_trackers(config)
    trackers = []
    if config.log.wandb.enabled:
        trackers.append(Tracker(WANDB, partial(WandbSession, config, run), run, records))
    if config.log.mlflow.enabled:
        trackers.append(Tracker(MLFLOW, partial(MlflowSession, config, run), run, records))
    return trackers


class Tracker:
    """Sends a run's records to one service, in its own thread.

    Args:
        name: of the service.
        open_session: opens a session, with a known id or None; called in that thread, where the packages are imported.
        run: the run's folder.
        records: the records that the run already has.
    """

    def __init__(
        self, name: str, open_session: Callable[[str | None], Session], run: RunFolder, records: Sequence[Record]
    ) -> None:
        self._name, self._open_session, self._run = name, open_session, run
        self._records = list(records)
        self._state = run.read_json(_STATE_FILES[name], strict=False)
        sent = self._state.get("sent")
        # Epochs that are repeated are sent again.
        self._sent = max(0, min(sent, len(records))) if isinstance(sent, int) else 0
        self._session: Session | None = None
        self._end: tuple[Status, Record] | None = None
        self._warned = self._detached = False
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._wake.set()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def add(self, record: Record) -> None:
        """Queue a record."""
        self._records.append(record)
        self._wake.set()

    def messages(self) -> Iterator[str]:
        """Yield the messages for the user since the last call."""
        while not self._messages.empty():
            yield self._messages.get()

    def finish(self, status: Status, summary: Record) -> None:
        """Send the remaining records and end the session, within a time limit."""
        self._end = (status, summary)
        self._wake.set()
        self._thread.join(_FINISH_TIMEOUT_S if status == "finished" else _ABORT_TIMEOUT_S)
        if self._thread.is_alive():
            self._messages.put(
                f"{self._name} is too slow: the run ended before all records were sent; metrics.jsonl has them"
            )

    def detach(self) -> None:
        """Stop sending without ending the session: the run continues in another process."""
        self._detached = True
        self._wake.set()

    def _work(self) -> None:
        while not self._detached:
            self._wake.wait()
            self._wake.clear()
            end = self._end
            try:
                session = self._send()
                if end is not None and not self._detached:
                    session.end(*end)
                self._warned = False
            except Exception as error:  # a service must not fail the run
                self._warn(error)
            if end is not None:
                return

    def _send(self) -> Session:
        session = self._session
        if session is None:
            session = self._session = self._open_session(self._state.get("id"))
            self._sent = 0 if session.is_new else self._sent
            if session.url:
                self._messages.put(f"{self._name}: {session.url}")
        while self._sent < len(self._records) and not self._detached:
            session.send(self._records[self._sent])
            self._sent += 1
        state = {"id": session.id, "url": session.url, "sent": self._sent}
        if state != self._state and not self._detached:
            self._state = state
            self._run.write(_STATE_FILES[self._name], json.dumps(state) + "\n")
        return session

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            text = without_secrets(f"{type(error).__name__}: {error}".strip().splitlines()[0])
            self._messages.put(f"{self._name} cannot be reached; training continues and it will be retried: {text}")


def links(run: RunFolder) -> dict[str, str]:
    """Where to view a run, by service, for the services that were reached and have an address."""
    states = {name: run.read_json(file, strict=False) for name, file in _STATE_FILES.items()}
    return {name: state["url"] for name, state in states.items() if isinstance(state.get("url"), str)}


def without_secrets(text: str) -> str:
    """Mask the credentials of addresses and the keys of the services, and shorten the text."""
    text = without_credentials(text)
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        if os.environ.get(name):
            text = text.replace(os.environ[name], "***")
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}..."


def settings_of(config: Config) -> dict[str, Any]:
    """The settings of a run that are not None, by dotted key."""
    return {key: value for key, value in flatten(to_dict(config)).items() if value is not None}


def sweep_of(config: Config, run: RunFolder) -> str | None:
    """The name of the sweep that a run is a trial of."""
    return split_location(config.storage)[1] if run.exists(TRIAL_FILE) else None

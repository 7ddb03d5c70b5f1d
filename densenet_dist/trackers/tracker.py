"""A tracker: the records of metrics.jsonl once more, sent to a service in the background, so that no run waits for it.

A tracker sends what it has not sent yet, in order. Where its server does not answer it says so once and tries again at
the next record; the run goes on. How far it came, and which run of the service this is, lies in the run's folder, so
that a resumed run goes on there. Keys and passwords come from the environment and are written nowhere.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, Protocol, TypeAlias

from densenet_dist.config import to_dict
from densenet_dist.credentials import without_credentials
from densenet_dist.run_folder import TRIAL_FILE, RunFolder, split_location
from densenet_dist.schema import Config
from densenet_dist.yaml_settings import flatten

TRACKERS_FOLDER: Final = "trackers"
WANDB: Final = "W&B"
MLFLOW: Final = "MLflow"
_LONGEST: Final = 300
_END_S: Final = 30.0
_CUT_OFF_S: Final = 5.0
"""How long the end of a run waits for its last records to be sent, and that of one which is stopped or has failed."""

Record: TypeAlias = dict[str, Any]
End: TypeAlias = Literal["finished", "stopped", "failed"]


class Session(Protocol):
    """One run at a service. Any method may raise anything."""

    id: str
    """By which the service knows it."""
    url: str | None
    """Where people see it."""
    is_new: bool
    """Whether nothing has been sent to it yet."""

    def send(self, record: Record) -> None:
        """Send a record of metrics.jsonl."""

    def end(self, how: End, summary: Record) -> None:
        """Say that the run has ended, with what summary.json holds."""


class Tracker:
    """Sends a run's records to one service, in a thread of its own.

    Args:
        name: of the service.
        opener: opens a session, the one with an id where it is known; called in that thread.
        run: the run's folder.
        records: those that the run has already.
    """

    def __init__(
        self, name: str, opener: Callable[[str | None], Session], run: RunFolder, records: Sequence[Record]
    ) -> None:
        self._name, self._open, self._run = name, opener, run
        self._file = _state_file(name)
        self._records = list(records)
        self._state = run.read_json(self._file, strict=False)
        sent = self._state.get("sent")
        # What is done once more is sent once more.
        self._sent = max(0, min(sent, len(records))) if isinstance(sent, int) else 0
        self._session: Session | None = None
        self._end: tuple[End, Record] | None = None
        self._warned = self._left = False
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._wake.set()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def add(self, record: Record) -> None:
        """Have a record sent."""
        self._records.append(record)
        self._wake.set()

    def news(self) -> Iterator[str]:
        """What there is to tell the user since the last call."""
        while not self._news.empty():
            yield self._news.get()

    def finish(self, how: End, summary: Record) -> None:
        """Send the rest and end, if the service is fast enough."""
        self._end = (how, summary)
        self._wake.set()
        self._thread.join(_END_S if how == "finished" else _CUT_OFF_S)
        if self._thread.is_alive():
            self._news.put(f"{self._name} is too slow: the run ended before all was sent; metrics.jsonl has all of it")

    def leave(self) -> None:
        """Send nothing more, and say nothing of an end: the run goes on elsewhere."""
        self._left = True
        self._wake.set()

    def _work(self) -> None:
        while not self._left:
            self._wake.wait()
            self._wake.clear()
            end = self._end
            try:
                session = self._send()
                if end is not None and not self._left:
                    session.end(*end)
                self._warned = False
            except Exception as error:  # whatever it is, the run goes on
                self._warn(error)
            if end is not None:
                return

    def _send(self) -> Session:
        session = self._session
        if session is None:
            session = self._session = self._open(self._state.get("id"))
            self._sent = 0 if session.is_new else self._sent
            if session.url:
                self._news.put(f"{self._name}: {session.url}")
        while self._sent < len(self._records) and not self._left:
            session.send(self._records[self._sent])
            self._sent += 1
        state = {"id": session.id, "url": session.url, "sent": self._sent}
        if state != self._state and not self._left:
            self._state = state
            self._run.write(self._file, json.dumps(state) + "\n")
        return session

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            text = without_secrets(f"{type(error).__name__}: {error}".strip().splitlines()[0])
            self._news.put(f"{self._name} cannot be reached; training goes on, and it is tried again: {text}")


def links(run: RunFolder) -> dict[str, str]:
    """Where people see a run, by service; those that were never reached, or have no address, are left out."""
    states = {name: run.read_json(_state_file(name), strict=False) for name in (WANDB, MLFLOW)}
    return {name: state["url"] for name, state in states.items() if isinstance(state.get("url"), str)}


def _state_file(name: str) -> str:
    return f"{TRACKERS_FOLDER}/{name.replace('&', '').lower()}.json"


def without_secrets(text: str) -> str:
    """Mask the credentials of addresses, and the keys that the services themselves use."""
    text = without_credentials(text)
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        if os.environ.get(name):
            text = text.replace(os.environ[name], "***")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def settings_of(config: Config) -> dict[str, Any]:
    """All settings of a run, by dotted key; those that are not set are left out."""
    return {key: value for key, value in flatten(to_dict(config)).items() if value is not None}


def sweep_of(config: Config, run: RunFolder) -> str | None:
    """The name of the sweep that a run is a trial of."""
    if not run.exists(TRIAL_FILE):
        return None
    return split_location(config.storage)[1]

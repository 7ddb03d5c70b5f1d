"""A run at an MLflow tracking server; mlflow-skinny is enough for that."""

from __future__ import annotations

import math
import os
import time
from typing import Any, Final

from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import Config
from densenet_dist.trackers.tracker import End, Record, settings_of, sweep_of, without_secrets

_DEFAULTS: Final = {
    # MLflow's own are two minutes and seven tries, each later than the one before.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_STATUS: Final[dict[str, str]] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_AT_ONCE: Final = 100
_LONGEST: Final = 500


class MlflowSession:
    """See `densenet_dist.trackers.tracker.Session`; user and password are MLFLOW_TRACKING_USERNAME and ..._PASSWORD."""

    def __init__(self, config: Config, run: RunFolder, known: str | None) -> None:
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        address = config.log.mlflow.tracking_uri or os.environ["MLFLOW_TRACKING_URI"]
        self._client = MlflowClient(tracking_uri=address)
        self.is_new, self.id = known is None, known or ""
        if known is not None:
            try:
                self._client.update_run(known, status="RUNNING")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self.is_new = True  # another server, or it was deleted there
        if self.is_new:
            self._create(config, run)
        experiment = self._client.get_run(self.id).info.experiment_id
        base = without_secrets(address).replace("***@", "").rstrip("/")
        self.url = f"{base}/#/experiments/{experiment}/runs/{self.id}" if base.startswith("http") else None

    def send(self, record: Record) -> None:
        """Send a record's figures at its global step."""
        from mlflow.entities import Metric

        stamp, step = round(record["time"] * 1000), record["global_step"]
        metrics = [Metric(key, value, stamp, step) for key, value in record.items() if _is_figure(key, value)]
        self._client.log_batch(self.id, metrics=metrics)

    def end(self, how: End, summary: Record) -> None:
        """Set the run's status, and the best epoch's figures as ``best/...``."""
        for key, value in (summary.get("best") or {}).items():
            self._client.log_metric(self.id, f"best/{key}", value, step=summary["global_step"])
        self._client.set_terminated(self.id, _STATUS[how])

    def _create(self, config: Config, run: RunFolder) -> None:
        from mlflow.entities import Param

        sweep = sweep_of(config, run)
        tags = {"densenet_dist.folder": run.uri} | ({"densenet_dist.sweep": sweep} if sweep else {})
        name = f"{sweep}/{config.name}" if sweep else config.name
        self.id = self._client.create_run(self._experiment(config), tags=tags, run_name=name).info.run_id
        params = [Param(key, str(value)[:_LONGEST]) for key, value in settings_of(config).items()]
        for start in range(0, len(params), _AT_ONCE):
            self._client.log_batch(self.id, params=params[start : start + _AT_ONCE])

    def _experiment(self, config: Config) -> str:
        from mlflow.exceptions import MlflowException

        name = config.log.mlflow.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another trial was faster
                time.sleep(0.1)
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)


def _is_figure(key: str, value: Any) -> bool:
    return key not in ("time", "global_step") and isinstance(value, (int, float)) and math.isfinite(value)

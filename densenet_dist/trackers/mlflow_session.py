"""A run at an MLflow tracking server; the package mlflow-skinny is enough."""

from __future__ import annotations

import math
import os
import time
from typing import Any, Final

from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import Config
from densenet_dist.trackers.tracker import Record, Status, settings_of, sweep_of, without_secrets

_DEFAULTS: Final = {
    # MLflow's defaults are a timeout of two minutes and seven retries with backoff.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_STATUS: Final[dict[str, str]] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_MAX_BATCH: Final = 100
_MAX_VALUE: Final = 500


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
                self.is_new = True  # another server, or deleted there
        if self.is_new:
            self._create(config, run)
        experiment = self._client.get_run(self.id).info.experiment_id
        base = without_secrets(address).replace("***@", "").rstrip("/")
        self.url = f"{base}/#/experiments/{experiment}/runs/{self.id}" if base.startswith("http") else None

    def send(self, record: Record) -> None:
        """Send a record's metrics at its global step."""
        from mlflow.entities import Metric

        stamp, step = round(record["time"] * 1000), record["global_step"]
        metrics = [Metric(key, value, stamp, step) for key, value in record.items() if _is_metric(key, value)]
        self._client.log_batch(self.id, metrics=metrics)

    def end(self, status: Status, summary: Record) -> None:
        """Set the run's status, and log the best epoch's metrics as ``best/...``."""
        for key, value in (summary.get("best") or {}).items():
            self._client.log_metric(self.id, f"best/{key}", value, step=summary["global_step"])
        self._client.set_terminated(self.id, _STATUS[status])

    def _create(self, config: Config, run: RunFolder) -> None:
        from mlflow.entities import Param

        sweep = sweep_of(config, run)
        tags = {"densenet_dist.folder": run.uri} | ({"densenet_dist.sweep": sweep} if sweep else {})
        name = f"{sweep}/{config.name}" if sweep else config.name
        self.id = self._client.create_run(self._experiment(config), tags=tags, run_name=name).info.run_id
        params = [Param(key, str(value)[:_MAX_VALUE]) for key, value in settings_of(config).items()]
        for start in range(0, len(params), _MAX_BATCH):
            self._client.log_batch(self.id, params=params[start : start + _MAX_BATCH])

    def _experiment(self, config: Config) -> str:
        from mlflow.exceptions import MlflowException

        name = config.log.mlflow.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another trial created it
                time.sleep(0.1)
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)


def _is_metric(key: str, value: Any) -> bool:
    return key not in ("time", "global_step") and isinstance(value, (int, float)) and math.isfinite(value)

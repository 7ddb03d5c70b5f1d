"""A run at an MLflow tracking server; the package mlflow-skinny is enough."""

from __future__ import annotations

import math
import os
from typing import Final

from densenet_dist.trackers.tracker import MLFLOW, Record, Status, Tracker, flat_settings, sweep_of, without_secrets

_DEFAULTS: Final = {
    # MLflow's defaults are a timeout of two minutes and seven retries with backoff.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_STATUS: Final[dict[str, str]] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_MAX_BATCH: Final = 100
_MAX_VALUE: Final = 500


class MlflowTracker(Tracker):
    """See `densenet_dist.trackers.tracker.Tracker`; user and password are MLFLOW_TRACKING_USERNAME and ..._PASSWORD."""

    name = MLFLOW

    def connect(self, run_id: str | None) -> tuple[str, str | None]:
        """Reopen the run, or create it with its settings."""
        os.environ.update({name: value for name, value in _DEFAULTS.items() if name not in os.environ})
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        address = self.config.log.mlflow.tracking_uri or os.environ["MLFLOW_TRACKING_URI"]
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

    def send(self, record: Record) -> None:
        """Send a record's metrics at its global step."""
        from mlflow.entities import Metric

        values = {key: value for key, value in record.items() if key not in ("time", "global_step")}
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        stamp, step = round(record["time"] * 1000), record["global_step"]
        metrics = [Metric(key, value, stamp, step) for key, value in numbers.items() if math.isfinite(value)]
        self._client.log_batch(self._id, metrics=metrics)

    def end(self, status: Status, summary: Record) -> None:
        """Set the run's status, and log the best epoch's metrics as ``best/...``."""
        for key, value in (summary.get("best") or {}).items():
            self._client.log_metric(self._id, f"best/{key}", value, step=summary["global_step"])
        self._client.set_terminated(self._id, _STATUS[status])

    def _create(self) -> str:
        from mlflow.entities import Param

        sweep = sweep_of(self.config, self.run)
        tags = {"densenet_dist.folder": self.run.uri} | ({"densenet_dist.sweep": sweep} if sweep else {})
        name = f"{sweep}/{self.config.name}" if sweep else self.config.name
        run_id = str(self._client.create_run(self._experiment(), tags=tags, run_name=name).info.run_id)
        params = [Param(key, str(value)[:_MAX_VALUE]) for key, value in flat_settings(self.config).items()]
        for start in range(0, len(params), _MAX_BATCH):
            self._client.log_batch(run_id, params=params[start : start + _MAX_BATCH])
        return run_id

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.config.log.mlflow.experiment
        found = self._client.get_experiment_by_name(name)
        try:
            return str(found.experiment_id if found else self._client.create_experiment(name))
        except MlflowException:  # another trial has just created it
            return str(self._client.get_experiment_by_name(name).experiment_id)

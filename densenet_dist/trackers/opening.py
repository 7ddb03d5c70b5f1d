"""The services that records are sent to: W&B and MLflow. Their packages are imported in the thread that sends."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import partial

from densenet_dist.errors import EnvironmentProblem
from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import Config
from densenet_dist.trackers.mlflow_session import MlflowSession
from densenet_dist.trackers.tracker import MLFLOW, WANDB, Record, Tracker
from densenet_dist.trackers.wandb_session import WandbSession


def require_trackers(config: Config) -> None:
    """Whether what ``log.wandb`` and ``log.mlflow`` need is installed here.

    Raises:
        EnvironmentProblem: it is not, or it is not said where MLflow's server is.
    """
    log = config.log
    for name, package, wanted in (
        ("wandb", "wandb", log.wandb.enabled),
        ("mlflow", "mlflow-skinny", log.mlflow.enabled),
    ):
        if wanted and importlib.util.find_spec(name) is None:
            raise EnvironmentProblem(
                f"log.{name}.enabled: the package {package} is not installed here\n  pip install {package}"
                f" (or densenet-dist[{name}]), on the machines of a cluster too"
            )
    if log.mlflow.enabled and not (log.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
        raise EnvironmentProblem(
            "log.mlflow.enabled: it is not said where the server is\n"
            "  give log.mlflow.tracking_uri=http://HOST:5000, or set MLFLOW_TRACKING_URI"
        )


def open_trackers(config: Config, run: RunFolder, records: Sequence[Record]) -> list[Tracker]:
    """The configured ones.

    Raises:
        EnvironmentProblem: a package is missing here.
    """
    require_trackers(config)
    trackers = []
    if config.log.wandb.enabled:
        trackers.append(Tracker(WANDB, partial(WandbSession, config, run), run, records))
    if config.log.mlflow.enabled:
        trackers.append(Tracker(MLFLOW, partial(MlflowSession, config, run), run, records))
    return trackers

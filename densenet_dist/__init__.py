"""densenet_dist: DenseNets trained on GPU clusters.

    from densenet_dist import evaluate, fit, load_config, summary

    config = load_config("configs/quickstart.yaml", "train.epochs=3")
    print(summary(config))
    result = fit(config)
    result.plot().savefig("curves.png")
    print(evaluate(result.run))

Names are imported when first used, so that ``import densenet_dist`` costs nothing in Ray's many processes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densenet_dist.cluster.launch import fit as fit
    from densenet_dist.cluster.result import Result as Result
    from densenet_dist.cluster.result import load_run as load_run
    from densenet_dist.cluster.sweep import tune as tune
    from densenet_dist.config import load_config as load_config
    from densenet_dist.custom import Callback as Callback
    from densenet_dist.data.datasets import Dataset as Dataset
    from densenet_dist.data.image_files import Split as Split
    from densenet_dist.inference.classifier import Classifier as Classifier
    from densenet_dist.inference.classifier import load_classifier as load_classifier
    from densenet_dist.inference.exporting import export as export
    from densenet_dist.model import DenseNet as DenseNet
    from densenet_dist.report.summary import summary as summary
    from densenet_dist.schedules import ScheduleState as ScheduleState
    from densenet_dist.schema import Config as Config
    from densenet_dist.sweep.definition import load_sweep as load_sweep
    from densenet_dist.sweep.results import SweepResult as SweepResult
    from densenet_dist.train.evaluation import evaluate as evaluate
    from densenet_dist.train.network import build_model as build_model

__version__ = "0.1.0"
_LAZY_IMPORTS = {
    "Callback": "custom",
    "Classifier": "inference.classifier",
    "Config": "schema",
    "Dataset": "data.datasets",
    "DenseNet": "model",
    "Result": "cluster.result",
    "ScheduleState": "schedules",
    "Split": "data.image_files",
    "SweepResult": "sweep.results",
    "build_model": "train.network",
    "evaluate": "train.evaluation",
    "export": "inference.exporting",
    "fit": "cluster.launch",
    "load_classifier": "inference.classifier",
    "load_config": "config",
    "load_run": "cluster.result",
    "load_sweep": "sweep.definition",
    "summary": "report.summary",
    "tune": "cluster.sweep",
}
"""The module of each public name."""
__all__ = list(_LAZY_IMPORTS)


def __getattr__(name: str) -> Any:
    if name in _LAZY_IMPORTS:
        return getattr(import_module(f"densenet_dist.{_LAZY_IMPORTS[name]}"), name)
    raise AttributeError(f"module 'densenet_dist' has no attribute {name!r}")

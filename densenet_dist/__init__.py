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

from densenet_dist.cache_folder import provide_user

if TYPE_CHECKING:
    from densenet_dist.cluster.launch import fit
    from densenet_dist.cluster.result import Result, load_run
    from densenet_dist.cluster.sweep import tune
    from densenet_dist.config import load_config
    from densenet_dist.inference.classifier import Classifier, load_classifier
    from densenet_dist.inference.exporting import export
    from densenet_dist.model import DenseNet
    from densenet_dist.report.summary import summary
    from densenet_dist.schema import Config
    from densenet_dist.sweep.definition import load_sweep
    from densenet_dist.sweep.results import SweepResult
    from densenet_dist.train.evaluation import evaluate
    from densenet_dist.train.network import build_model

__version__ = "0.1.0"
__all__ = [
    "Classifier",
    "Config",
    "DenseNet",
    "Result",
    "SweepResult",
    "build_model",
    "evaluate",
    "export",
    "fit",
    "load_classifier",
    "load_config",
    "load_run",
    "load_sweep",
    "summary",
    "tune",
]
_HOMES = {
    "Classifier": "inference.classifier",
    "Config": "schema",
    "DenseNet": "model",
    "Result": "cluster.result",
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

provide_user()  # here, since it must come before PyTorch and Ray ask, in Ray's workers too


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"densenet_dist.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'densenet_dist' has no attribute {name!r}")

"""DenseNets of the Keras notebook, the paper and torchvision.

`DenseNet` is imported on first use, so that an architecture can be checked without loading PyTorch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densenet_dist.model.densenet import DenseNet, ParameterCount, count_parameters

__all__ = ["DenseNet", "ParameterCount", "count_parameters"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'densenet_dist.model' has no attribute {name!r}")
    from densenet_dist.model import densenet

    return getattr(densenet, name)

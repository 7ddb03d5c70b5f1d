"""DenseNets: the notebook's, the paper's and torchvision's."""

from densenet_dist.model.densenet import DenseNet, ParameterCount, count_parameters
from densenet_dist.model.variants import VARIANTS, densenet, validate_model

__all__ = ["VARIANTS", "DenseNet", "ParameterCount", "count_parameters", "densenet", "validate_model"]

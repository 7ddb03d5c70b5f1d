"""DenseNets: the notebook's, the paper's and torchvision's."""

from densenet_dist.model.densenet import DenseNet, ParameterCount, count_parameters
from densenet_dist.model.variants import VARIANTS, densenet, variant_architecture

__all__ = ["VARIANTS", "DenseNet", "ParameterCount", "count_parameters", "densenet", "variant_architecture"]

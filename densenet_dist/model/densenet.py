"""DenseNet: the networks of the notebook, the paper (Huang et al. 2017, arXiv:1608.06993) and torchvision."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densenet_dist.errors import ConfigError
from densenet_dist.model.architecture import Architecture, Init
from densenet_dist.model.dense_block import DenseBlock, NormFactory
from densenet_dist.model.fused_block import FusedDenseBlock

_WRAPPERS: Final = re.compile(r"(?<![^.])(?:module|_orig_mod)\.")
_OLD_NAMES: Final = re.compile(r"(?<=\.)(norm|conv)\.([12]\.)")


class DenseNet(nn.Module):
    """Dense blocks with transitions between them, then BN-ReLU-pooling-linear (paper, sec. 3).

    Modules, parameters and buffers have torchvision's names. The last batch normalization is ``features.norm5`` for any
    number of blocks. Weights and feature maps are in ``channels_last`` memory.

    Args:
        architecture: the network to build.

    Raises:
        ConfigError: the network cannot be built; one line per reason.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        if problems := architecture.problems():
            raise ConfigError("\n".join(problems))
        self.architecture = architecture
        self._frozen: list[str] = []
        self.features = _features(architecture)
        self.classifier = nn.Linear(architecture.head_features(), architecture.num_classes)
        initialize(self, architecture.init)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack the keyword

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: (N, in_channels, H, W) in any memory format, of the weights' dtype, or any under autocast.

        Returns:
            Logits (N, num_classes), of the input's or autocast's dtype.

        Raises:
            RuntimeError: by PyTorch, if the network was built for other channels or image sizes.
        """
        return self.classify(self.features(x.contiguous(memory_format=torch.channels_last)))

    def classify(self, x: Tensor) -> Tensor:
        """Compute the logits from the output of ``features``, (N, channels, h, w)."""
        x = F.avg_pool2d(x, 2) if self.architecture.head == "pool2" else F.adaptive_avg_pool2d(x, 1)
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.architecture.num_classes

    def freeze(self, parts: Literal["backbone"] | Sequence[str | int]) -> None:
        """Exclude parts from training: their weights stay, and their batch normalizations use running statistics.

        Args:
            parts: ``"stem"`` and numbers of blocks, from 1, or ``"backbone"``: all of them. A block includes the
                transition after it; the last block includes the last batch normalization.
        """
        part: str | int = "stem"
        for name, module in self.features.named_children():
            if name.startswith("denseblock"):
                part = int(name.removeprefix("denseblock"))
            if parts == "backbone" or part in parts:
                module.requires_grad_(False)
                self._frozen.append(name)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for name in self._frozen:
            self.features.get_submodule(name).eval()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # `load_state_dict` passes a copy, so the caller's dict keeps its names.
        for name in [name for name in state_dict if name.startswith(prefix)]:
            renamed = prefix + standard_name(name.removeprefix(prefix))
            if renamed not in state_dict:
                state_dict[renamed] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def standard_name(name: str) -> str:
    """Remove the prefixes ``module.`` (DDP) and ``_orig_mod.`` (torch.compile); rename old ``norm.1``."""
    return _OLD_NAMES.sub(r"\1\2", _WRAPPERS.sub("", name))


class Features(nn.Sequential):
    """All modules up to the last batch normalization, followed by ReLU.

    Shape: (N, in_channels, H, W) -> (N, channels of the last block, h, w). A fused block also computes the batch
    normalization and ReLU after it, and a transition's convolution.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Run the modules in order."""
        modules = iter(self.children())
        for module in modules:
            if not isinstance(module, FusedDenseBlock):
                x = module(x)
                continue
            after = next(modules)
            if not isinstance(after, Transition):  # the last block, followed by norm5
                return cast(Tensor, module(x, after))  # ReLU included
            x = module(x, after.norm, after.conv)
            for following in list(after)[3:]:  # dropout and pooling
                x = following(x)
        return F.relu(x, inplace=True)


class Transition(nn.Sequential):
    """BN-ReLU-conv1x1 and 2x2 average pooling: (N, in_channels, H, W) -> (N, out_channels, H // 2, W // 2).

    Args:
        in_channels: input channels.
        out_channels: output channels.
        drop_rate: probability of dropout after the convolution.
        norm: builds the batch normalization.
    """

    norm: nn.BatchNorm2d
    conv: nn.Conv2d

    def __init__(self, in_channels: int, out_channels: int, drop_rate: float, norm: NormFactory) -> None:
        super().__init__()
        self.add_module("norm", norm(in_channels))
        self.add_module("relu", nn.ReLU(inplace=True))
        self.add_module("conv", nn.Conv2d(in_channels, out_channels, 1, bias=False))
        if drop_rate > 0:
            self.add_module("drop", nn.Dropout(drop_rate))
        self.add_module("pool", nn.AvgPool2d(2))


def _features(arch: Architecture) -> Features:
    """Build the stem, the blocks with transitions between them, and the last batch normalization."""
    norm = partial(nn.BatchNorm2d, momentum=arch.norm_momentum, eps=arch.norm_eps)
    features = _stem(arch, norm)
    widths = arch.block_widths()
    for i, (num_layers, (entering, leaving)) in enumerate(zip(arch.num_layers, widths, strict=True), start=1):
        block = (DenseBlock if arch.block == "reference" else FusedDenseBlock)(
            num_layers=num_layers,
            in_channels=entering,
            growth_rate=arch.growth_rate,
            bn_size=arch.bn_size,
            drop_rate=arch.drop_rate,
            norm=norm,
        )
        features.add_module(f"denseblock{i}", block)
        if i < len(widths):
            next_entering, _ = widths[i]
            features.add_module(f"transition{i}", Transition(leaving, next_entering, arch.drop_rate, norm))
    features.add_module("norm5", norm(widths[-1][1]))
    return features


def _stem(arch: Architecture, norm: NormFactory) -> Features:
    """Build the stem: (N, in_channels, H, W) -> (N, stem_channels, H, W), for ``imagenet`` (.., H / 4, W / 4)."""
    stem = Features()
    if arch.stem == "cifar":
        stem.add_module("conv0", nn.Conv2d(arch.in_channels, arch.stem_channels, 3, padding=1, bias=False))
    else:
        stem.add_module("conv0", nn.Conv2d(arch.in_channels, arch.stem_channels, 7, stride=2, padding=3, bias=False))
        stem.add_module("norm0", norm(arch.stem_channels))
        stem.add_module("relu0", nn.ReLU(inplace=True))
        stem.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
    return stem


def initialize(model: nn.Module, init: Init) -> None:
    """Initialize the weights of convolutions and linear layers, and set the biases of linear layers to 0.

    ======================  ===============================================  ==================================
    ``init``                convolutions                                     linear layers
    ======================  ===============================================  ==================================
    ``glorot`` (Keras')     U(-a, a), a = sqrt(6 / (fan_in + fan_out))       the same
    ``he`` (the paper's)    N(0, 2 / fan_out), as in its Torch code            U(-a, a), a = 1 / sqrt(fan_in)
    ``torchvision``         N(0, 2 / fan_in)                                 U(-a, a), a = 1 / sqrt(fan_in)
    ======================  ===============================================  ==================================

    fan_in and fan_out are the input and output channels times the kernel's area. Batch normalizations keep PyTorch's
    initial values, gamma 1 and beta 0. Sources: Glorot and Bengio 2010, eq. 16; He et al. 2015, sec. 2.2 (both
    fans); ``models/densenet.lua`` of github.com/liuzhuang13/DenseNet (fan_out).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if init == "glorot":
                nn.init.xavier_uniform_(module.weight)
            else:
                fan: Literal["fan_in", "fan_out"] = "fan_out" if init == "he" else "fan_in"
                nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            if init == "glorot":
                nn.init.xavier_uniform_(module.weight)
            else:
                bound = module.in_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)


class ParameterCount(NamedTuple):
    """Number of values of a model.

    Attributes:
        trainable: of parameters that require a gradient.
        statistics: of running means and variances, which Keras counts as non-trainable parameters.
    """

    trainable: int
    statistics: int

    @property
    def total(self) -> int:
        """Return the sum of both: without frozen parameters, the total in Keras' ``model.summary()``."""
        return self.trainable + self.statistics


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the trainable parameters of a model and the running statistics of its batch normalizations."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    statistics = sum(
        buffer.numel() for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))
    )
    return ParameterCount(trainable, statistics)

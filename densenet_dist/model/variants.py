"""DenseNets by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Required, TypedDict, Unpack

from densenet_dist.errors import ConfigError
from densenet_dist.model.architecture import Architecture, BlockForm

if TYPE_CHECKING:
    from densenet_dist.model.densenet import DenseNet

# What each family changes of the defaults of `Architecture`, which are the paper's DenseNet for CIFAR.
_PAPER: Final[Mapping[str, Any]] = {}
_PAPER_BC: Final[Mapping[str, Any]] = {"bn_size": 4, "compression": 0.5}
_IMAGENET: Final[Mapping[str, Any]] = {**_PAPER_BC, "stem": "imagenet", "init": "torchvision"}
_NOTEBOOK: Final[Mapping[str, Any]] = {
    "compression_of": "growth_rate",
    # Keras' BatchNormalization: momentum 0.99, the weight of the *old* statistics, and epsilon 1e-3.
    "norm_momentum": 0.01,
    "norm_eps": 1e-3,
    "head": "pool2",
    "init": "glorot",
}


class _Variant(NamedTuple):
    family: Mapping[str, Any]
    growth_rate: int
    num_layers: tuple[int, ...]
    stem_channels: Callable[[int], int]
    """Computes the output channels of the stem from the growth rate."""
    depth_unit: int | None = None
    """Increase of the depth for one more layer in each of the three blocks; None if the variant has no `depth`."""


_VARIANTS: Final[Mapping[str, _Variant]] = {
    "notebook": _Variant(_NOTEBOOK, 35, (12,) * 4, lambda k: k),
    "densenet": _Variant(_PAPER, 12, (12,) * 3, lambda _: 16, depth_unit=3),
    "densenet_bc": _Variant(_PAPER_BC, 12, (16,) * 3, lambda k: 2 * k, depth_unit=6),
    "densenet121": _Variant(_IMAGENET, 32, (6, 12, 24, 16), lambda k: 2 * k),
    "densenet161": _Variant(_IMAGENET, 48, (6, 12, 36, 24), lambda k: 2 * k),
    "densenet169": _Variant(_IMAGENET, 32, (6, 12, 32, 32), lambda k: 2 * k),
    "densenet201": _Variant(_IMAGENET, 32, (6, 12, 48, 32), lambda k: 2 * k),
}
VARIANTS: Final = tuple(_VARIANTS)
"""Names of the variants."""


class DenseNetSettings(TypedDict, total=False):
    """The keyword arguments of `variant_architecture`, which editors complete for `densenet` too."""

    num_classes: Required[int]
    image_size: int
    growth_rate: int | None
    num_layers: int | Sequence[int] | None
    depth: int | None
    compression: float | None
    drop_rate: float | None
    block: BlockForm


def densenet(variant: str, **settings: Unpack[DenseNetSettings]) -> DenseNet:
    """Build a DenseNet by name, such as ``densenet("densenet121", num_classes=5, image_size=224)``.

    ===================  =====================================================  ===========================
    variant              source                                                 growth rate, layers
    ===================  =====================================================  ===========================
    ``notebook``         the Keras notebook that this project began with        35, 4 blocks of 12
    ``densenet``         paper, table 2: DenseNet for CIFAR                     12, 3 blocks of 12 (depth 40)
    ``densenet_bc``      paper, table 2: DenseNet-BC for CIFAR                  12, 3 blocks of 16 (depth 100)
    ``densenet121`` ...  paper, table 1, and torchvision, whose weights fit     32 (48 in 161), 4 blocks
    ===================  =====================================================  ===========================

    Args:
        variant: one of :data:`VARIANTS`.
        settings: those of :func:`variant_architecture`.

    Raises:
        ConfigError: the network cannot be built; one line per reason.
    """
    from densenet_dist.model.densenet import DenseNet

    return DenseNet(variant_architecture(variant, **settings))


def variant_architecture(
    variant: str,
    *,
    num_classes: int,
    image_size: int = 32,
    growth_rate: int | None = None,
    num_layers: int | Sequence[int] | None = None,
    depth: int | None = None,
    compression: float | None = None,
    drop_rate: float | None = None,
    block: BlockForm = "reference",
) -> Architecture:
    """Return the architecture of a DenseNet by name. Arguments that are None take the variant's value.

    Args:
        variant: one of :data:`VARIANTS`.
        num_classes: number of logits.
        image_size: side of the square images in pixels.
        growth_rate: channels that each layer adds (k).
        num_layers: layers of every block, with the variant's number of blocks; or a list with one number per block.
        depth: alternative to ``num_layers`` for the paper's CIFAR networks: the number of layers with weights, 3 n + 4
            for n layers per block, or 6 n + 4 with bottlenecks (paper, sec. 4).
        compression: output channels of a transition as a fraction of its input channels, in ``notebook`` of the growth
            rate.
        drop_rate: probability of dropout after each convolution but the first; default 0.
        block: implementation of the dense blocks, see `Architecture`.

    Raises:
        ConfigError: the network cannot be built; one line per reason, ``model.<key>: problem; remedy``.
    """
    if variant not in _VARIANTS:
        raise ConfigError(f"model.variant: there is no {variant!r}; choose from {', '.join(VARIANTS)}")
    preset = _VARIANTS[variant]
    k = preset.growth_rate if growth_rate is None else growth_rate
    family = preset.family if compression is None else {**preset.family, "compression": compression}
    layers, problems = _layers(variant, num_layers, depth)
    arch = Architecture(
        growth_rate=k,
        num_layers=layers,
        num_classes=num_classes,
        # At least 1, or a growth rate of 0 would be reported as an invalid `stem_channels`, which is not a setting.
        stem_channels=preset.stem_channels(max(k, 1)),
        drop_rate=drop_rate or 0.0,
        image_size=image_size,
        block=block,
        **family,
    )
    if problems := problems + arch.problems():
        raise ConfigError("\n".join(problems))
    return arch


def _layers(
    variant: str, num_layers: int | Sequence[int] | None, depth: int | None
) -> tuple[tuple[int, ...], list[str]]:
    """Return the number of layers of each block, and the problems of the depth, which is then ignored."""
    preset, problem = _VARIANTS[variant], None
    unit = preset.depth_unit
    if depth is not None:
        if unit is None:
            problem = f"{variant} has no setting for the depth; use model.num_layers instead"
        elif num_layers is not None:
            problem = "it is given together with model.num_layers, which it determines; remove one of them"
        else:
            per_block, rest = divmod(depth - 4, unit)
            if per_block >= 1 and rest == 0:
                num_layers = per_block
            else:
                low, high = per_block * unit + 4, (per_block + 1) * unit + 4
                nearest = f"{low} or {high}" if per_block >= 1 else f"{unit + 4} or more"
                problem = f"{depth} is not a depth of {variant}: depth - 4 must be a multiple of {unit}; use {nearest}"
    if num_layers is None:
        num_layers = preset.num_layers
    layers = (num_layers,) * len(preset.num_layers) if isinstance(num_layers, int) else tuple(num_layers)
    return layers, [] if problem is None else [f"model.depth: {problem}"]

"""The named nets: which numbers each stands for, what may be asked of it, and the factory that builds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from densenet_dist.errors import ConfigError
from densenet_dist.model.architecture import Architecture, BlockForm

if TYPE_CHECKING:
    from densenet_dist.model.densenet import DenseNet

# What a variant's name fixes of an `Architecture`; its defaults are the paper's DenseNet for CIFAR.
_PAPER: Final[Mapping[str, Any]] = {}
_PAPER_BC: Final[Mapping[str, Any]] = {"bn_size": 4, "compression": 0.5}
_IMAGENET: Final[Mapping[str, Any]] = {**_PAPER_BC, "stem": "imagenet", "init": "torchvision"}
_NOTEBOOK: Final[Mapping[str, Any]] = {
    "compression_of": "growth_rate",
    # Keras' BatchNormalization has momentum 0.99, the weight of the *old* statistics, and epsilon 1e-3.
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
    """The stem's width from the growth rate."""
    depth_unit: int | None = None
    """Convolutions that one more layer in each of the three blocks adds; None where depth names no such net."""


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
"""The names :func:`densenet` knows."""


def densenet(
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
) -> DenseNet:
    """Build a named DenseNet; what is None is the variant's own.

    ===================  =====================================================  ===========================
    variant              source                                                 growth rate, layers
    ===================  =====================================================  ===========================
    ``notebook``         the Keras notebook this project began with             35, 4 blocks of 12
    ``densenet``         paper, table 2: DenseNet for CIFAR                     12, 3 blocks of 12 (depth 40)
    ``densenet_bc``      paper, table 2: DenseNet-BC for CIFAR                  12, 3 blocks of 16 (depth 100)
    ``densenet121`` ...  paper, table 1, and torchvision, whose weights fit     32 (48 in 161), 4 blocks
    ===================  =====================================================  ===========================

    Args:
        variant: one of :data:`VARIANTS`.
        num_classes: logits an image gets.
        image_size: side of the square images in pixels.
        growth_rate: maps each layer adds (k).
        num_layers: layers in every block of the variant's own number of blocks, or in each of any number of blocks.
        depth: instead of ``num_layers``, for the paper's CIFAR nets: all layers with weights, L = 3 n + 4 for n layers
            a block, or 6 n + 4 with bottlenecks (paper, sec. 4).
        compression: a transition's width as a share of the maps it reads, or, in ``notebook``, of the growth rate.
        drop_rate: dropout after every convolution but the first; 0 unless given.
        block: form of the dense blocks.

    Raises:
        ConfigError: no such net can be built; one line for each reason.
    """
    architecture = variant_architecture(
        variant,
        num_classes=num_classes,
        image_size=image_size,
        growth_rate=growth_rate,
        num_layers=num_layers,
        depth=depth,
        compression=compression,
        drop_rate=drop_rate,
        block=block,
    )
    from densenet_dist.model.densenet import DenseNet

    return DenseNet(architecture)


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
    """Settle the net that :func:`densenet` makes of the same arguments, without building anything.

    Raises:
        ConfigError: it cannot be built; one line a problem, each of the form
            ``model.<key>: what is wrong; how to mend it``.
    """
    if variant not in _VARIANTS:
        raise ConfigError(f"model.variant: there is no {variant!r}; choose from {', '.join(VARIANTS)}")
    preset = _VARIANTS[variant]
    k = preset.growth_rate if growth_rate is None else growth_rate
    family = preset.family if compression is None else {**preset.family, "compression": compression}
    arch = Architecture(
        growth_rate=k,
        num_layers=_layers(preset, num_layers, depth),
        num_classes=num_classes,
        # At least 1, or a growth rate of 0 would be reported under the name of a number nobody gave.
        stem_channels=preset.stem_channels(max(k, 1)),
        drop_rate=drop_rate or 0.0,
        image_size=image_size,
        block=block,
        **family,
    )
    if problems := _depth_problems(variant, num_layers, depth) + arch.problems():
        raise ConfigError("\n".join(problems))
    return arch


def _layers(preset: _Variant, num_layers: int | Sequence[int] | None, depth: int | None) -> tuple[int, ...]:
    """Settle the layers of each block; a depth that fits no net counts as none, and is complained of elsewhere."""
    blocks = len(preset.num_layers)
    if num_layers is not None:
        return (num_layers,) * blocks if isinstance(num_layers, int) else tuple(num_layers)
    if depth is not None and preset.depth_unit is not None and depth >= preset.depth_unit + 4:
        return ((depth - 4) // preset.depth_unit,) * blocks
    return preset.num_layers


def _depth_problems(variant: str, num_layers: int | Sequence[int] | None, depth: int | None) -> list[str]:
    unit = _VARIANTS[variant].depth_unit
    if depth is None:
        return []
    if unit is None:
        return [f"model.depth: {variant} is not named by its depth; give model.num_layers instead"]
    if num_layers is not None:
        return ["model.depth: it is given together with model.num_layers, and each settles the other; leave one out"]
    layers, rest = divmod(depth - 4, unit)
    if layers >= 1 and rest == 0:
        return []
    below, above = layers * unit + 4, (layers + 1) * unit + 4
    nearest = (
        f"{below} and {above} are the nearest that fit" if layers >= 1 else f"{unit + 4} is the smallest that fits"
    )
    return [f"model.depth: {depth} makes no {variant}, whose depth - 4 must be a multiple of {unit}; {nearest}"]

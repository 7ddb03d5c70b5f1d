"""The forms of the dense block by name.

Every form holds the parameters and buffers of `DenseLayer` under the same names: a state dict of one loads into any.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from densenet_dist.errors import ConfigError
from densenet_dist.model.dense_block import DenseBlock, NormFactory
from densenet_dist.model.fused_block import FusedDenseBlock

BLOCK_FORMS: Final[Mapping[str, type[DenseBlock]]] = MappingProxyType(
    {"reference": DenseBlock, "fused": FusedDenseBlock}
)
"""The forms a block can take."""

FORM_NAMES: Final = ("reference", "fused", "auto")
"""What ``model.block`` may be; auto is the fused form, which computes as the reference where it has no kernels."""


def form_problems(form: str) -> list[str]:
    """Say what is wrong with the name of a form: one line, or nothing."""
    if form in FORM_NAMES:
        return []
    return [f"model.block: there is no form {form!r}; choose from {', '.join(FORM_NAMES)}"]


def dense_block(
    form: str,
    *,
    num_layers: int,
    in_channels: int,
    growth_rate: int,
    bn_size: int | None,
    drop_rate: float,
    norm: NormFactory,
) -> DenseBlock:
    """Make a dense block of the named form; arguments and shapes as for `DenseBlock`.

    Raises:
        ConfigError: there is no such form.
    """
    if problems := form_problems(form):
        raise ConfigError("\n".join(problems))
    return BLOCK_FORMS["fused" if form == "auto" else form](
        num_layers=num_layers,
        in_channels=in_channels,
        growth_rate=growth_rate,
        bn_size=bn_size,
        drop_rate=drop_rate,
        norm=norm,
    )

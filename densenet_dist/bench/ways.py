"""The ways in which ``bench model`` runs a net."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from densenet_dist.config import to_dict, validate
from densenet_dist.schema import Config


class Way(NamedTuple):
    """How an arm runs the net: the form of its blocks, and what is done with it."""

    block: str
    compiled: bool = False
    captured: bool = False


WAYS: Final[Mapping[str, Way]] = MappingProxyType(
    {
        "reference": Way("reference"),
        "compiled": Way("reference", compiled=True),
        "fused": Way("fused"),
        "graph": Way("fused", captured=True),
        "padded": Way("padded"),
        "compiled_graph": Way("reference", compiled=True, captured=True),
    }
)
"""Every arm."""

ARMS: Final = ("reference", "compiled", "fused", "graph")
"""Those that are measured unless others are asked for."""


def configured_for(config: Config, arm: str) -> Config:
    """The configuration with the form of the dense block that the arm runs.

    Raises:
        ConfigError: there is no such form.
    """
    plain = to_dict(config)
    plain["model"]["block"] = "fused" if WAYS[arm].block == "fused" else "reference"
    return validate(plain)

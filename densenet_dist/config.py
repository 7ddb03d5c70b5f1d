"""A run's configuration: defaults <- YAML files <- ``key=value``.

The settings themselves, with their meanings, are in `densenet_dist.schema`. `load_config` merges, validates and
reports *all* problems at once, each with its full key, before any work starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from densenet_dist import yaml_settings
from densenet_dist.schema import Config, conflicts
from densenet_dist.typed_settings import Settings
from densenet_dist.yaml_settings import merge, nest, read_override, read_yaml

_HINTS: Final = {
    "batch_size": "use train.global_batch_size, the number of images per step over all workers",
    "gradient_accumulation": "use train.grad_accum_steps",
    "gradient_accumulation_steps": "use train.grad_accum_steps",
    "num_classes": "the number of classes comes from the data",
}
"""Advice for unknown keys, by the last part of the key."""

SETTINGS: Final = Settings(Config, conflicts, _HINTS)
validate, to_dict = SETTINGS.validate, SETTINGS.to_dict


def load_config(*sources: str | Path | Mapping[str, Any] | Config) -> Config:
    """Merge `sources` over the defaults, left to right, and validate the result.

    Args:
        sources: paths of YAML files; ``dotted.key=value`` strings with YAML values; mappings, nested or with dotted
            keys; or complete configurations. If none sets ``name``, it is the stem of the last file.

    Raises:
        ConfigError: listing every problem, one per line.

    Examples:
        >>> config = load_config({"name": "small", "model": {"growth_rate": 12}}, "train.epochs=3")
        >>> longer = load_config(config, "train.epochs=6", "name=longer")
        >>> longer.name, longer.model.growth_rate, longer.train.epochs
        ('longer', 12, 6)
        >>> load_config("train.epoch=3")
        Traceback (most recent call last):
        densenet_dist.errors.ConfigError: train.epoch: unknown key; did you mean train.epochs?
    """
    merged: dict[str, Any] = {}
    name: dict[str, str] = {}
    for source in sources:
        if isinstance(source, Config):
            layer = to_dict(source)
        elif isinstance(source, Mapping):
            layer = nest(source)
        elif isinstance(source, str) and "=" in source and not os.path.exists(source):  # a file's name may contain =
            layer = read_override(source)
        else:
            layer = read_yaml(Path(source))
            stem = name_of_file(source)
            name = {"name": stem} if stem else name
        merge(merged, layer)
    return validate(name | merged)


def name_of_file(path: str | Path) -> str:
    """Return the default name of a run: the stem of the file, with invalid characters replaced."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).stem).lstrip("._-")[:100]


def to_yaml(config: Config) -> str:
    """Format a configuration as YAML that `load_config` reads back to an equal `Config`."""
    return yaml_settings.to_yaml(to_dict(config))

"""A run's configuration: defaults <- YAML files <- ``key=value``.

`densenet_dist.schema` defines the settings. `load_config` merges, validates and reports *all* problems at once, each
with its full key, before any work starts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from densenet_dist import custom, yaml_settings
from densenet_dist.conflicts import conflicts
from densenet_dist.custom_options import check_options, merge_layer, register_functions
from densenet_dist.object_store import is_downloaded
from densenet_dist.schema import Config
from densenet_dist.settings import Settings
from densenet_dist.yaml_settings import find_file, is_override, nest, read_override, read_yaml

SETTINGS: Final = Settings(Config, conflicts)
_STORED: Final = ("env.json", "checkpoints/manifest.json", "sweep.json")
"""The folder of a run or sweep that has begun has at least one of these files."""
to_dict = SETTINGS.to_dict


def validate(values: Mapping[str, Any], *, combinations: bool = True) -> Config:
    """Do what `Settings.validate` does, and check the options of custom parts."""
    return check_options(SETTINGS.validate(values, combinations=combinations))


def load_config(*sources: str | Path | Mapping[str, Any] | Config, trust: bool | None = None) -> Config:
    """Merge `sources` over the defaults, left to right, and validate the result.

    Args:
        sources: paths of YAML files; ``dotted.key=value`` strings with YAML values; mappings, nested or with dotted
            keys, and with functions or classes for custom parts (docs/extending.md); or complete configurations. If
            none sets ``name``, it is the stem of the last file.
        trust: whether custom parts named in files and mappings may be imported, which runs their code. None: yes,
            unless a file belongs to a run or sweep or comes from an object store, see `is_stored`. Those named in
            ``key=value`` strings or passed as functions may always be; a `Config` adds none.

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
    return validate(merged(*sources, trust=trust))


def merged(*sources: str | Path | Mapping[str, Any] | Config, trust: bool | None = None) -> dict[str, Any]:
    """Merge sources to nested values, without the defaults; arguments and errors are those of `load_config`."""
    values: dict[str, Any] = {}
    name: dict[str, str] = {}
    for source in sources:
        trusted = trust is not False
        if isinstance(source, Config):
            layer, trusted = to_dict(source), False
        elif isinstance(source, Mapping):
            layer = nest(source)
            register_functions(layer)
        elif is_override(source):
            layer, trusted = read_override(str(source)), True
        else:
            layer, trusted = read_yaml(source), bool(trust or (trusted and not is_stored(source)))
            stem = name_of_file(source)
            name = {"name": stem} if stem else name
        if trusted:
            custom.allow(found for _, found in custom.names_in(layer))
        merge_layer(values, layer)
    return name | values


def is_stored(path: str | Path) -> bool:
    """Return whether a file belongs to a run or sweep or comes from an object store, so may be another person's."""
    folder = find_file(path).absolute().parent
    return any(os.path.exists(folder / name) for name in _STORED) or is_downloaded(folder)


def load_run_config(path: str | Path, *overrides: str | Mapping[str, Any], trust: bool = False) -> Config:
    """Load the config.yaml of a run, of any version, with changes; `trust` and errors are those of `load_config`."""
    return load_config(path, *migrate_test_limit(read_yaml(path)), *overrides, trust=trust)


def migrate_test_limit(values: Mapping[str, Any]) -> list[str]:
    """Return the override that makes a stored configuration limit the test images as it did when it was written.

    Versions without ``data.test_limit`` limited them by ``data.limit``. Stored configurations have every setting.
    """
    data = values.get("data")
    if not isinstance(data, Mapping) or data.get("limit") is None or "test_limit" in data:
        return []
    return [f"data.test_limit={json.dumps(data['limit'], default=str)}"]


def name_of_file(path: str | Path) -> str:
    """Return the default name of a run: the stem of the file, with invalid characters replaced."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).stem).lstrip("._-")[:100]


def to_yaml(config: Config) -> str:
    """Format a configuration as YAML that `load_config` reads back to an equal `Config`."""
    return yaml_settings.to_yaml(to_dict(config))

"""Settings in YAML files and ``dotted.key=value``, read and merged, whatever they are about."""

from __future__ import annotations

import copy
import difflib
import re
import unicodedata
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from densenet_dist import bundled
from densenet_dist.errors import ConfigError

_MOST_VALUES: Final = 10_000
_DEEPEST: Final = 40


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses duplicate keys, characters that no text has and what aliases blow up, and reads
    1e-3 as a number, as YAML 1.2 does."""

    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.composed += 1
        if self.composed > _MOST_VALUES:  # before all of a large file is read, which takes a minute
            raise yaml.composer.ComposerError(None, None, f"it holds more than {_MOST_VALUES} values", None)
        return super().compose_node(parent, index)

    def construct_document(self, node: yaml.Node) -> Any:
        count, depth = _extent(node, {})
        if count > _MOST_VALUES or depth > _DEEPEST:
            what = f"it holds more than {_MOST_VALUES} values" if count > _MOST_VALUES else "it is nested too deep"
            raise yaml.constructor.ConstructorError(None, None, f"{what}, aliases written out", node.start_mark)
        return super().construct_document(node)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        # What no path may hold (NUL), no file (surrogates) and no terminal should get; escapes can write all of it.
        if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n\r" for letter in str(value)):
            raise yaml.constructor.ConstructorError(None, None, f"{value!r} holds no text", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # a list under the tag !!map
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a single word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands here a second time", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """`yaml.SafeDumper` that quotes every text which `_Loader` would read as something else."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def _parsed(text: str) -> Any:
    """Plain values of YAML.

    Raises:
        yaml.YAMLError: it is none, or more than plain values.
        ValueError, RecursionError: a date or a number that cannot be, or far too many brackets.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # PyYAML's own, such as of !!int ''
        raise yaml.YAMLError(f"a value is not what its tag (!!...) says: {error}") from error


def _extent(node: yaml.Node, known: dict[yaml.Node, tuple[int, int]]) -> tuple[int, int]:
    """How many values a node has with all aliases written out, and how deep it is; one that holds itself ends there."""
    if node not in known:
        known[node] = 0, 0
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        inner = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
        found = [_extent(part, known) for part in inner]
        known[node] = 1 + sum(count for count, _ in found), 1 + max((depth for _, depth in found), default=0)
    return known[node]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file that must hold a mapping; one that comes with the package goes by its name (`bundled.find`).

    Raises:
        ConfigError: where the file is missing, is not YAML, repeats a key, or holds something else.
    """
    path = bundled.find(path)
    try:
        values = _parsed(path.read_text(encoding="utf-8"))
        values = nest(values) if isinstance(values, dict) else values
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}{_similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the config file {path} is not valid YAML: {error}") from None
    except (ValueError, RecursionError) as error:  # a date such as 2026-13-01, a number of thousands of digits
        raise ConfigError(f"the config file {path} cannot be understood: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"the config file {path} holds a {type(values).__name__}; it must hold keys and values")
    return values


def read_override(text: str) -> dict[str, Any]:
    """Read ``dotted.key=value``, its value YAML, as nested values.

    Raises:
        ConfigError: where it is none.
    """
    key, _, value = text.partition("=")
    if not key.strip():
        raise ConfigError(f"{text!r} has no key before its =")
    try:
        return nest({key.strip(): _parsed(value)})
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in {text!r} is not valid YAML: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the value in {text!r} cannot be understood: {error}") from None


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that `read_yaml` reads back the same."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, default_flow_style=None)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one level of dotted keys: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as levels: ``{"a.b": 1}`` becomes ``{"a": {"b": 1}}``."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = str(key).split(".")
        if len(parents) > _DEEPEST:
            raise ConfigError(f"the key {str(key)[:40]}... has {len(parents) + 1} parts; no setting lies so deep")
        layer: dict[str, Any] = {last: nest(value) if isinstance(value, Mapping) else value}
        for parent in reversed(parents):
            layer = {parent: layer}
        merge(nested, layer)
    return nested


def merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Lay nested values over others, in place."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def _similar_file(path: Path) -> str:
    names = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=1)]
    near += difflib.get_close_matches(path.stem, bundled.names(), n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return "" if path.suffix else "; what comes with the package is shown by: densenet-dist config --list"

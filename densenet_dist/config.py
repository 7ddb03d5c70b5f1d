"""Typed configuration: defaults <- YAML files <- ``key=value``.

The settings themselves, with their meanings, are in `densenet_dist.schema`. `load_config` merges, validates and
reports *all* problems at once, each with its full key, before any work starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from pydantic import TypeAdapter, ValidationError

from densenet_dist.errors import ConfigError
from densenet_dist.schema import Config, impossible

_ADAPTER = TypeAdapter(Config)
_Path: TypeAlias = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses duplicate keys and reads 1e-3 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
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


def load_config(*sources: str | Path | Mapping[str, Any]) -> Config:
    """Merge `sources` over the defaults, left to right, and validate the result.

    Args:
        sources: a path of a YAML file; a ``dotted.key=value`` string, its value read as YAML; or a mapping, nested or
            with dotted keys (a search trial's overrides). Where none gives a ``name``, the last file's stem becomes it.

    Raises:
        ConfigError: with every problem found, one a line.
    """
    merged: dict[str, Any] = {}
    name: dict[str, str] = {}
    for source in sources:
        if isinstance(source, Mapping):
            layer = _nest(source)
        elif isinstance(source, str) and "=" in source and not os.path.exists(source):
            layer = _override(source)
        else:
            layer = read_yaml(Path(source))
            stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(source).stem).lstrip("._-")[:100]
            name = {"name": stem} if stem else name
        _merge(merged, layer)
    return validate(name | merged)


def validate(values: Mapping[str, Any]) -> Config:
    """Turn nested plain values into a `Config`, or raise one `ConfigError` that lists every problem."""
    try:
        # JSON's strict mode takes lists for tuples and mappings for groups, and nothing else for something else.
        config = _ADAPTER.validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError(_join(_problems(error))) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"the configuration holds a value that cannot be written down: {error}") from None
    problems = list(impossible(config))
    if problems:
        raise ConfigError(_join(problems))
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as nested plain values, ready for YAML or JSON."""
    values = _ADAPTER.dump_python(config, mode="json")
    assert isinstance(values, dict)
    return values


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal `Config`."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, default_flow_style=None)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one level of dotted keys: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file that must hold a mapping.

    Raises:
        ConfigError: where the file is missing, is not YAML, repeats a key, or holds something else.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a subclass of SafeLoader
        values = _nest(values) if isinstance(values, dict) else values
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


def _override(text: str) -> dict[str, Any]:
    key, _, value = text.partition("=")
    if not key.strip():
        raise ConfigError(f"{text!r} has no key before its =")
    try:
        return _nest({key.strip(): yaml.load(value, Loader=_Loader)})
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in {text!r} is not valid YAML: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the value in {text!r} cannot be understood: {error}") from None


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = str(key).split(".")
        layer: dict[str, Any] = {last: _nest(value) if isinstance(value, Mapping) else value}
        for parent in reversed(parents):
            layer = {parent: layer}
        _merge(nested, layer)
    return nested


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = _nest(value) if isinstance(value, Mapping) else value


def _problems(error: ValidationError) -> list[str]:
    """One line for each setting that is wrong."""
    lines: dict[_Path, str] = {}
    for item in error.errors():
        path = _real_path(item["loc"])
        if item["type"] == "missing":  # a list that is too short: the input is all of it
            path = path[:-1]
        unknown = item["type"] in ("unexpected_keyword_argument", "extra_forbidden")
        lines[path] = _unknown(path) if unknown else _wrong(path, item["input"])
    # Of a list that could also be a single number, only the wrong element matters.
    return [line for path, line in lines.items() if not any(path == other[:-1] for other in lines)]


def _unknown(path: _Path) -> str:
    *group, key = (str(part) for part in path)
    known = list(_at(_DEFAULTS, group))
    everywhere = _all_keys(_DEFAULTS)
    near = [".".join([*group, name]) for name in difflib.get_close_matches(key, known, n=1)]
    near += [other for other in everywhere if other.split(".")[-1] == key]
    near += [other for other in everywhere if difflib.get_close_matches(key, [other.split(".")[-1]], cutoff=0.8)]
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"{_dotted(path)}: unknown key; {hint}"


def _wrong(path: _Path, value: Any) -> str:
    shown = "null" if value is None else f"{value!r} ({type(value).__name__})"
    if len(shown) > 70:
        shown = f"{shown[:50]}... ({type(value).__name__})"
    group = _at(_DEFAULTS, path)
    if isinstance(group, dict):
        return f"{_dotted(path)}: holds {shown}, but is a group of settings: {', '.join(group)}"
    schema = _ADAPTER.json_schema()
    return f"{_dotted(path)}: must be {_expected(_schema_at(schema, path))}, not {shown}"


def _expected(schema: Mapping[str, Any]) -> str:
    """What a JSON schema asks for, in words."""
    if "anyOf" in schema:
        options = sorted(schema["anyOf"], key=lambda option: option["type"] == "array")  # the longest words last
        return " or ".join(_expected(option) for option in options)
    if "const" in schema or "enum" in schema:
        return " or ".join(repr(option) for option in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        items = schema.get("prefixItems", [schema.get("items")])
        count = f"{len(items)} values" if "prefixItems" in schema else "values"
        return f"a list of {count}, each {_expected(items[0])}"
    words = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "text"}
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    limits += [f"that matches {schema['pattern']}"] if "pattern" in schema else []
    return " ".join([str(words.get(schema["type"], schema["type"])), " and ".join(limits)]).strip()


def _schema_at(schema: dict[str, Any], path: _Path) -> dict[str, Any]:
    level = schema
    for part in path:
        if isinstance(part, int):
            lists = [option for option in level.get("anyOf", [level]) if option.get("type") == "array"]
            level = lists[0]["items"] if "items" in lists[0] else lists[0]["prefixItems"][part]
        else:
            level = level["properties"][part]
        if "$ref" in level:
            level = schema["$defs"][level["$ref"].rpartition("/")[2]]
    return level


def _real_path(location: Sequence[str | int]) -> _Path:
    # pydantic appends which member of a union it tried; only keys and list positions mean anything to a reader.
    path: list[str | int] = []
    for part in location:
        if isinstance(part, int) or isinstance(_at(_DEFAULTS, path), dict):
            path.append(part)
    return tuple(path)


def _at(values: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _dotted(path: _Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]


def _all_keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    groups = [(key, value) for key, value in values.items() if isinstance(value, Mapping)]
    below = [key for name, value in groups for key in _all_keys(value, f"{prefix}{name}.")]
    return [prefix + key for key in values] + below


def _similar_file(path: Path) -> str:
    names = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _join(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the configuration:\n" + "\n".join(f"  {problem}" for problem in problems)


_DEFAULTS = dataclasses.asdict(Config())

"""Read and merge settings from YAML files, also the bundled ones, and ``dotted.key=value``.

All functions that read raise a ConfigError that says what is wrong, and where.
"""

from __future__ import annotations

import copy
import difflib
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import yaml

from densenet_dist.errors import ConfigError

_IN_WHEEL: Final = Path(__file__).parent / "configs"
BUNDLED: Final = _IN_WHEEL if _IN_WHEEL.is_dir() else Path(__file__).parents[1] / "configs"
"""The folder of the configurations: in the installed package, or at the root of a checkout."""
_MAX_VALUES: Final = 10_000
_MAX_DEPTH: Final = 40
_TAG: Final = "tag:yaml.org,2002:"
_INT: Final = re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$")
_FLOAT: Final = re.compile(r"[-+]?((\.[0-9]|[0-9][0-9_]*\.?)[0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))$|\.(nan|NaN)$")

_problem = partial(yaml.MarkedYAMLError, None, None)
"""An error with a message and, if known, the place in the file."""


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` that reads numbers as YAML 1.2 does: 010 is 10, 1e-3 is a number, 1:30 and 2026-01-01 are text.

    It refuses tags, duplicate keys, control characters, and aliases that expand to too many values.
    """

    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self.composed += 1
        if self.composed > _MAX_VALUES:  # stop here: reading all of a large file takes a minute
            raise _problem(f"it holds more than {_MAX_VALUES} values")
        if tag := getattr(event, "tag", None):
            raise _problem(f"the tag {tag.replace(_TAG, '!!')} cannot be used; put text in quotes", event.start_mark)
        return super().compose_node(parent, index)

    def construct_document(self, node: yaml.Node) -> Any:
        count, depth = _checked_extent(node, {})
        if count > _MAX_VALUES or depth > _MAX_DEPTH:
            what = f"it holds more than {_MAX_VALUES} values" if count > _MAX_VALUES else "it is nested too deep"
            raise _problem(f"{what}, with aliases expanded", node.start_mark)
        return super().construct_document(node)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        return int(text, 0 if text.lstrip("+-")[:2] in ("0b", "0x") else 10)


def _checked_extent(node: yaml.Node, known: dict[yaml.Node, tuple[int, int]]) -> tuple[int, int]:
    """Return the number of values of a node with all aliases expanded, and its depth; cycles are not followed.

    Raises:
        MarkedYAMLError: it contains control characters, a key that is not a single word, or a key twice.
    """
    if node in known:
        return known[node]
    known[node] = 0, 0
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.ScalarNode):
        # Escapes can produce characters that are invalid in paths (NUL) or files (surrogates), or control a terminal.
        if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n\r" for letter in node.value):
            raise _problem(f"{node.value!r} contains control characters", node.start_mark)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("a key must be a single word", key.start_mark)
            if key.value in seen:
                raise _problem(f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
            parts += key, value
    else:
        parts = node.value
    found = [_checked_extent(part, known) for part in parts]
    known[node] = 1 + sum(count for count, _ in found), 1 + max((depth for _, depth in found), default=0)
    return known[node]


class _Dumper(yaml.SafeDumper):
    """`yaml.SafeDumper` that quotes text which `_Loader` or another YAML reader would read as another type."""


_Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence(f"{_TAG}seq", items, flow_style=True))
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_int)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (f"{_TAG}null", f"{_TAG}bool", f"{_TAG}merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
    _kind.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


def bundled_names() -> list[str]:
    """Return the names of the configurations in the package."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))


def find_file(source: str | Path) -> Path:
    """Resolve the name of a configuration file.

    An existing file is used as it is. Otherwise ``quickstart``, ``quickstart.yaml`` and ``configs/quickstart.yaml`` (as
    in documentation and help) name the configuration in the package.
    """
    path = Path(os.path.expanduser(source))
    # Unlike Path.is_file, isfile raises no error for invalid names (too long, a zero byte).
    if os.path.isfile(path) or str(path.parent) not in (".", "configs") or path.suffix not in ("", ".yaml"):
        return path
    bundled = BUNDLED / f"{path.stem}.yaml"
    return bundled if os.path.isfile(bundled) else path


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that contains a mapping; the name of a bundled one is enough."""
    path = find_file(path)
    file = f"the config file {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}{_similar_file(path)}") from None
    except (OSError, ValueError) as error:  # not UTF-8, or a zero byte in the path
        raise ConfigError(f"{file} cannot be read: {error}") from None
    with _yaml_errors(file):
        values = _parsed(text)
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise ConfigError(f"{file} holds a {type(values).__name__}; it must hold keys and values")
        try:
            return nest(values)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None


def is_override(source: str | Path) -> bool:
    """Return whether an argument is ``dotted.key=value`` rather than a file, whose name may contain ``=`` too."""
    return isinstance(source, str) and "=" in source and not os.path.exists(source)


def read_override(text: str) -> dict[str, Any]:
    """Parse ``dotted.key=value``, where the value is YAML, to nested values."""
    key, _, value = text.partition("=")
    if not key.strip():
        raise ConfigError(f"{text!r} has no key before its =")
    with _yaml_errors(f"the value in {text!r}"):
        return nest({key.strip(): _parsed(value)})


def _parsed(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506  # a subclass of SafeLoader


@contextmanager
def _yaml_errors(what: str) -> Iterator[None]:
    try:
        yield
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not valid YAML: {error}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits
        raise ConfigError(f"{what} cannot be understood: {error}") from None


def to_yaml(values: Mapping[str, Any]) -> str:
    """Format plain values as YAML that `read_yaml` reads back unchanged."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, default_flow_style=False)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Convert nested values to dotted keys: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nest(flat: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Convert dotted keys to nested values: ``{"a.b": 1}`` becomes ``{"a": {"b": 1}}``; `prefix` is for errors."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = str(key).split(".")
        if len(parents) > _MAX_DEPTH:
            raise ConfigError(f"the key {str(key)[:40]}... has {len(parents) + 1} parts, more than any setting")
        layer: dict[str, Any] = {last: nest(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value}
        for parent in reversed(parents):
            layer = {parent: layer}
        merge(nested, layer, once=prefix)
    return nested


def merge(into: dict[str, Any], layer: Mapping[str, Any], *, once: str | None = None) -> None:
    """Merge nested values into others in place.

    If `once` is given, replacing a value is an error; `once` is then the prefix of the key in the message.
    """
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value, once=None if once is None else f"{once}{key}.")
        elif once is not None and key in into:
            raise ConfigError(f"the key {once + key!r} is given twice; dotted and nested keys name the same setting")
        else:
            into[key] = copy.deepcopy(value)


def _similar_file(path: Path) -> str:
    names = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=1)]
    near += difflib.get_close_matches(path.stem, bundled_names(), n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return "" if path.suffix else "; what comes with the package is shown by: densenet-dist config --list"

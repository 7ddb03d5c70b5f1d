"""Plain nested values against a frozen dataclass of settings: types, limits, and what is said of wrong ones."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeAlias, TypeVar

from pydantic import TypeAdapter, ValidationError

from densenet_dist.errors import ConfigError

T = TypeVar("T")
_Path: TypeAlias = tuple[str | int, ...]
_MOST_SHOWN: Final = 30
_LONGEST: Final = 200


class Setting(NamedTuple):
    """What there is to know of one key.

    Attributes:
        key: dotted.
        wanted: its type, limits and choices, in the words of the message about a wrong value.
        default: a plain value; of a group of settings, all of its defaults.
        meaning: its docstring.
        is_group: whether settings are below it.
    """

    key: str
    wanted: str
    default: Any
    meaning: str
    is_group: bool


class Settings(Generic[T]):
    """Turns plain values into settings and back.

    Args:
        kind: a frozen pydantic dataclass, every field with a default.
        impossible: the combinations that are each legal alone but cannot work together, one line each.
    """

    def __init__(self, kind: type[T], impossible: Callable[[T], Iterable[str]]) -> None:
        self._adapter = TypeAdapter(kind)
        self._impossible = impossible
        self._defaults: dict[str, Any] = dataclasses.asdict(kind())  # type: ignore[call-overload]

    def validate(self, values: Mapping[str, Any], *, combinations: bool = True) -> T:
        """Settings of these values, defaults for the rest.

        Args:
            values: nested plain values.
            combinations: whether they must also be able to work together.

        Raises:
            ConfigError: with every problem found, one a line.
        """
        try:
            # JSON's strict mode takes lists for tuples and mappings for groups, and nothing else for something else.
            settings = self._adapter.validate_json(json.dumps(values, default=str))
        except ValidationError as error:
            raise ConfigError(self._problems(error)) from None
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"the configuration holds a value that cannot be written down: {error}") from None
        problems = list(self._impossible(settings)) if combinations else []
        if problems:
            raise ConfigError(join_problems(problems))
        return settings

    def to_dict(self, settings: T) -> dict[str, Any]:
        """Nested plain values, ready for YAML or JSON."""
        values = self._adapter.dump_python(settings, mode="json")
        assert isinstance(values, dict)
        return values

    def described(self) -> Iterator[Setting]:
        """Every key with its meaning: of each group first its own keys, then the groups in it, each at once whole."""
        schema = self._adapter.json_schema()
        defaults = self.to_dict(self._adapter.validate_json("{}"))
        for key in _keys_in_order(defaults):
            path: _Path = tuple(key.split("."))
            level, value = _schema_at(schema, path), _at(defaults, path)
            is_group = isinstance(value, dict)
            meaning = " ".join(str(level.get("description", "")).split())
            yield Setting(key, "" if is_group else _expected(level), value, meaning, is_group)

    def unknown_key(self, dotted: str) -> str | None:
        """What is wrong with a dotted key; None where it names one setting."""
        path = tuple(dotted.split("."))
        group, known = _at(self._defaults, path[:-1]), _at(self._defaults, path)
        if not isinstance(group, dict) or path[-1] not in group:
            return self._unknown(path)
        return f"{dotted}: is a group of settings: {', '.join(known)}" if isinstance(known, dict) else None

    def _problems(self, error: ValidationError) -> str:
        """One line for each setting that is wrong."""
        wrong: dict[_Path, Any] = {}
        for item in error.errors(include_url=False, include_context=False):
            path = self._real_path(item["loc"])
            if item["type"] == "missing":  # a list that is too short: the input is all of it
                path = path[:-1]
            wrong[path] = item
        # Of a list that could also be a single number, only the wrong element matters.
        parents = {path[:-1] for path in wrong if path}
        items = [(path, item) for path, item in wrong.items() if path not in parents]
        return join_problems([self._line(path, item) for path, item in items[:_MOST_SHOWN]], len(items))

    def _line(self, path: _Path, item: Any) -> str:
        if item["type"] == "json_invalid":  # nested too deep, or letters that no text has
            return f"the configuration holds a value that cannot be written down: {item['msg']}"
        unknown = item["type"] in ("unexpected_keyword_argument", "extra_forbidden")
        return self._unknown(path) if unknown else self._wrong(path, item["input"])

    def _unknown(self, path: _Path) -> str:
        *group, key = (str(part) for part in path)
        known = list(_at(self._defaults, group) or [])
        everywhere = _all_keys(self._defaults)
        near = [".".join([*group, name]) for name in difflib.get_close_matches(key, known, n=1)]
        near += [other for other in everywhere if other.split(".")[-1] == key]
        near += [other for other in everywhere if difflib.get_close_matches(key, [other.split(".")[-1]], cutoff=0.8)]
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known or self._defaults)}"
        return f"{_dotted(path)}: unknown key; {hint}"

    def _wrong(self, path: _Path, value: Any) -> str:
        shown = "null" if value is None else f"{value!r} ({type(value).__name__})"
        if len(shown) > 70:
            shown = f"{shown[:50]}... ({type(value).__name__})"
        group = _at(self._defaults, path)
        if isinstance(group, dict):
            return f"{_dotted(path)}: holds {shown}, but is a group of settings: {', '.join(group)}"
        schema = self._adapter.json_schema()
        return f"{_dotted(path)}: must be {_expected(_schema_at(schema, path))}, not {shown}"

    def _real_path(self, location: Sequence[str | int]) -> _Path:
        # pydantic appends which member of a union it tried; only keys and list positions mean anything to a reader.
        path: list[str | int] = []
        for part in location:
            if isinstance(part, int) or isinstance(_at(self._defaults, path), dict):
                path.append(part)
        return tuple(path)


def join_problems(problems: Sequence[str], count: int | None = None) -> str:
    """All problems in one message; `count` says how many there are where only the first are given."""
    count = len(problems) if count is None else count
    if count == 1:
        return problems[0]
    more = [f"... and {count - len(problems)} more"] if count > len(problems) else []
    return f"{count} problems in the configuration:\n" + "\n".join(f"  {line}" for line in [*problems, *more])


def _expected(schema: Mapping[str, Any]) -> str:
    """What a JSON schema asks for, in words."""
    if "anyOf" in schema:
        last = ("array", "object")  # the longest words
        options = sorted(schema["anyOf"], key=lambda option: option["type"] in last)
        return " or ".join(_expected(option) for option in options)
    if "const" in schema or "enum" in schema:
        return " or ".join(repr(option) for option in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        items = schema.get("prefixItems", [schema.get("items")])
        count = f"{len(items)} values" if "prefixItems" in schema else "values"
        return f"a list of {count}, each {_expected(items[0])}"
    if schema["type"] == "object":
        return "a mapping with " + " and ".join(f"{key} ({_expected(of)})" for key, of in schema["properties"].items())
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
        level = _resolved(level, schema)
    return level | {"anyOf": [_resolved(option, schema) for option in level["anyOf"]]} if "anyOf" in level else level


def _resolved(level: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schema["$defs"][level["$ref"].rpartition("/")[2]] if "$ref" in level else level
    return found


def _at(values: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _dotted(path: _Path) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[: _LONGEST + 1])
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _all_keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    groups = [(key, value) for key, value in values.items() if isinstance(value, Mapping)]
    below = [key for name, value in groups for key in _all_keys(value, f"{prefix}{name}.")]
    return [prefix + key for key in values] + below


def _keys_in_order(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    groups = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    yield from (prefix + key for key in values if key not in groups)
    for key, value in groups.items():
        yield prefix + key
        yield from _keys_in_order(value, f"{prefix}{key}.")

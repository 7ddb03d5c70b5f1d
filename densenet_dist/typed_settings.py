"""Plain nested values as a frozen dataclass of settings, checked by pydantic; errors name the full key."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final, Generic, TypeAlias, TypeVar

from pydantic import TypeAdapter, ValidationError

from densenet_dist.credentials import held_credentials
from densenet_dist.errors import ConfigError

T = TypeVar("T")
_Path: TypeAlias = tuple[str | int, ...]
_MOST_SHOWN: Final = 30
_LONGEST: Final = 200


class Settings(Generic[T]):
    """Turns plain values into settings and back.

    Args:
        kind: a frozen pydantic dataclass, every field with a default.
        conflicts: yields a message for each combination of settings that cannot work together.
        hints: what to do instead of using an unknown key, by its last part.

    Attributes:
        adapter: pydantic's, for the JSON schema of all settings.
    """

    def __init__(
        self, kind: type[T], conflicts: Callable[[T], Iterable[str]], hints: Mapping[str, str] | None = None
    ) -> None:
        self.adapter = TypeAdapter(kind)
        self._hints = hints or {}
        self._conflicts = conflicts
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
            settings = self.adapter.validate_json(json.dumps(values, default=lambda path: str(PurePath(path))))
        except ValidationError as error:
            raise ConfigError(self._problems(error)) from None
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"the configuration holds a value that cannot be written down: {error}") from None
        problems = list(self._conflicts(settings)) if combinations else []
        plain = self.to_dict(settings)
        for key in _all_keys(plain):
            value = _at(plain, key.split("."))
            if isinstance(value, str | list):
                problems += held_credentials(key, str(value))
        if problems:
            raise ConfigError(join_problems(problems))
        return settings

    def to_dict(self, settings: T) -> dict[str, Any]:
        """Nested plain values, ready for YAML or JSON."""
        values = self.adapter.dump_python(settings, mode="json")
        assert isinstance(values, dict)
        return values

    def unknown_key(self, dotted: str) -> str | None:
        """What is wrong with a dotted key; None where it names one setting."""
        path = tuple(dotted.split("."))
        group, known = _at(self._defaults, path[:-1]), _at(self._defaults, path)
        if not isinstance(group, dict) or path[-1] not in group:
            return self._unknown(path)
        return f"{dotted}: is a group of settings: {', '.join(known)}" if isinstance(known, dict) else None

    def _problems(self, error: ValidationError) -> str:
        """One line for each setting that is wrong."""
        wrong: dict[_Path, list[Any]] = {}
        for item in error.errors(include_url=False, include_context=False):
            wrong.setdefault(self._key_of(item["loc"]), []).append(item)
        # Of a list that could also be a single number, only the wrong element matters.
        parents = {path[:-1] for path in wrong if path}
        lines = [(path, items) for path, items in wrong.items() if path not in parents]
        return join_problems([self._line(path, items) for path, items in lines[:_MOST_SHOWN]], len(lines))

    def _line(self, path: _Path, items: Sequence[Any]) -> str:
        """What is wrong with one setting; several items where it may be one of several types."""
        kind, value = items[0]["type"], items[0]["input"]
        if kind == "json_invalid":  # nested too deep, or letters that no text has
            return f"the configuration holds a value that cannot be written down: {items[0]['msg']}"
        in_group = isinstance(_at(self._defaults, path[:-1]), dict)
        if in_group and kind in ("unexpected_keyword_argument", "extra_forbidden"):
            return self._unknown(path)
        shown = "null" if value is None else f"{value!r} ({type(value).__name__})"
        if len(shown) > 70:
            shown = f"{shown[:50]}... ({type(value).__name__})"
        group = _at(self._defaults, path)
        if isinstance(group, dict):
            return f"{_dotted(path)}: holds {shown}, but is a group of settings: {', '.join(group)}"
        first, *others = dict.fromkeys(item["msg"] for item in items)
        wanted = " or ".join([first, *(message.removeprefix("Input should be ") for message in others)])
        key = _dotted(path)
        if kind == "string_type" and isinstance(value, (bool, int, float)):
            shown += f'; put text in quotes: {key}: "..." in a file, {key}=\'"..."\' on the command line'
        return f"{key}: {wanted}; got {shown}"

    def _unknown(self, path: _Path) -> str:
        *group, key = (str(part) for part in path)
        if key in self._hints:
            return f"{_dotted(path)}: unknown key; {self._hints[key]}"
        known = list(_at(self._defaults, group) or [])
        everywhere = _all_keys(self._defaults)
        near = [".".join([*group, name]) for name in difflib.get_close_matches(key, known, n=1)]
        near += [other for other in everywhere if other.split(".")[-1] == key]
        near += [other for other in everywhere if difflib.get_close_matches(key, [other.split(".")[-1]], cutoff=0.8)]
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known or self._defaults)}"
        return f"{_dotted(path)}: unknown key; {hint}"

    def _key_of(self, location: Sequence[str | int]) -> _Path:
        """pydantic's location without the name of the type it tried, which follows the key where there are several."""
        depth = next((n for n in range(len(location)) if not isinstance(_at(self._defaults, location[:n]), dict)), None)
        if depth is None or isinstance(location[depth], int):
            return tuple(location)
        return (*location[:depth], *location[depth + 1 :])


def join_problems(problems: Sequence[str], count: int | None = None) -> str:
    """Join problems into one message; `count` is their number if only the first are given."""
    count = len(problems) if count is None else count
    if count == 1:
        return problems[0]
    more = [f"... and {count - len(problems)} more"] if count > len(problems) else []
    return f"{count} problems in the configuration:\n" + "\n".join(f"  {line}" for line in [*problems, *more])


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

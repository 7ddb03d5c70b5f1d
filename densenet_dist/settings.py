"""Convert nested plain values to frozen dataclasses of settings and back, and describe invalid values in messages."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, Generic, TypeAlias, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from densenet_dist.credentials import held_credentials
from densenet_dist.errors import ConfigError
from densenet_dist.yaml_settings import flatten

STRICT: Final = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)
"""The rules of all dataclasses of settings."""
T = TypeVar("T")
_Path: TypeAlias = tuple[str | int, ...]
_MAX_SHOWN: Final = 30
_HINTS: Final = {
    "batch_size": "use train.global_batch_size, the number of images per step over all workers",
    "gradient_accumulation": "use train.grad_accum_steps",
    "gradient_accumulation_steps": "use train.grad_accum_steps",
    "num_classes": "the number of classes comes from the data",
}
"""Advice for unknown keys, by the last part of the key."""


class Settings(Generic[T]):
    """Converts nested plain values to a frozen dataclass of settings and back.

    Args:
        kind: a pydantic dataclass, every field with a default.
        conflicts: yields a message for each combination of settings that cannot work together.
        keys: nested keys of all settings, if not every field has a default.

    Attributes:
        adapter: pydantic's type adapter, which has the JSON schema of all settings.
    """

    def __init__(
        self, kind: type[T], conflicts: Callable[[T], Iterable[str]], keys: dict[str, Any] | None = None
    ) -> None:
        self.adapter = TypeAdapter(kind)
        self._conflicts = conflicts
        self._defaults = self.to_dict(kind()) if keys is None else keys

    def validate(self, values: Mapping[str, Any], *, combinations: bool = True) -> T:
        """Convert nested plain values to settings, with defaults for the rest.

        Args:
            combinations: whether to check that the settings can work together.

        Raises:
            ConfigError: listing every problem, one per line.
        """
        try:
            # Via JSON, because strict mode accepts lists for tuples and mappings for dataclasses only there.
            settings = self.adapter.validate_json(json.dumps(values, default=os.fspath))
        except ValidationError as error:
            raise ConfigError(self._problems(error)) from None
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"the configuration contains a value that cannot be serialized: {error}") from None
        problems = list(self._conflicts(settings)) if combinations else []
        for key, value in flatten(self.to_dict(settings)).items():
            if isinstance(value, str | list):
                problems += held_credentials(key, str(value))
        if problems:
            raise ConfigError(join_problems(problems))
        return settings

    def to_dict(self, settings: T) -> dict[str, Any]:
        """Convert settings to nested plain values, ready for YAML or JSON."""
        values = self.adapter.dump_python(settings, mode="json")
        assert isinstance(values, dict)
        return values

    def unknown_key(self, dotted: str) -> str | None:
        """Return what is wrong with a dotted key, or None if it names a setting."""
        path = tuple(dotted.split("."))
        if isinstance(group := _at(self._defaults, path), dict):
            return f"{dotted}: is a group of settings: {', '.join(group)}"
        return None if dotted in flatten(self._defaults) else self._unknown(path)

    def _problems(self, error: ValidationError) -> str:
        """Format one line for each invalid setting."""
        wrong: dict[_Path, list[Any]] = {}
        for item in error.errors(include_url=False, include_context=False):
            wrong.setdefault(self._key_of(item["loc"]), []).append(item)
        # For a list that could also be a number, pydantic reports both the list and the element: show the element.
        parents = {path[:-1] for path in wrong if path}
        lines = [(path, items) for path, items in wrong.items() if path not in parents]
        return join_problems([self._line(path, items) for path, items in lines[:_MAX_SHOWN]], len(lines))

    def _key_of(self, location: _Path) -> _Path:
        """Return pydantic's location without the name of the tried type, which follows the key of a union."""
        values: Any = self._defaults
        for depth, part in enumerate(location):
            if not isinstance(values, dict):
                rest = location[depth:] if isinstance(part, int) else location[depth + 1 :]
                pairs = pairwise(("", *rest))  # the elements of a list may have several types, too
                return location[:depth] + tuple(p for i, p in pairs if isinstance(p, int) or not isinstance(i, int))
            values = values.get(part)
        return location

    def _line(self, path: _Path, items: Sequence[Any]) -> str:
        """Format the problem of one setting; there are several items if it may have several types."""
        kind, value = items[0]["type"], items[0]["input"]
        if kind == "json_invalid":  # nested too deeply, or surrogates
            return f"the configuration contains a value that cannot be serialized: {items[0]['msg']}"
        in_group = isinstance(_at(self._defaults, path[:-1]), dict)
        if in_group and kind in ("unexpected_keyword_argument", "extra_forbidden"):
            return self._unknown(path)
        if in_group and kind == "missing":
            return f"{_dotted(path)}: has no default; set it"
        shown = "null" if value is None else f"{value!r} ({type(value).__name__})"
        if len(shown) > 70:
            shown = f"{shown[:50]}... ({type(value).__name__})"
        key, group = _dotted(path), _at(self._defaults, path)
        if isinstance(group, dict):
            return f"{key}: holds {shown}, but is a group of settings: {', '.join(group)}"
        first, *others = dict.fromkeys(item["msg"] for item in items)
        wanted = " or ".join([first, *(message.removeprefix("Input should be ") for message in others)])
        if kind == "string_type" and isinstance(value, (bool, int, float)):
            shown += f'; put text in quotes: {key}: "..." in a file, {key}=\'"..."\' on the command line'
        return f"{key}: {wanted}; got {shown}"

    def _unknown(self, path: _Path) -> str:
        *group, key = (str(part) for part in path)
        if key in _HINTS:
            return f"{_dotted(path)}: unknown key; {_HINTS[key]}"
        siblings = _at(self._defaults, group)
        known = list(siblings) if isinstance(siblings, dict) else []
        near = [".".join([*group, name]) for name in difflib.get_close_matches(key, known, n=1)]
        everywhere = {other.rpartition(".")[2]: other for other in reversed(_all_keys(self._defaults))}
        near += [everywhere[name] for name in difflib.get_close_matches(key, everywhere, n=1, cutoff=0.8)]
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known or self._defaults)}"
        return f"{_dotted(path)}: unknown key; {hint}"


def join_problems(problems: Sequence[str], count: int | None = None) -> str:
    """Join problems into one message; `count` is their number if only the first are given."""
    count = count or len(problems)
    if count == 1:
        return problems[0]
    more = [f"... and {count - len(problems)} more"] if count > len(problems) else []
    return "\n  ".join([f"{count} problems in the configuration:", *problems, *more])


def _at(values: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _dotted(path: _Path) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _all_keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys of all settings and groups, those of the outer groups first."""
    groups = [(key, value) for key, value in values.items() if isinstance(value, Mapping)]
    below = [key for name, value in groups for key in _all_keys(value, f"{prefix}{name}.")]
    return [prefix + key for key in values] + below

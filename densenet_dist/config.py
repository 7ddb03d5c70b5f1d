"""A run's configuration: defaults <- YAML files <- ``key=value``.

`densenet_dist.schema` defines the settings. `load_config` merges, validates and reports *all* problems at once, each
with its full key, before any work starts.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, make_dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Generic, TypeAlias, TypeVar

from pydantic import TypeAdapter, ValidationError

from densenet_dist import custom, yaml_settings
from densenet_dist.conflicts import conflicts
from densenet_dist.credentials import held_credentials
from densenet_dist.errors import ConfigError
from densenet_dist.schema import STRICT, Config, OptionsConfig
from densenet_dist.yaml_settings import flatten, is_override, merge, nest, read_override, read_yaml

T = TypeVar("T")
_Path: TypeAlias = tuple[str | int, ...]
_MAX_SHOWN: Final = 30
_MAX_LENGTH: Final = 200
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
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[: _MAX_LENGTH + 1])
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."


def _all_keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys of all settings and groups, those of the outer groups first."""
    groups = [(key, value) for key, value in values.items() if isinstance(value, Mapping)]
    below = [key for name, value in groups for key in _all_keys(value, f"{prefix}{name}.")]
    return [prefix + key for key in values] + below


SETTINGS: Final = Settings(Config, conflicts)
to_dict = SETTINGS.to_dict


def validate(values: Mapping[str, Any], *, combinations: bool = True) -> Config:
    """Do what `Settings.validate` does, and check and complete the options of custom parts that may be imported."""
    config = SETTINGS.validate(values, combinations=combinations)
    named = list(custom.names_in(config))
    given = dict(vars(config.options))
    unknown = {part for part, name in named if not custom.is_allowed(name)}  # in another person's run: not imported
    parts = {part: tuple(name for other, name in named if other == part) for part in given if part not in unknown}
    if not named and not any(given.values()):
        return config
    for part, names in parts.items():
        if given[part] and not names:
            key = custom.PARTS[part].key
            raise ConfigError(
                f"options.{part}: {key}={custom.value_at(config, key) or '[]'} has no options; remove them"
            )
    functions = tuple((part, name, custom.load(part, name)) for part, names in parts.items() for name in names)
    if functions:
        for name in parts.get("callbacks", ()):
            given["callbacks"] = {custom.short_name(name): {}, **given["callbacks"]}
        checked = _options_of(functions).validate({"options": {part: given[part] for part, *_ in functions}})
        given |= _options_of(functions).to_dict(checked)["options"]
    return replace(config, options=OptionsConfig(**given))


@lru_cache(maxsize=64)
def _options_of(functions: tuple[tuple[str, str, custom.Function], ...]) -> Settings[Any]:
    """Return the settings ``options`` for these functions, each with its part and its name."""
    sections: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    for part, name, function in functions:
        kind = custom.options_type(part, function)
        known = dict.fromkeys(kind.__dataclass_fields__)  # type: ignore[attr-defined]
        if part == "callbacks":
            sections.setdefault(part, {})[custom.short_name(name)] = kind
            keys.setdefault(part, {})[custom.short_name(name)] = known
        else:
            sections[part], keys[part] = kind, known
    return Settings(
        _group({"options": _group({part: _group(found) for part, found in sections.items()})}),
        lambda _: (),
        {"options": keys},
    )


def _group(fields: Any) -> type[Any]:
    """Make a dataclass of settings whose fields have these types; a type is returned as it is."""
    if isinstance(fields, type):
        return fields
    return make_dataclass(
        "Group", [(*each, field()) for each in fields.items()], namespace={"__pydantic_config__": STRICT}
    )


def load_config(*sources: str | Path | Mapping[str, Any] | Config, trust: bool = True) -> Config:
    """Merge `sources` over the defaults, left to right, and validate the result.

    Args:
        sources: paths of YAML files; ``dotted.key=value`` strings with YAML values; mappings, nested or with dotted
            keys, and with functions or classes for custom parts (docs/extending.md); or complete configurations. If
            none sets ``name``, it is the stem of the last file.
        trust: whether custom parts that files and mappings name may be imported, which runs their code. Those of
            complete configurations may if they could before, those of strings and functions always.

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


def merged(*sources: str | Path | Mapping[str, Any] | Config, trust: bool = True) -> dict[str, Any]:
    """Merge sources to nested values, without the defaults; arguments and errors are those of `load_config`."""
    values: dict[str, Any] = {}
    name: dict[str, str] = {}
    for source in sources:
        trusted = trust
        if isinstance(source, Config):
            layer, trusted = to_dict(source), False
        elif isinstance(source, Mapping):
            layer = nest(source)
            custom.take_objects(layer)
        elif is_override(source):
            layer, trusted = read_override(str(source)), True
        else:
            layer = read_yaml(source)
            stem = name_of_file(source)
            name = {"name": stem} if stem else name
        if trusted:
            custom.allow(found for _, found in custom.names_in(layer))
        _drop_options(values, layer)
        merge(values, layer)
    return name | values


def _drop_options(values: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Drop the options of parts from `values` that `layer` replaces by others."""
    for part, (key, _) in custom.PARTS.items():
        old, new = custom.value_at(values, key), custom.value_at(layer, key)
        options = custom.value_at(values, f"options.{part}")
        if old is None or new in (None, old) or not isinstance(options, dict):
            continue
        kept = map(custom.short_name, new) if part == "callbacks" and isinstance(new, list) else ()
        values["options"][part] = {each: options[each] for each in kept if each in options}


def limits_of_test(values: Mapping[str, Any]) -> list[str]:
    """Return the override that makes a stored configuration limit the test images as it did when it was written.

    Versions without ``data.test_limit`` limited them by ``data.limit``. Stored configurations have every setting.
    """
    data = values.get("data")
    if not isinstance(data, Mapping) or data.get("limit") is None or "test_limit" in data:
        return []
    return [f"data.test_limit={json.dumps(data['limit'], default=str)}"]


def load_run_config(path: str | Path, *overrides: str, trust: bool = False) -> Config:
    """Load the config.yaml of a run, of any version, with changes; `trust` and errors are those of `load_config`."""
    return load_config(path, *limits_of_test(read_yaml(path)), *overrides, trust=trust)


def name_of_file(path: str | Path) -> str:
    """Return the default name of a run: the stem of the file, with invalid characters replaced."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).stem).lstrip("._-")[:100]


def to_yaml(config: Config) -> str:
    """Format a configuration as YAML that `load_config` reads back to an equal `Config`."""
    return yaml_settings.to_yaml(to_dict(config))

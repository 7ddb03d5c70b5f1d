"""Every setting as Markdown, from the dataclasses that define them and their JSON schema."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from densenet_dist.config import SETTINGS as RUN_SETTINGS
from densenet_dist.settings import Settings
from densenet_dist.sweep.definition import SETTINGS as SWEEP_SETTINGS

_CODE = r"s3://\S+?(?=[ ).,;:]|$)|\{[^}]*\}|\$?[A-Za-z0-9]\w*_\w+|\bnull\b|\bval/\w+"
"""What stands for a value or a name wherever it stands."""


class Setting(NamedTuple):
    """What there is to know of one key.

    Attributes:
        key: dotted.
        wanted: its type, limits and choices in words; empty for a group of settings.
        default: a plain value; of a group, all of its defaults.
        meaning: its docstring.
        is_group: whether settings are below it.
    """

    key: str
    wanted: str
    default: Any
    meaning: str
    is_group: bool


def run_settings() -> str:
    """Every key of a configuration."""
    return _sections(RUN_SETTINGS, "")


def sweep_settings() -> str:
    """Every key of a sweep file but the space."""
    return _sections(SWEEP_SETTINGS, "sweep.")


def _sections(settings: Settings, prefix: str) -> str:
    """A heading for each group and each key; `prefix` keeps the anchors of two files apart."""
    return "\n".join(_group(s, prefix) if s.is_group else _key(s, prefix) for s in described(settings))


def _group(setting: Setting, prefix: str) -> str:
    return f"\n### {setting.key} {{ #{prefix}{setting.key} }}\n\n{_marked(setting.meaning, ())}\n"


def _key(setting: Setting, prefix: str) -> str:
    choices = re.findall(r"'([^']+)'", setting.wanted)
    default = yaml.safe_dump(setting.default, default_flow_style=True).removesuffix("...\n").strip()
    wanted = re.sub(r"'([^']+)'", r"`\1`", setting.wanted)
    wanted = re.sub(r"that matches (\S+)", r"that matches `\1`", wanted)
    wanted = wanted.replace(">=", "≥").replace("<=", "≤")
    if len(choices) > 1 and wanted.count(" or ") == len(choices) - 1:
        wanted = wanted.replace(" or ", ", ")
    return (
        f"\n#### `{setting.key}` {{ #{prefix}{setting.key} .setting }}\n\n"
        f"{_marked(setting.meaning, choices)}\n\n*{wanted}* · default `{default}`\n{{ .wanted }}\n"
    )


def _marked(meaning: str, choices: Sequence[str]) -> str:
    """A docstring's text with what is code in it marked as such; of a choice the first mention, which explains it."""
    words = [rf"(?<![\w/])(?:{'|'.join(map(re.escape, choices))})(?![\w/])"] if choices else []
    seen: set[str] = set()

    def mark(found: re.Match[str]) -> str:
        again = found[0] in choices and found[0] in seen
        seen.add(found[0])
        return found[0] if again else f"`{found[0]}`"

    return re.sub("|".join([*words, _CODE]), mark, meaning.replace("<", "&lt;"))


def described(settings: Settings) -> Iterator[Setting]:
    """Every key with its meaning: of each group first its own keys, then the groups in it, each at once whole."""
    schema = settings.adapter.json_schema()
    defaults = settings.to_dict(settings.validate({}))
    return _described(schema, schema, defaults, "")


def _described(
    schema: Mapping[str, Any], whole: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str
) -> Iterator[Setting]:
    groups = []
    for name, default in defaults.items():
        level = _resolved(schema["properties"][name], whole)
        meaning = " ".join(str(level.get("description", "")).split())
        if isinstance(default, dict):
            groups.append((Setting(prefix + name, "", default, meaning, True), level))
        else:
            yield Setting(prefix + name, _expected(level, whole), default, meaning, False)
    for group, level in groups:
        yield group
        yield from _described(level, whole, group.default, f"{group.key}.")


def _resolved(level: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = whole["$defs"][level["$ref"].rpartition("/")[2]] if "$ref" in level else level
    return found


def _expected(schema: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """What a JSON schema asks for, in words."""
    if "anyOf" in schema:
        last = ("array", "object")  # the longest words
        options = sorted((_resolved(option, whole) for option in schema["anyOf"]), key=lambda o: o["type"] in last)
        return " or ".join(_expected(option, whole) for option in options)
    if "const" in schema or "enum" in schema:
        return " or ".join(repr(option) for option in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        items = schema.get("prefixItems", [schema.get("items")])
        count = f"{len(items)} values" if "prefixItems" in schema else "values"
        return f"a list of {count}, each {_expected(items[0], whole)}"
    if schema["type"] == "object":
        keys = (f"{key} ({_expected(value, whole)})" for key, value in schema["properties"].items())
        return "a mapping with " + " and ".join(keys)
    words = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "text"}
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    limits += [f"that matches {schema['pattern']}"] if "pattern" in schema else []
    return " ".join([str(words.get(schema["type"], schema["type"])), " and ".join(limits)]).strip()

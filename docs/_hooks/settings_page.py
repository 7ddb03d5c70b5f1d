"""Every setting as Markdown, from the dataclasses that define them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml

from densenet_dist.config import SETTINGS as RUN_SETTINGS
from densenet_dist.sweep.definition import SETTINGS as SWEEP_SETTINGS
from densenet_dist.typed_settings import Setting, Settings

_CODE = r"s3://\S+?(?=[ ).,;:]|$)|\{[^}]*\}|\$?[A-Za-z0-9]\w*_\w+|\bnull\b|\bval/\w+"
"""What stands for a value or a name wherever it stands."""


def run_settings() -> str:
    """Every key of a configuration."""
    return _sections(RUN_SETTINGS, "")


def sweep_settings() -> str:
    """Every key of a sweep file but the space."""
    return _sections(SWEEP_SETTINGS, "sweep.")


def _sections(settings: Settings, prefix: str) -> str:
    """A heading for each group and each key; `prefix` keeps the anchors of two files apart."""
    return "\n".join(_group(s, prefix) if s.is_group else _key(s, prefix) for s in settings.described())


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

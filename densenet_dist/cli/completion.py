"""What the shell offers on TAB: configurations, keys and their values, runs. Nothing here imports torch or Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeAlias, get_args, get_origin, get_type_hints

from densenet_dist import bundled

Offer: TypeAlias = tuple[str, str]
"""A word, and what it is."""

BASH: Final = ("_DENSENET_DIST_COMPLETE", "complete_bash")
_DEEPEST: Final = 8


def sources(incomplete: str) -> list[Offer]:
    """A configuration's file or name; after it, ``key=value``."""
    return [*_configurations(incomplete, sweeps=False), *_keys(incomplete, _config_class())]


def sweep_sources(incomplete: str) -> list[Offer]:
    """A sweep file or its name; after it, ``key=value`` of the sweep, and of the base configuration."""
    from densenet_dist.sweep.schema import SweepConfig

    found = [*_configurations(incomplete, sweeps=True), *_keys(incomplete, SweepConfig)]
    return found + [offer for offer in _keys(incomplete, _config_class()) if "." in offer[0]]


def runs(incomplete: str) -> list[Offer]:
    """A run: its folder, or its name in runs/."""
    return _folders(incomplete, "config.yaml", "run")


def sweep_folders(incomplete: str) -> list[Offer]:
    """A sweep: its folder, or its name in runs/."""
    return _folders(incomplete, "sweep.yaml", "sweep")


def run_settings(incomplete: str) -> list[Offer]:
    """``key=value`` alone."""
    return _keys(incomplete, _config_class())


def _config_class() -> type[Any]:
    from densenet_dist.schema import Config

    return Config


def _configurations(incomplete: str, *, sweeps: bool) -> list[Offer]:
    named = [name for name in bundled.names() if name.startswith(incomplete) and name.startswith("sweep_") is sweeps]
    files = _paths(incomplete, lambda path: path.suffix in (".yaml", ".yml") and path.is_file())
    # Longer ones are broken into lines on the way to the shell, which takes each for another word.
    said = [(name, textwrap.shorten(bundled.headline(name), 70, placeholder=" ...")) for name in named]
    return said + [(path, "") for path in files]


def _folders(incomplete: str, file: str, what: str) -> list[Offer]:
    names = sorted(path.parent.name for path in Path("runs").glob(f"*/{file}"))
    found = [(name, f"{what} in runs/") for name in names if name.startswith(incomplete)]
    paths = _paths(incomplete, lambda path: (path / file).is_file())
    return found + [(path, "" if path.endswith("/") else what) for path in paths]


def _paths(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    """What is wanted, and folders on the way to it; the content of a folder that is the only way.

    A shell puts a space after the only word that is left, which would be wrong after a folder.
    """
    for _ in range(_DEEPEST):
        before, slash, start = incomplete.rpartition("/")
        found = []
        with contextlib.suppress(OSError):
            for path in sorted(Path(before + slash or ".").iterdir()):
                if path.name.startswith(start) and (start or not path.name.startswith(".")):
                    if wanted(path):
                        found.append(f"{before}{slash}{path.name}")
                    elif path.is_dir():
                        found.append(f"{before}{slash}{path.name}/")
        if len(found) != 1 or not found[0].endswith("/"):
            return found
        incomplete = found[0]
    return found


def _keys(incomplete: str, settings: type[Any], prefix: str = "") -> list[Offer]:
    """The keys, or groups of them, that a word can become; the values too of one that is left alone."""
    found: list[Offer] = []
    groups = {}
    for field, hint in _fields(settings):
        key = f"{prefix}{field.name}"
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            groups[f"{key}."] = hint
            if f"{key}.".startswith(incomplete) or incomplete.startswith(f"{key}."):
                found.append((f"{key}.", "settings"))
        elif incomplete.startswith(f"{key}="):
            return [(f"{key}={value}", "") for value in _values(field, hint) if f"{key}={value}".startswith(incomplete)]
        elif f"{key}=".startswith(incomplete):
            found.append((f"{key}=", f"default: {_shown(_default(field))}"))
    if len(found) != 1:
        return found
    only, _ = found[0]
    if only in groups:
        return _keys(incomplete, groups[only], only)
    name = only[len(prefix) : -1]
    field, hint = next((field, hint) for field, hint in _fields(settings) if field.name == name)
    return [*found, *((f"{only}{value}", "") for value in _values(field, hint))]


def _fields(settings: type[Any]) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(settings)
    return ((field, hints[field.name]) for field in dataclasses.fields(settings))


def _values(field: dataclasses.Field[Any], hint: Any) -> list[str]:
    """Those that a setting can have, or else its default."""
    if hint is bool:
        return ["true", "false"]
    choices = [choice for part in [hint, *get_args(hint)] if get_origin(part) is Literal for choice in get_args(part)]
    default = _shown(_default(field))
    return [str(choice) for choice in choices] or ([default] if default and " " not in default else [])


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _shown(value: Any) -> str:
    """A default as it would be written."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    return f"[{','.join(map(_shown, value))}]" if isinstance(value, (tuple, list)) else str(value)


def complete_in_bash(complete: Callable[[], object]) -> NoReturn:
    """Answer bash, for which ``train.lr=0.1`` is three words: its keys are given whole to `complete`, which prints.

    Bash puts what it is given after the ``=``, so what is before it is cut off again.
    """
    words, current = os.environ["COMP_WORDS"].split("\n"), int(os.environ["COMP_CWORD"])
    joined: list[str] = []
    for position, word in enumerate(words[: current + 1]):
        if position and (word == "=" or words[position - 1] == "="):
            joined[-1] += word
        else:
            joined.append(word)
    os.environ |= {"COMP_WORDS": "\n".join(joined), "COMP_CWORD": str(len(joined) - 1)}
    key = joined[-1].rpartition("=")[0]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        complete()
    for line in out.getvalue().splitlines():
        sys.stdout.write(line.removeprefix(f"{key}=" if key else "") + "\n")
    raise SystemExit(0)

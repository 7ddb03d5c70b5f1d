"""The configurations that come with the package, so that it can be tried without a checkout: ``train quickstart``."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import Final

_IN_WHEEL: Final = Path(__file__).parent / "configs"
_IN_CHECKOUT: Final = Path(__file__).parents[1] / "configs"


def folder() -> Path:
    """Where they lie: in the installed package, or at the root of a checkout."""
    return _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CHECKOUT


def names() -> list[str]:
    """What they are called."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(source: str | Path) -> Path:
    """The file that somebody means.

    A file that is there is taken as it is. Else ``quickstart``, ``quickstart.yaml`` and ``configs/quickstart.yaml`` (as
    documentation and help say it) are the configuration of that name that comes with the package.
    """
    path = Path(os.path.expanduser(source))
    # Unlike Path.is_file, isfile has no error for what can be no name (too long, a zero byte).
    if os.path.isfile(path) or str(path.parent) not in (".", "configs") or path.suffix not in ("", ".yaml"):
        return path
    bundled = folder() / f"{path.stem}.yaml"
    return bundled if os.path.isfile(bundled) else path


def headline(name: str) -> str:
    """What one of them is for: the first sentence of its first comment."""
    said = []
    for line in (folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        said.append(text)
    sentence = re.split(r"(?<! al)(?<!sec)\. ", " ".join(said))[0]
    return textwrap.shorten(sentence.rstrip(".:"), 100, placeholder=" ...")

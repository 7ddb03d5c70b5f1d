"""The configurations in the package, which work without a checkout: ``densenet-dist train quickstart``."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import Final

_IN_WHEEL: Final = Path(__file__).parent / "configs"
FOLDER: Final = _IN_WHEEL if _IN_WHEEL.is_dir() else Path(__file__).parents[1] / "configs"
"""The folder of the configurations: in the installed package, or at the root of a checkout."""
_EDITORS: Final = "# yaml-language-server: "


def names() -> list[str]:
    """Return the names of the configurations."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(source: str | Path) -> Path:
    """Resolve the name of a configuration file.

    An existing file is used as it is. Otherwise ``quickstart``, ``quickstart.yaml`` and ``configs/quickstart.yaml`` (as
    in documentation and help) name the configuration in the package.
    """
    path = Path(os.path.expanduser(source))
    # Unlike Path.is_file, isfile raises no error for invalid names (too long, a zero byte).
    if os.path.isfile(path) or str(path.parent) not in (".", "configs") or path.suffix not in ("", ".yaml"):
        return path
    bundled = FOLDER / f"{path.stem}.yaml"
    return bundled if os.path.isfile(bundled) else path


def headline(name: str) -> str:
    """Return the purpose of a configuration: the first sentence of its first comment."""
    comment = []
    for line in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith(_EDITORS):
            continue
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        comment.append(text)
    sentence = re.split(r"(?<! al)(?<!sec)\. ", " ".join(comment))[0]
    return textwrap.shorten(sentence.rstrip(".:"), 100, placeholder=" ...")

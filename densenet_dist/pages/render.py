"""HTML pages from the templates beside this module; a page needs nothing but itself."""

from __future__ import annotations

import base64
import functools
import html
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_SPACE = "\N{NO-BREAK SPACE}"


def render(template: str, **values: Any) -> str:
    """Fill in a template of a page; whatever text the values hold is escaped.

    Args:
        template: its file's name.
        values: what the template names; a missing one is an error.
    """
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "command": shlex.join,
        "duration": duration,
        "fixed": format,
        "percent": percent,
        "png": lambda data: f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}",
    }
    return environment


def printable(value: Any) -> Any:
    """Text with U+FFFD for what cannot be shown, such as control characters; HTML and anything else as it is."""
    if not isinstance(value, str) or hasattr(value, "__html__") or value.isprintable():
        return value
    return "".join(
        letter if letter.isprintable() or letter in "\n\t\xa0" else "\N{REPLACEMENT CHARACTER}" for letter in value
    )


def escape(text: str) -> str:
    """Text for HTML outside of a template, whatever it holds."""
    return html.escape(printable(text))


def percent(share: float) -> str:
    """A share in [0, 1] in per cent."""
    return f"{share * 100:.2f}{_SPACE}%"


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit that suits a time, and its length in seconds."""
    return ("h", 3600.0) if seconds > 3 * 3600 else ("min", 60.0) if seconds > 600 else ("s", 1.0)


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    unit, divisor = time_unit(seconds)
    return f"{seconds / divisor:,.1f}{_SPACE}{unit}"

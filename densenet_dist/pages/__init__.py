"""Self-contained HTML pages: templates, style and inline SVG figures for reports of runs and sweeps."""

from __future__ import annotations

import base64
import html
import shlex
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_SPACE = "\N{NO-BREAK SPACE}"


def render(template: str, **values: Any) -> str:
    """Render a page; all text in the values is escaped.

    Args:
        template: file name.
        values: the template's variables; a missing one is an error.
    """
    return _ENVIRONMENT.get_template(template).render(values)


def printable(value: Any) -> Any:
    """Replace control characters and the like in text by U+FFFD; return HTML and other types unchanged."""
    if not isinstance(value, str) or hasattr(value, "__html__") or value.isprintable():
        return value
    return "".join(
        letter if letter.isprintable() or letter in "\n\t\xa0" else "\N{REPLACEMENT CHARACTER}" for letter in value
    )


def escape(text: str) -> str:
    """Escape text for HTML outside of a template."""
    return html.escape(printable(text))


def _percent(share: float) -> str:
    return f"{share * 100:.2f}{_SPACE}%"


def _duration(seconds: float) -> str:
    unit, divisor = ("h", 3600.0) if seconds > 3 * 3600 else ("min", 60.0) if seconds > 600 else ("s", 1.0)
    return f"{seconds / divisor:,.1f}{_SPACE}{unit}"


_ENVIRONMENT: Final = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=printable,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {
    "command": shlex.join,
    "duration": _duration,
    "fixed": format,
    "percent": _percent,
    "png": lambda data: f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}",
}

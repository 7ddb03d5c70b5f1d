"""Pictures as SVG that takes its colours from the page's style sheet."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from densenet_dist.pages.picture import Picture

SHADES: Final = 7
"""Colours from the worst metric to the best."""
STATUSES: Final = ("finished", "stopped", "interrupted", "running", "failed")
RUNS: Final = 8
"""Colours that tell runs, or groups of them, apart."""
_ROLES: Final = (
    *("ink", "muted", "grid", "best", *STATUSES, *(f"shade{i}" for i in range(SHADES))),
    *("train", "val", "test", *(f"run{i}" for i in range(RUNS))),
)
_STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "text.parse_math": False,  # a value may hold anything
}


def colour(role: str) -> str:
    """A colour that stands for a variable of the page's style sheet."""
    return f"#0100{_ROLES.index(role):02x}"


def drawing() -> AbstractContextManager[None]:
    """Matplotlib in the page's style."""
    texts = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), colour("ink"))
    lines = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), colour("muted"))
    return styled(_STYLE | texts | lines | {"grid.color": colour("grid")})


@contextmanager
def styled(style: Mapping[str, Any]) -> Iterator[None]:
    """Matplotlib's defaults and a style, whatever the process has set; all is as before afterwards."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the reader's browser has other fonts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Picture:
    """A figure of so many inches, without pyplot's global list of them."""
    from densenet_dist.pages.picture import Picture

    return Picture(figsize=(width, height), layout=layout)


def to_svg(figure: Figure, label: str) -> str:
    """The figure as an element of an HTML page; `label` says what it shows, for those who do not see it."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = label  # names within one page must differ, but not from time to time
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = re.sub(r"<!--.*?-->|<style.*?</style>|(?<=>)\s+(?=<)", "", buffer.getvalue(), flags=re.DOTALL)
    body = re.sub(r"<[^>]+>", _slim, text[text.index("<g") :])
    width, height = (72 * side for side in figure.get_size_inches())
    wide = ' class="wide"' if width > 500 else ""  # too much to be shown smaller
    opening = f'<svg{wide} role="img" aria-label="{html.escape(label)}" viewBox="0 0 {width:g} {height:g}"'
    return f'{opening} style="width:{width * 4 / 3:.0f}px">{body}'


def _slim(tag: re.Match[str]) -> str:
    """A tag without names that nothing refers to, with coordinates of two decimals, and the page's colours."""
    text = re.sub(r'<g id="[^"]*"', "<g", tag[0]).replace(" xlink:href=", " href=")
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', _shorter, text)
    return re.sub(r"#0100([0-9a-f]{2})", lambda found: f"var(--{_ROLES[int(found[1], 16)]})", text)


def _shorter(numbers: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", numbers[0]).replace(" \n", "")

"""Figures for pages and files: SVG that takes its colors from a page's style sheet, and the confusion matrix."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure
    from PIL import Image

SHADES: Final = 7
"""Number of colors from the worst value to the best."""
STATUSES: Final = ("finished", "stopped", "interrupted", "running", "failed")
RUNS: Final = 8
"""Number of colors that distinguish runs or groups of runs."""
MAX_CLASSES: Final = 200
"""With more classes, no confusion matrix is drawn: its cells would be too small."""
MAX_NAMES: Final = 40
"""With more classes, their numbers replace their names."""
_MAX_NUMBERS: Final = 20
_ROLES: Final = (
    *("ink", "muted", "grid", "best", *STATUSES, *(f"shade{i}" for i in range(SHADES))),
    *("train", "val", "test", *(f"run{i}" for i in range(RUNS))),
)
_PRINTED_SHADES: Final = ("#ddeaf6", "#bcd6eb", "#92c1de", "#63a8d2", "#4289c4", "#2268ac", "#0a3d7a")
_SQUARE: Final = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5), (0, 0)])
_PRINTED_INKS: Final = (*("black",) * 4, *("white",) * 3)


def color(role: str) -> str:
    """Return a placeholder for a color variable of the page's style sheet; `to_svg` replaces it."""
    return f"#0100{_ROLES.index(role):02x}"


PRINTED: Final[dict[str, Any]] = {"text.parse_math": False, "font.size": 9}  # a value may contain dollar signs
"""The style of figures in black on white."""
PAGE: Final[dict[str, Any]] = PRINTED | {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), color("ink")),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), color("muted")),
    "grid.color": color("grid"),
}
"""The style of figures of a page."""


@contextmanager
def drawing(style: Mapping[str, Any]) -> Iterator[None]:
    """Use matplotlib's defaults and a style, whatever the process has set, and restore everything afterwards."""
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the reader's browser has other fonts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of a size in inches, without pyplot and its global list of figures."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")

    def png() -> bytes:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80)
        return buffer.getvalue()

    vars(figure)["_repr_png_"] = png  # IPython displays it at the end of a cell
    return figure


def to_svg(figure: Figure, label: str) -> str:
    """Convert a figure to an element of an HTML page, with an accessible label."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = label  # unique ids within a page that are the same in every process
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = re.sub(r"<!--.*?-->|<style.*?</style>|(?<=>)\s+(?=<)", "", buffer.getvalue(), flags=re.DOTALL)
    body = re.sub(r"<[^>]+>", _shorten_tag, text[text.index("<g") :])
    width, height = (72 * side for side in figure.get_size_inches())
    wide = ' class="wide"' if width > 500 else ""  # not scaled down
    start = f'<svg{wide} role="img" aria-label="{html.escape(label)}" viewBox="0 0 {width:g} {height:g}"'
    return f'{start} style="width:{width * 4 / 3:.0f}px">{body}'


def _shorten_tag(tag: re.Match[str]) -> str:
    """Remove unused ids, round coordinates to two decimals, and insert the colors of the page."""
    text = re.sub(r'<g id="[^"]*"', "<g", tag[0]).replace(" xlink:href=", " href=")
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', _round_numbers, text)
    return re.sub(r"#0100([0-9a-f]{2})", lambda found: f"var(--{_ROLES[int(found[1], 16)]})", text)


def _round_numbers(attribute: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0]).replace(" \n", "")


def set_epoch_axes(axes: Axes, label: str) -> None:
    """Label the axes of a figure by epoch, with ticks at whole epochs only; `label` is that of the vertical axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.set(xlabel="epoch", ylabel=label)


def set_logarithmic(axis: XAxis | YAxis, subs: Sequence[float] = (1, 2, 5)) -> None:
    """Set a logarithmic scale with plain numbers; `subs` are the ticks of a decade."""
    from matplotlib.ticker import LogLocator

    set_scale = axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")  # the default formatter needs math text, which pages turn off
    axis.minorticks_off()


def confusion_figure(
    confusion: npt.NDArray[np.int64],
    names: Sequence[str],
    *,
    shades: Sequence[str] = _PRINTED_SHADES,
    inks: Sequence[str] = _PRINTED_INKS,
    cell: float = 0.42,
) -> Figure:
    """Draw a confusion matrix, within `drawing`; cells without images stay empty.

    Args:
        confusion: (classes, classes) int64, number of images by true class (row) and predicted class (column).
        names: of the classes.
        shades: `SHADES` colors from the smallest to the largest share of a row.
        inks: colors of the numbers on each shade.
        cell: side of a cell in inches, if there are few classes; texts keep their size.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    count = len(names)
    side = 2.2 + min(cell * count, 15 * cell)
    figure = new_figure(side + 0.6, side)
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    # On a square-root scale, so that rare mistakes are visible too.
    levels = np.minimum(np.sqrt(shares) * len(shades), len(shades) - 1).astype(int)
    for level, shade in enumerate(shades):
        rows, columns = np.nonzero((levels == level) & (confusion > 0))
        squares = np.stack([columns, rows], axis=1)[:, None] + _SQUARE
        cells = [Path(square, closed=True) for square in squares]
        if cells:
            axes.add_patch(PathPatch(Path.make_compound_path(*cells), facecolor=shade, linewidth=0))
    if count <= _MAX_NUMBERS:
        for y, x in np.argwhere(confusion > 0).tolist():
            axes.text(x, y, f"{confusion[y, x]}", ha="center", va="center", fontsize=8, color=inks[levels[y, x]])
    axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), xlabel="predicted class", ylabel="true class")
    axes.set_aspect("equal")
    axes.grid(False)
    if count <= MAX_NAMES:
        shown = list(map(shortened, names))
        axes.set_xticks(range(count), shown, rotation=90)
        axes.set_yticks(range(count), shown)
    axes.tick_params(length=0)
    return figure


def heat_overlay(pixels: npt.NDArray[np.uint8], heat: npt.NDArray[np.float32]) -> Image.Image:
    """Blend an image (H, W, 3) with a heat map (h, w) from 0 to 1, which is resized: blue is low, red is high."""
    import matplotlib
    from PIL import Image

    image = Image.fromarray(pixels)
    mask = Image.fromarray((heat * 255).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    colors = matplotlib.colormaps["turbo"](np.asarray(mask), bytes=True)[..., :3]
    return Image.blend(image, Image.fromarray(np.ascontiguousarray(colors)), 0.5)


def shortened(name: str) -> str:
    """Shorten a class name to the space beside a figure."""
    return name if len(name) <= 18 else f"{name[:17]}…"

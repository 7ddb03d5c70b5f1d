"""The confusion matrix as a figure, for pages, files and TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from densenet_dist.pages.svg import new_figure, styled

if TYPE_CHECKING:
    from densenet_dist.pages.picture import Picture

MOST_CLASSES: Final = 200
"""Above so many classes a confusion matrix is not drawn: its cells could not be seen."""
MOST_NAMES: Final = 40
"""Above so many, classes are numbered there instead."""
_MOST_NUMBERS: Final = 20
_PRINTED: Final = ("#ddeaf6", "#bcd6eb", "#92c1de", "#63a8d2", "#4289c4", "#2268ac", "#0a3d7a")


def printed() -> AbstractContextManager[None]:
    """Matplotlib for pictures in black on white, with names shown as they are."""
    return styled({"text.parse_math": False, "font.size": 9})


def printed_confusion(confusion: npt.NDArray[np.int64], names: Sequence[str], cell: float = 0.42) -> Picture:
    """The matrix in its own colours, see `confusion_figure`; to be drawn and saved within `printed`."""
    return confusion_figure(confusion, names, _PRINTED, ["black"] * 4 + ["white"] * 3, cell)


def confusion_figure(
    confusion: npt.NDArray[np.int64],
    names: Sequence[str],
    shades: Sequence[str],
    inks: Sequence[str],
    cell: float = 0.42,
) -> Picture:
    """Draw a confusion matrix; cells without images are left out.

    Args:
        confusion: (classes, classes) int64, images of each true class (row) by predicted class (column).
        names: of the classes.
        shades: colours from the rarest share of a row to all of it.
        inks: of the numbers on each shade.
        cell: the side of a class's cell in inches, as long as there are few classes; texts keep their size.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    count = len(names)
    side = 2.2 + min(cell * count, 15 * cell)
    figure = new_figure(side + 0.6, side)
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    # By the square root, so that rare mistakes are seen too; never two shades for equal shares.
    places = np.minimum(np.sqrt(shares) * len(shades), len(shades) - 1).astype(int)
    for shade, filled in enumerate(shades):
        cells = [
            Outline([(x - 0.5, y - 0.5), (x + 0.5, y - 0.5), (x + 0.5, y + 0.5), (x - 0.5, y + 0.5), (0, 0)], _CELL)
            for y, x in np.argwhere((places == shade) & (confusion > 0)).tolist()
        ]
        if cells:
            axes.add_patch(PathPatch(Outline.make_compound_path(*cells), facecolor=filled, linewidth=0))
    if count <= _MOST_NUMBERS:
        for y, x in np.argwhere(confusion > 0).tolist():
            axes.text(x, y, f"{confusion[y, x]}", ha="center", va="center", fontsize=8, color=inks[places[y, x]])
    axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), xlabel="predicted class", ylabel="true class")
    axes.set_aspect("equal")
    axes.grid(False)
    if count <= MOST_NAMES:
        shown = list(map(shortened, names))
        axes.set_xticks(range(count), shown, rotation=90)
        axes.set_yticks(range(count), shown)
    axes.tick_params(length=0)
    return figure


def shortened(name: str) -> str:
    """A class name that fits beside a picture."""
    return name if len(name) <= 18 else f"{name[:17]}…"


_CELL: Final = (1, 2, 2, 2, 79)
"""Path codes of a closed rectangle: MOVETO, three LINETO, CLOSEPOLY."""

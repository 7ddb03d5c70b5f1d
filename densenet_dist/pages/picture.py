"""A figure that a notebook shows by itself; imports matplotlib, so it is imported by what draws."""

from __future__ import annotations

import io
from typing import Final

from matplotlib.figure import Figure

_SHOWN_DPI: Final = 80


class Picture(Figure):
    """A matplotlib figure without pyplot, and so without its backend, its list of figures, and its window.

    In a notebook the last line of a cell shows it; ``savefig`` writes it to a file, as it does any figure.
    """

    def _repr_png_(self) -> bytes:
        """What IPython shows."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=_SHOWN_DPI)
        return buffer.getvalue()

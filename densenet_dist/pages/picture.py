"""A figure that notebooks display. It imports matplotlib, which takes almost a second: import it where you draw."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class Picture(Figure):
    """A matplotlib figure without pyplot, its backend and its windows.

    A notebook displays it at the end of a cell; ``savefig`` writes it to a file.
    """

    def _repr_png_(self) -> bytes:
        """Return the PNG that IPython displays."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=80)
        return buffer.getvalue()

"""Pictures in files that have become unreadable since they were verified, and which others stand in for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from densenet_dist.data.image_files import BadImage, ImageFiles
from densenet_dist.errors import DataError


class UnreadableFiles(Exception):
    """Pictures could not be read.

    Attributes:
        reasons: in plain words, by place in the split.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


def read_all(rows: list[int], read: Callable[[int, int], Any], map: Callable[..., Iterable[Any]] = map) -> list[Any]:
    """What `read(place, row)` gives for each row and its place in `rows`; `map` may use threads.

    Raises:
        UnreadableFiles: naming all for which it raises BadImage.
    """
    reasons: dict[int, str] = {}

    def one(place: int, row: int) -> Any:
        try:
            return read(place, row)
        except BadImage as error:
            reasons[row] = str(error)

    found = list(map(one, range(len(rows)), rows))
    if reasons:
        raise UnreadableFiles(reasons)
    return found


class Substitutes:
    """Which pictures of a split cannot be read any more, and what is shown in their place.

    The next readable picture of the same class stands in for one that is not, so batches keep their sizes on every
    rank and the labels stay true.

    Args:
        files: the pictures of the split.
        labels: (n,) int64, their classes.
        policy: skip lets others stand in; error does not.

    Attributes:
        sizes: (n, 2) int64, width and height of the pictures.
        unreadable: the reasons, by place in the split.
    """

    def __init__(self, files: ImageFiles, labels: npt.NDArray[np.int64], policy: Literal["error", "skip"]) -> None:
        self._files, self._labels, self._policy = files, labels, policy
        self.sizes = files.sizes
        self.unreadable: dict[int, str] = {}
        self._told = 0

    def exclude(self, reasons: Mapping[int, str]) -> None:
        """Take pictures out.

        Raises:
            DataError: naming them, where the policy is error, or where nothing is left of a class.
        """
        lines = [f"{self._files.path(row)}: {reason}" for row, reason in reasons.items()]
        if self._policy == "error":
            raise DataError(
                "pictures that were sound when the run started can no longer be read:\n  "
                + "\n  ".join(lines)
                + "\n  put them back and resume the run, or go on without them: data.on_bad_image=skip"
            )
        self.unreadable.update(reasons)
        for label in {int(self._labels[row]) for row in reasons}:
            if all(int(row) in self.unreadable for row in np.flatnonzero(self._labels == label)):
                raise DataError(f"no picture of class {label} can be read any more:\n  " + "\n  ".join(lines))

    def resolve(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """`rows` (n,) with unreadable pictures replaced."""
        if not self.unreadable:
            return rows
        table = np.arange(len(self._labels))
        for row in self.unreadable:
            same = np.flatnonzero(self._labels == self._labels[row])
            later = np.roll(same, -int(np.searchsorted(same, row)) - 1)
            table[row] = next(other for other in later.tolist() if other not in self.unreadable)
        return table[rows]

    def news(self) -> list[str]:
        """What was taken out since this was last asked, a line each."""
        lines = [f"{self._files.path(row)}: {reason}" for row, reason in list(self.unreadable.items())[self._told :]]
        self._told = len(self.unreadable)
        return lines

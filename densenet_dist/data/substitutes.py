"""Image files that become unreadable during a run: each is replaced by another one, or is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from densenet_dist.data.image_files import BadImage, ImageFiles, Split
from densenet_dist.errors import DataError


class UnreadableFiles(Exception):
    """Some image files cannot be read; `reasons` has the reason for each, by index into the split."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons


def read_all(indices: list[int], read: Callable[[int, int], Any], map: Callable[..., Iterable[Any]] = map) -> list[Any]:
    """Return `read(position, index)` for each of `indices`; `map` may use threads.

    Raises:
        UnreadableFiles: all those for which `read` raises BadImage.
    """
    reasons: dict[int, str] = {}

    def read_one(position: int, index: int) -> Any:
        try:
            return read(position, index)
        except BadImage as error:
            reasons[index] = str(error)

    found = list(map(read_one, range(len(indices)), indices))
    if reasons:
        raise UnreadableFiles(reasons)
    return found


class Substitutes:
    """The image files of a split that can no longer be read: `unreadable` has the reasons, by index into the split.

    Each is replaced by the next readable image of its class: batch sizes and labels stay the same on every rank.
    """

    def __init__(self, split: Split, policy: Literal["error", "skip"]) -> None:
        self._split, self._policy = split, policy
        self.unreadable: dict[int, str] = {}
        self._reported = 0

    def exclude(self, reasons: Mapping[int, str]) -> None:
        """Add unreadable images; raise DataError, naming them, if the policy is error."""
        lines = "\n  ".join(self._lines(reasons))
        if self._policy == "error":
            raise DataError(
                f"images that were readable when the run started can no longer be read:\n  {lines}\n"
                "  restore them and resume the run, or continue without them: data.on_bad_image=skip"
            )
        self.unreadable.update(reasons)

    def resolve(
        self, indices: npt.NDArray[np.int64], among: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.int64]:
        """Return `indices` (n,) with unreadable images replaced, by images of `among` if it is given.

        Raises:
            DataError: no other image of a class can be read.
        """
        labels = self._split.labels
        table = np.arange(len(labels))
        among = table.copy() if among is None else np.sort(among)
        for index in self.unreadable.keys() & set(indices.tolist()):
            same_class = among[labels[among] == labels[index]]
            later = np.roll(same_class, -int(np.searchsorted(same_class, index, side="right")))
            table[index] = next((other for other in later.tolist() if other not in self.unreadable), -1)
            if table[index] < 0:
                lines = "\n  ".join(self._lines(self.unreadable))
                raise DataError(f"no image of class {labels[index]} can be read any more:\n  {lines}")
        return table[indices]

    def news(self) -> list[str]:
        """Return the images that became unreadable since the last call, one line each."""
        lines = self._lines(self.unreadable)[self._reported :]
        self._reported = len(self.unreadable)
        return lines

    def _lines(self, reasons: Mapping[int, str]) -> list[str]:
        files = self._split.images
        if not isinstance(files, ImageFiles):
            return []
        return [f"{files.path(index)}: {reason}" for index, reason in reasons.items()]

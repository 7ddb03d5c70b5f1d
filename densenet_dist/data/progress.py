"""A progress bar on standard error, for downloads and for checks of many files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

Advance: TypeAlias = Callable[[int, int | None], object]
"""Called with the progress since the last call, and the total if it is known."""


@contextmanager
def progress_bar(title: str, enabled: bool, unit: Literal["bytes", "files"] = "bytes") -> Iterator[Advance]:
    """Show a bar while the block runs, advanced by what it yields; show nothing where it is not enabled."""
    if not enabled:
        yield lambda amount, total: None
        return
    from rich import progress
    from rich.console import Console

    in_bytes = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    columns = in_bytes if unit == "bytes" else (progress.MofNCompleteColumn(),)
    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        *columns,
        progress.TimeRemainingColumn(),
        console=Console(stderr=True, force_jupyter=False),
    ) as bars:
        task = bars.add_task(title, total=None)
        yield lambda amount, total: bars.update(task, advance=amount, total=total)

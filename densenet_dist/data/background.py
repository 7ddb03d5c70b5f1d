"""Threads that run ahead of their consumer, and a progress bar on standard error."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal, TypeAlias, TypeVar

T = TypeVar("T")
R = TypeVar("R")

Advance: TypeAlias = Callable[[int, int | None], object]
"""Called with the progress since the last call, and the total if it is known."""


def map_ahead(function: Callable[[T], R], items: Iterable[T], depth: int, threads: int = 1) -> Iterator[R]:
    """Yield `function(item)` for each item, in order, computed by threads that keep up to `depth` results ready.

    With `depth` 0 there are no threads. An error in a thread is raised when its result is due. If the consumer stops
    early, the threads end after the items they are working on.
    """
    if depth == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads, "densenet-dist-data")
    ahead: deque[Future[R]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def progress_bar(title: str, unit: Literal["bytes", "files"] = "bytes") -> Iterator[Advance]:
    """Show a progress bar while the block runs; yield the function that advances it."""
    from rich import progress
    from rich.console import Console

    in_bytes = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        *(in_bytes if unit == "bytes" else (progress.MofNCompleteColumn(),)),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True, force_jupyter=False),
    ) as bars:
        task = bars.add_task(title, total=None)
        yield lambda amount, total: bars.update(task, advance=amount, total=total)

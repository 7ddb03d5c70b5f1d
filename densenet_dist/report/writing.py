"""Where reports go: into the run's folder, on an object store too, or to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from densenet_dist.errors import StorageError
from densenet_dist.pages.confusion import MOST_CLASSES
from densenet_dist.report.comparison import comparison_page
from densenet_dist.report.curves import CURVES_FILE, draw_curves
from densenet_dist.report.figures import draw_confusion
from densenet_dist.report.groups import Member, group
from densenet_dist.report.judged import Judged, judge, judge_within
from densenet_dist.report.page import run_page
from densenet_dist.report.record import RunRecord, read_run
from densenet_dist.run_folder import RunFolder

PAGE_FILE: Final = "report.html"
CONFUSION_FILE: Final = "confusion.png"
_SHARE: Final = 0.1
"""Of the training time, that looking at the test images once more may take at the end of a run; or `_LEAST_S`."""
_LEAST_S: Final = 15.0


def report_run(
    run: str | Path | RunFolder, *, judges: bool = True, out: Path | None = None, overrides: Sequence[str] = ()
) -> str:
    """Write the page of one run; beside it curves.png and, where test images are judged, confusion.png.

    Args:
        run: its folder, path, URI or name under ``runs/``.
        judges: whether the best checkpoint is shown the test images; the data set is needed for that alone.
        out: the page's file; by default report.html in the run's folder, published where that is on an object store.
        overrides: changes to the run's configuration, such as ``data.root=...``.

    Returns:
        Where the page is: a path or a URI.

    Raises:
        StorageError, ConfigError, CheckpointError, DataError, EnvironmentProblem: as their names say.
    """
    record = read_run(run)
    judged = judge(record.folder, overrides) if judges else None
    if out is None:
        return _write_into_folder(record, judged)
    write_file(out, run_page(record, judged))
    _draw(record, judged, out.parent)
    return str(out)


def report_at_end(run: RunFolder, *, judges: bool) -> str | None:
    """Write the page of a run that has just finished, without ever failing.

    Args:
        run: its folder.
        judges: whether test images may be looked at, by this process, if that takes a small part of the time that
            training took. A data set that is not here is not downloaded for that.

    Returns:
        What could not be done, and why; None where all is well.
    """
    problem = None
    try:
        record, judged = read_run(run), None
        if judges:
            limit_s = max(_LEAST_S, _SHARE * record.summary.get("train_seconds", 0.0))
            try:
                judged = judge_within(run, ["data.download=false"], record.config.cluster.device, limit_s)
            except Exception as error:  # the page has much to show without
                problem = f"the page of the run lacks the test images: {error}"
        _write_into_folder(record, judged)
    except Exception as error:  # whatever it is, the run is trained
        problem = f"the run is finished, but its page could not be written: {error}"
    return problem


def _write_into_folder(record: RunRecord, judged: Judged | None) -> str:
    names = _draw(record, judged, record.folder.path)
    record.folder.publish(*names)
    record.folder.write(PAGE_FILE, run_page(record, judged))
    return f"{record.folder.uri}/{PAGE_FILE}"


def report_runs(
    runs: Sequence[str | Path | RunFolder], out: Path, *, judges: bool = True, overrides: Sequence[str] = ()
) -> str:
    """Write one page that compares several runs; arguments and errors are those of `report_run`.

    Raises:
        ConfigError: the runs are of different data sets.
    """
    records = [read_run(run) for run in runs]
    group([Member(record) for record in records])  # says what cannot be compared before the work of judging
    members = [Member(record, judge(record.folder, overrides) if judges else None) for record in records]
    write_file(out, comparison_page(members))
    return str(out)


def _draw(record: RunRecord, judged: Judged | None, folder: Path) -> list[str]:
    names = [CURVES_FILE]
    try:
        draw_curves([*record.epochs, *([record.test] if record.test else [])], record.name, folder / CURVES_FILE)
        if judged is not None and len(judged.class_names) <= MOST_CLASSES:
            draw_confusion(judged.confusion, judged.class_names, record.name, folder / CONFUSION_FILE)
            names.append(CONFUSION_FILE)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}") from error
    return names


def write_file(path: Path, text: str) -> None:
    """Write a page.

    Raises:
        StorageError: where it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}\n  choose another --out") from error

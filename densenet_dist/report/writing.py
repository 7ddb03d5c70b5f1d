"""Where reports go: into the run's folder, on an object store too, or to a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from densenet_dist.errors import DataError, StorageError
from densenet_dist.pages.confusion import MOST_CLASSES
from densenet_dist.report.comparison import comparison_page
from densenet_dist.report.curves import CURVES_FILE, draw_curves
from densenet_dist.report.figures import draw_confusion
from densenet_dist.report.groups import Member, group
from densenet_dist.report.page import run_page
from densenet_dist.report.record import RunRecord, read_run
from densenet_dist.run_folder import RunFolder
from densenet_dist.train.evaluation import load_test_results
from densenet_dist.train.results import TestResults, read_test_results

PAGE_FILE: Final = "report.html"
CONFUSION_FILE: Final = "confusion.png"


def report_run(
    run: str | Path | RunFolder,
    *,
    evaluate: bool = True,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    notify: Callable[[str], None] = lambda text: None,
) -> str:
    """Write the page of one run; beside it curves.png and, with test results, confusion.png.

    Args:
        run: its folder, path, URI or name under ``runs/``.
        evaluate: evaluate the test set if the run has no stored test results; that alone needs the data set.
        out: the page's file; by default report.html in the run's folder, published where that is on an object store.
        overrides: changes to the run's configuration for the evaluation, such as ``data.root=...``.
        notify: called with a message before the test set is evaluated.

    Returns:
        Where the page is: a path or a URI.

    Raises:
        StorageError, ConfigError, CheckpointError, DataError, EnvironmentProblem: as their names say.
    """
    record = read_run(run)
    results = _results(record, evaluate, overrides, notify)
    if out is None:
        return _write_into_folder(record, results)
    write_file(out, run_page(record, results))
    _draw(record, results, out.parent)
    return str(out)


def report_at_end(run: RunFolder) -> str | None:
    """Write the page of a run that has just finished, without ever failing.

    Returns:
        What could not be done, and why; None where all is well.
    """
    try:
        _write_into_folder(read_run(run), read_test_results(run))
    except Exception as error:  # whatever it is, the run is trained
        return f"the run is finished, but its page could not be written: {error}"
    return None


def report_runs(
    runs: Sequence[str | Path | RunFolder],
    out: Path,
    *,
    evaluate: bool = True,
    overrides: Sequence[str] = (),
    notify: Callable[[str], None] = lambda text: None,
) -> str:
    """Write one page that compares several runs; arguments and errors are those of `report_run`.

    Raises:
        ConfigError: the runs are of different data sets.
    """
    records = [read_run(run) for run in runs]
    group([Member(record) for record in records])  # says what cannot be compared before anything is evaluated
    members = [Member(record, _results(record, evaluate, overrides, notify)) for record in records]
    write_file(out, comparison_page(members))
    return str(out)


def _results(
    record: RunRecord, evaluate: bool, overrides: Sequence[str], notify: Callable[[str], None]
) -> TestResults | None:
    if not evaluate:
        return read_test_results(record.folder)
    try:
        return load_test_results(record.folder, overrides, notify)
    except DataError as error:
        raise DataError(f"{error}\n  or report without evaluating the test set: --no-evaluate") from error


def _write_into_folder(record: RunRecord, results: TestResults | None) -> str:
    names = _draw(record, results, record.folder.path)
    record.folder.publish(*names)
    record.folder.write(PAGE_FILE, run_page(record, results))
    return f"{record.folder.uri}/{PAGE_FILE}"


def _draw(record: RunRecord, results: TestResults | None, folder: Path) -> list[str]:
    names = [CURVES_FILE]
    try:
        draw_curves([*record.epochs, *([record.test] if record.test else [])], record.name, folder / CURVES_FILE)
        if results is not None and len(results.class_names) <= MOST_CLASSES:
            draw_confusion(results.confusion, results.class_names, record.name, folder / CONFUSION_FILE)
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

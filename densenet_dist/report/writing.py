"""Where reports go: into the run's folder, on an object store too, or to a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from densenet_dist.errors import DataError, storage_errors
from densenet_dist.pages.confusion import MOST_CLASSES, printed
from densenet_dist.report.comparison import comparison_page
from densenet_dist.report.figures import curves_figure, titled_confusion
from densenet_dist.report.groups import group
from densenet_dist.report.page import run_page
from densenet_dist.report.record import RunRecord, read_run
from densenet_dist.run_folder import PAGE_FILE, RunFolder
from densenet_dist.train.evaluation import load_test_results

CURVES_FILE: Final = "curves.png"
CONFUSION_FILE: Final = "confusion.png"


def write_report(
    runs: Sequence[str | Path | RunFolder],
    out: Path | None = None,
    *,
    evaluate: bool = True,
    overrides: Sequence[str] = (),
    notify: Callable[[str], None] = lambda text: None,
) -> str:
    """Write the page of a run, or one page that compares several.

    Beside the page of one run are curves.png and, with test results, confusion.png.

    Args:
        runs: their folders, paths, URIs or names under ``runs/``; a run that is named twice, or a copy, counts once.
        out: the page's file; by default report.html, in the run's folder (on an object store too), or of several runs
            in the working directory.
        evaluate: evaluate the test set of a run without stored test results; that alone needs the data set.
        overrides: changes to the runs' configurations for the evaluation, such as ``data.root=...``.
        notify: called with a message before a test set is evaluated, and where a run counts once.

    Returns:
        Where the page is: a path or a URI.

    Raises:
        ConfigError: the runs are of different data sets, or a configuration is wrong.
        StorageError, CheckpointError, DataError, EnvironmentProblem: as their names say.
    """
    found: dict[tuple[str, str], RunRecord] = {}
    for record in map(read_run, runs):
        # Settings hold a run's name and place; its environment, when it was started.
        found.setdefault((record.settings, json.dumps(record.environment)), record)
    records = list(found.values())
    if len(records) < len(runs):
        notify(f"{len(runs) - len(records)} of the runs are named twice, or copies; each counts once")
    group(records)  # says what cannot be compared before anything is evaluated
    if evaluate:
        records = [_evaluated(record, overrides, notify) for record in records]
    if len(records) == 1 and out is None:
        return _write_into_folder(records[0])
    path = out or Path(PAGE_FILE)
    page = run_page(records[0]) if len(records) == 1 else comparison_page(records)
    with storage_errors(path):
        path.write_text(page, encoding="utf-8")
    if len(records) == 1:
        _draw(records[0], path.parent)
    return str(path)


def report_at_end(run: RunFolder) -> str | None:
    """Write the page of a run that has just finished, without ever failing.

    Returns:
        What could not be done, and why; None where all is well.
    """
    try:
        _write_into_folder(read_run(run))
    except Exception as error:  # whatever it is, the run is trained
        return f"the run is finished, but its page could not be written: {error}"
    return None


def _evaluated(record: RunRecord, overrides: Sequence[str], notify: Callable[[str], None]) -> RunRecord:
    try:
        return replace(record, results=record.results or load_test_results(record.folder, overrides, notify))
    except DataError as error:
        raise DataError(f"{error}\n  or report without evaluating the test set: --no-evaluate") from error


def _write_into_folder(record: RunRecord) -> str:
    names = _draw(record, record.folder.path)
    record.folder.publish(*names)
    record.folder.write(PAGE_FILE, run_page(record))
    return f"{record.folder.uri}/{PAGE_FILE}"


def _draw(record: RunRecord, folder: Path) -> list[str]:
    names, results = [CURVES_FILE], record.results
    with storage_errors(folder):
        curves_figure(record.epochs, record.test, record.name).savefig(folder / CURVES_FILE, dpi=120)
        if results is not None and len(results.class_names) <= MOST_CLASSES:
            figure = titled_confusion(results.confusion, results.class_names, record.name)
            with printed():
                figure.savefig(folder / CONFUSION_FILE, dpi=120)
            names.append(CONFUSION_FILE)
    return names

"""The report of a run: one self-contained HTML file in the run's folder, with figures as files beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from densenet_dist.errors import DataError, storage_errors
from densenet_dist.pages import render
from densenet_dist.pages.figures import MAX_CLASSES, MAX_NAMES, PRINTED, drawing
from densenet_dist.report.comparison import comparison_page, group
from densenet_dist.report.figures import calibration_svg, confusion_svg, curves_figure, result_figures, titled_confusion
from densenet_dist.report.record import RunRecord, read_run
from densenet_dist.run_folder import PAGE_FILE, RunFolder
from densenet_dist.train.evaluation import load_test_results
from densenet_dist.train.results import BINS, TestResults

CURVES_FILE: Final = "curves.png"
CONFUSION_FILE: Final = "confusion.png"
_MAX_PAIRS: Final = 12


def write_report(
    runs: Sequence[str | Path | RunFolder],
    out: Path | None = None,
    *,
    evaluate: bool = True,
    overrides: Sequence[str] = (),
    notify: Callable[[str], None] = lambda text: None,
    trust: bool = False,
) -> str:
    """Write the report of a run, or one page that compares several runs.

    The report of one run comes with curves.png and, if there are test results, confusion.png.

    Args:
        runs: their folders, paths, URIs or names under ``runs/``; duplicates and copies are counted once.
        out: the HTML file; by default report.html, in the run's folder (also on an object store), or in the working
            directory for several runs.
        evaluate: evaluate the test set of a run without stored test results; only this needs the data set.
        overrides: changes to the runs' configurations for the evaluation, such as ``data.root=...``.
        notify: called with a message before a test set is evaluated, and about duplicates.
        trust: import the custom parts that the runs name, which runs their code.

    Returns:
        The path or URI of the page.

    Raises:
        ConfigError: the runs use different data sets, or a configuration is wrong.
        StorageError, CheckpointError, DataError, EnvironmentProblem: as their names say.
    """
    found: dict[tuple[str, str], RunRecord] = {}
    for record in (read_run(run, trust=trust) for run in runs):
        # The settings contain the run's name and storage, the environment when it was started.
        found.setdefault((record.settings, json.dumps(record.environment)), record)
    records = list(found.values())
    if len(records) < len(runs):
        duplicates = len(runs) - len(records)
        notify(f"{duplicates} duplicate run{'s are' if duplicates > 1 else ' is'} ignored")
    group(records)  # raises its errors before anything is evaluated
    if evaluate:
        records = [_evaluated(record, overrides, notify, trust) for record in records]
    if len(records) > 1:
        page, path = comparison_page(records), out or Path(PAGE_FILE)
    else:
        page, folder = _run_page(records[0]), records[0].folder
        path = out or folder.path / PAGE_FILE
        figures = _write_figures(records[0], path.parent)
        if out is None:
            folder.publish(*figures)
            folder.write(PAGE_FILE, page)
            return f"{folder.uri}/{PAGE_FILE}"
    with storage_errors(path):
        path.write_text(page, encoding="utf-8")
    return str(path)


def _evaluated(record: RunRecord, overrides: Sequence[str], notify: Callable[[str], None], trust: bool) -> RunRecord:
    try:
        return replace(record, results=record.results or load_test_results(record.folder, overrides, notify, trust))
    except DataError as error:
        raise DataError(f"{error}\n  or report without evaluating the test set: --no-evaluate") from error


def _write_figures(record: RunRecord, folder: Path) -> list[str]:
    """Write the figures as files; return their names."""
    results = record.results
    with storage_errors(folder), drawing(PRINTED):  # without the settings of a user's matplotlibrc
        figures = {CURVES_FILE: curves_figure(record.epochs, record.test, record.name)}
        if results is not None and len(results.class_names) <= MAX_CLASSES:
            figures[CONFUSION_FILE] = titled_confusion(results.confusion, results.class_names, record.name)
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=120)
    return list(figures)


def _run_page(run: RunRecord) -> str:
    device = run.config.cluster.device
    return render(
        "run.html",
        title=run.name,
        run=run,
        uses_gpus=device == "cuda" or (device == "auto" and bool(run.environment.get("gpus"))),
        machine=_machine(run.environment),
        environment={name: _plain(value) for name, value in run.environment.items()},
        has_validation=any("val/loss" in record for record in run.epochs),
        result_figures=result_figures(run.epochs, run.test),
        results=run.results,
        **({} if run.results is None else _test_section(run.results)),
    )


def _machine(environment: dict[str, Any]) -> str:
    found = environment.get("gpus")
    gpus = list(map(str, found)) if isinstance(found, list) else []
    kinds = ", ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus))
    host, cpus, cpu = (environment.get(key, "unknown") for key in ("host", "cpus", "cpu"))
    return f"{host}: {kinds or 'no GPU'}; {cpus} CPUs, {cpu}"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if value is None or value == []:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _test_section(results: TestResults) -> dict[str, Any]:
    """Return the template's variables about test images."""
    names, calibration = results.class_names, results.calibration
    correct, images, predicted = results.class_counts.tolist()
    wrong = results.pairs[results.pairs[:, 0] != results.pairs[:, 1]]
    pairs = wrong[np.argsort(-wrong[:, 2], kind="stable")[:_MAX_PAIRS]].tolist()
    return {
        "bins": BINS,
        "mean_confidence": float((calibration.images * calibration.confidence).sum() / calibration.images.sum()),
        "confusion_figure": confusion_svg(results.confusion, names) if len(names) <= MAX_CLASSES else None,
        "are_numbered": len(names) > MAX_NAMES,
        "confusions": [(names[row], names[column], count, count / images[row]) for row, column, count in pairs],
        "classes": [
            (name, total, right / total if total else None, right / guessed if guessed else None)
            for name, total, right, guessed in zip(names, images, correct, predicted, strict=True)
        ],
        "calibration_figures": [calibration_svg(calibration)],
    }

"""The report of a run, one self-contained HTML file in its folder; or of several runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from densenet_dist.custom import names_in
from densenet_dist.errors import storage_errors
from densenet_dist.pages import render
from densenet_dist.pages.figures import MAX_CLASSES, MAX_NAMES
from densenet_dist.report.comparison import comparison_page
from densenet_dist.report.figures import calibration_svg, confusion_svg, result_figures
from densenet_dist.report.record import RunRecord, read_run
from densenet_dist.run_folder import PAGE_FILE, RunFolder
from densenet_dist.train.results import BINS, TestResults

_MAX_PAIRS: Final = 12


def write_report(runs: Sequence[str | Path | RunFolder], out: Path | None = None, *, trust: bool = False) -> str:
    """Write the report of a run, or one page that compares several runs. The data sets are not needed.

    Args:
        runs: their folders, paths, URIs or names under ``runs/``.
        out: the HTML file; by default report.html, in the run's folder (also on an object store), or in the working
            directory for several runs.
        trust: import the custom models that the runs name, which runs their code.

    Returns:
        The path or URI of the page.

    Raises:
        ConfigError: the runs use different data sets, or a configuration is wrong.
        StorageError: a run cannot be read, or the page cannot be written.
    """
    records = [read_run(run, trust=trust) for run in runs]
    if len(records) > 1:
        page, path = comparison_page(records), out or Path(PAGE_FILE)
    else:
        page, folder = _run_page(records[0]), records[0].folder
        if out is None:
            folder.write(PAGE_FILE, page)
            return f"{folder.uri}/{PAGE_FILE}"
        path = out
    with storage_errors(path):
        path.write_text(page, encoding="utf-8")
    return str(path)


def _run_page(run: RunRecord) -> str:
    device = run.config.cluster.device
    return render(
        "run.html",
        title=run.name,
        run=run,
        uses_gpus=device == "cuda" or (device == "auto" and bool(run.environment.get("gpus"))),
        environment={name: _plain(value) for name, value in run.environment.items()},
        has_validation=any("val/loss" in record for record in run.epochs),
        result_figures=result_figures(run.epochs, run.test),
        results=run.results,
        trust=["--trust"] if any(names_in(run.config)) else [],
        **({} if run.results is None else _test_section(run.results)),
    )


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

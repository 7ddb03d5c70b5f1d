"""The page of one run: everything in one HTML file, pictures included."""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np

from densenet_dist.pages.confusion import MOST_CLASSES, MOST_NAMES
from densenet_dist.pages.render import percent, render
from densenet_dist.report.figures import calibration_pictures, confusion_picture, progress_pictures, result_pictures
from densenet_dist.report.record import RunRecord
from densenet_dist.train.results import BINS, TestResults

_MOST_PAIRS: Final = 12
_LOSSES: Final = {
    "start": "starting",
    "wait": "waiting for data",
    "validate": "validation",
    "save": "checkpoints",
    "recovery": "recovery from losses",
}


def run_page(run: RunRecord) -> str:
    """The page's HTML, from the template ``run.html``; without test results it lacks the sections about them."""
    device = run.config.cluster.device
    return render(
        "run.html",
        title=run.name,
        run=run,
        goodput=_goodput(run.epochs[-1]),
        uses_gpus=device == "cuda" or (device == "auto" and bool(run.environment.get("gpus"))),
        machine=_machine(run.environment),
        commit=_commit(run.environment),
        environment={name: _plain(value) for name, value in run.environment.items()},
        legend=_legend(run),
        result_figures=result_pictures(run.epochs, run.test),
        progress_figures=progress_pictures(run.epochs),
        results=run.results,
        **({} if run.results is None else _test_section(run.results)),
    )


def _goodput(last: dict[str, Any]) -> str | None:
    """The share of time in steps that count, and where the rest went, the largest share first; before the test."""
    if "goodput/ratio" not in last:
        return None
    lost = {words: last.get(f"goodput/lost_to_{key}", 0.0) for key, words in _LOSSES.items()}
    parts = [f"{percent(share)} {words}" for words, share in sorted(lost.items(), key=lambda item: -item[1]) if share]
    rest = ", ".join(parts) or "nothing"
    return f"{percent(last['goodput/ratio'])} of the time in steps that count; the rest: {rest}"


def _machine(environment: dict[str, Any]) -> str:
    found = environment.get("gpus")
    gpus = list(map(str, found)) if isinstance(found, list) else []
    kinds = ", ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus))
    host, cpus, cpu = (environment.get(key, "unknown") for key in ("host", "cpus", "cpu"))
    return f"{host}: {kinds or 'no GPU'}; {cpus} CPUs, {cpu}"


def _commit(environment: dict[str, Any]) -> str:
    revision, plus, _ = str(environment.get("git") or "unknown").partition("+")
    return f"{revision}, with changes that were not committed" if plus else revision


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if value is None or value == []:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _legend(run: RunRecord) -> list[tuple[str, str, str]]:
    legend = [("train", "●", "training")]
    if any("val/loss" in record for record in run.epochs):
        legend.append(("val", "●", "validation"))
    if run.test is not None:
        legend.append(("test", "★", "test, at the epoch of the checkpoint"))
    return legend


def _test_section(results: TestResults) -> dict[str, Any]:
    """What the sections about test images show."""
    confusion, names, calibration = results.confusion, results.class_names, results.calibration
    images, right, predicted = confusion.sum(1).tolist(), np.diag(confusion).tolist(), confusion.sum(0).tolist()
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = np.stack(np.unravel_index(order, wrong.shape), axis=1).tolist()
    return {
        "bins": BINS,
        "mean_confidence": float((calibration.images * calibration.confidence).sum() / calibration.images.sum()),
        "confusion_figure": confusion_picture(confusion, names) if len(names) <= MOST_CLASSES else None,
        "are_numbered": len(names) > MOST_NAMES,
        "confusions": [
            {
                "label": names[row],
                "predicted": names[column],
                "images": int(wrong[row, column]),
                "share": int(wrong[row, column]) / images[row],
            }
            for row, column in pairs
            if wrong[row, column]
        ],
        "classes": [
            {
                "name": name,
                "images": images[label],
                "accuracy": right[label] / images[label] if images[label] else None,
                "precision": right[label] / predicted[label] if predicted[label] else None,
            }
            for label, name in enumerate(names)
        ],
        "calibration_figures": calibration_pictures(calibration),
    }

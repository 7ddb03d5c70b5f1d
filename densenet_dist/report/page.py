"""The page of one run: everything in one HTML file, pictures included."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Final

import numpy as np

from densenet_dist.pages.confusion import MOST_CLASSES, MOST_NAMES
from densenet_dist.pages.frame import NUMBER, cell, code, details, document, escape, facts, section, table
from densenet_dist.report.figures import (
    calibration_pictures,
    confusion_picture,
    progress_pictures,
    result_pictures,
    time_unit,
)
from densenet_dist.report.judged import BINS, Judged, Mistake
from densenet_dist.report.record import RunRecord
from densenet_dist.report.style import STYLE
from densenet_dist.report.summary import Layer, ModelSummary

_SPACE = "\N{NO-BREAK SPACE}"
_MOST_PAIRS = 12


_LOSSES: Final = {
    "start": "starting",
    "wait": "waiting for data",
    "validate": "validation",
    "save": "checkpoints",
    "recovery": "recovery from losses",
}


def run_page(run: RunRecord, judged: Judged | None) -> str:
    """The page's HTML.

    Args:
        run: what its folder says.
        judged: what its best checkpoint says of the test images; None leaves those sections out.
    """
    parts = [f"<h1>{escape(run.name)}</h1>", _facts(run), *_curves(run)]
    parts += _judged(judged) if judged is not None else [_not_judged(run)]
    parts += [
        _model(run.model),
        f"<h2>Configuration</h2>{details('config.yaml', f'<pre>{escape(run.settings)}</pre>')}",
        _environment(run),
    ]
    return document(run.name, parts, STYLE)


def percent(share: float) -> str:
    """A share in [0, 1] in per cent."""
    return f"{share * 100:.2f}{_SPACE}%"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    unit, divisor = time_unit(seconds)
    return f"{seconds / divisor:,.1f}{_SPACE}{unit}"


def git_commit(run: RunRecord) -> str:
    """What the run's code was."""
    commit = run.environment.get("git")
    if not commit:
        return "not known"
    revision, plus, _ = str(commit).partition("+")
    return f"{revision}, with changes that were not committed" if plus else revision


def _facts(run: RunRecord) -> str:
    config, best = run.config, run.best
    rows = {"Test result": "None yet: the run has not come to its end."}
    if run.test is not None:
        figures = f"top-1 {percent(run.test['test/top1'])}, top-5 {percent(run.test['test/top5'])}"
        text = f"{figures}, loss {run.test['test/loss']:.4f}"
        rows["Test result"] = f"<strong>{escape(text)}</strong>, by the checkpoint of epoch {run.test['epoch']}"
    if best is not None and "val/top1" in best:
        text = f"top-1 {percent(best['val/top1'])}, loss {best['val/loss']:.4f} at epoch {best['epoch']}"
        rows["Validation"] = escape(f"{text}, the best by {config.checkpoint.monitor}")
    rows["Training"] = escape(_training(run))
    if "goodput/ratio" in run.epochs[-1]:
        rows["Goodput"] = escape(_goodput_in_words(run))
    if "perf/device_hours" in run.epochs[-1]:
        rows["Cost"] = escape(_cost_in_words(run))
    rows["Model"] = escape(_model_in_words(run))
    rows["Data"] = escape(_data_in_words(run))
    rows["Machine"] = escape(_machine_in_words(run))
    rows["Git commit"] = f"<code>{escape(git_commit(run))}</code>"
    if run.summary:
        rows["Test it again"] = code("densenet-dist", "evaluate", run.location)
    else:
        rows["Go on"] = code("densenet-dist", "train", "--resume", run.location)
    return facts(rows)


def _training(run: RunRecord) -> str:
    last = run.epochs[-1]
    text = f"{run.summary.get('status', 'not finished')}: {last['epoch']} of {run.config.train.epochs} epochs, "
    text += f"{last['global_step']:,} steps of {run.config.train.global_batch_size} images"
    seconds = run.summary.get("train_seconds")
    return text + (f", {duration(seconds)} of training, evaluation excluded" if seconds is not None else "")


def _goodput_in_words(run: RunRecord) -> str:
    """The share of time in steps that count, and what the rest went to, the most first; before the test."""
    last = run.epochs[-1]
    lost = {words: last.get(f"goodput/lost_to_{key}", 0.0) for key, words in _LOSSES.items()}
    parts = [
        f"{percent(share)} {words}" for words, share in sorted(lost.items(), key=lambda item: -item[1]) if share > 0
    ]
    again = last.get("goodput/steps_again", 0)
    return (
        f"{percent(last['goodput/ratio'])} of the time in steps that count; the rest: {', '.join(parts) or 'nothing'}"
        + (f"; {again:,} steps taken again" if again else "")
    )


def _cost_in_words(run: RunRecord) -> str:
    hours = run.epochs[-1]["perf/device_hours"]
    device = run.config.cluster.device
    gpus = device == "cuda" or (device == "auto" and bool(run.environment.get("gpus")))
    unit = "GPU-hours" if gpus else "worker-hours"
    return f"{hours:.3g}{_SPACE}{unit}, of all workers together; start-up and recovery included, the test not"


def _model_in_words(run: RunRecord) -> str:
    if isinstance(run.model, str):
        return run.config.model.variant
    return f"{run.config.model.variant}, {run.model.parameters.trainable:,} trainable parameters"


def _data_in_words(run: RunRecord) -> str:
    data = run.config.data
    return f"{data.name}, {data.augment}, seed {run.config.seed}" + (f", limit {data.limit:,}" if data.limit else "")


def _machine_in_words(run: RunRecord) -> str:
    found = run.environment
    gpus = [str(gpu) for gpu in found.get("gpus") or []]
    kinds = ", ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus))
    where = f"{found.get('host', 'unknown host')}: {kinds or 'no GPU'}; {found.get('cpus', '?')} CPUs"
    return f"{where}, {found.get('cpu', 'unknown')}; {run.config.train.precision}"


def _curves(run: RunRecord) -> Iterator[str]:
    legend = [("train", "●", "training")]
    legend += [("val", "●", "validation")] if any("val/loss" in record for record in run.epochs) else []
    legend += [("test", "★", "test, at the epoch of the checkpoint")] if run.test is not None else []
    average = " Validation and test are of the averaged weights." if run.config.train.ema_decay is not None else ""
    yield section(
        "Accuracy and loss",
        "After each epoch. Training figures are means over the epoch while the weights change, on augmented images."
        + average,
        result_pictures(run.epochs, run.test),
        legend,
    )
    yield section(
        "Learning rate, throughput, data wait and goodput",
        "A point an epoch: its first learning rate; images/s of all workers together, the share of rank 0's time spent "
        "waiting for batches, and the share of all time so far that went into steps that count. Time on the axes is "
        "that of training and validation, interruptions left out.",
        progress_pictures(run.epochs),
    )


def _not_judged(run: RunRecord) -> str:
    return "<h2>Test images</h2><p>Not shown: the test images were not looked at for this page. " + (
        f"{code('densenet-dist', 'report', run.location)} adds confusion matrix, accuracy of each class, calibration "
        "and mistakes.</p>"
    )


def _judged(judged: Judged) -> list[str]:
    figures = judged.figures
    mean = float((judged.calibration.images * judged.calibration.confidence).sum() / judged.calibration.images.sum())
    rows = {
        "Images": f"{figures['images']:,.0f}, each shown once, unaugmented, to the best checkpoint on a "
        f"{judged.device.upper()}",
        "Top-1, top-5": escape(f"{percent(figures['top1'])}, {percent(figures['top5'])}"),
        "Loss": f"{figures['loss']:.4f}",
        "Mean confidence": escape(percent(mean)),
        "ECE": escape(f"{percent(judged.calibration.ece)}, expected calibration error in {BINS} bins"),
    }
    return [
        f"<h2>Test images</h2>{facts(rows)}",
        _confusion(judged),
        _classes(judged),
        _calibration(judged),
        _wrong(judged),
    ]


def _confusion(judged: Judged) -> str:
    names, confusion = judged.class_names, judged.confusion
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = [(int(label), int(taken)) for label, taken in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    rows = [
        f"<tr>{cell(names[label])}{cell(names[taken])}{cell(f'{wrong[label, taken]:,}', int(wrong[label, taken]))}"
        f"{_share(int(wrong[label, taken]), int(confusion[label].sum()))}</tr>"
        for label, taken in pairs
        if wrong[label, taken]
    ]
    caption = "Images of each true class (row) by what they were taken for (column); the stronger the colour, the "
    caption += "larger the share of the row, by its square root."
    pictures: tuple[str, ...] = (confusion_picture(confusion, names),) if len(names) <= MOST_CLASSES else ()
    if len(names) > MOST_NAMES:
        caption += " Classes are numbered from 0, in the order of the table below."
    if not pictures:
        caption = f"Not drawn: {len(names)} classes are too many to be seen."
    heads = [("true class", False), ("taken for", False), ("images", True), ("of the class (%)", True)]
    if rows:
        pictures += (f"<div><h3>Most frequent confusions</h3>{table(heads, rows)}</div>",)
    return section("Confusion matrix", caption, pictures)


def _share(count: int, total: int) -> str:
    return cell(f"{count / total * 100:.2f}", count / total) if total else "<td></td>"


def _classes(judged: Judged) -> str:
    confusion, rows = judged.confusion, []
    for label, name in enumerate(judged.class_names):
        images, right, taken = (
            int(n) for n in (confusion[label].sum(), confusion[label, label], confusion[:, label].sum())
        )
        accuracy = f"<td{NUMBER}></td>"
        if images:
            share = right / images
            bar = f'<span class="bar"><i style="width:{share * 100:.1f}%"></i></span>'
            accuracy = f'<td{NUMBER} data-value="{share!r}">{share * 100:.2f}{bar}</td>'
        rows.append(f"<tr>{cell(name)}{cell(f'{images:,}', images)}{accuracy}{_share(right, taken)}</tr>")
    heads = [("class", False), ("test images", True), ("accuracy (%)", True), ("precision (%)", True)]
    note = (
        "Accuracy: share of the class' images that are recognised (recall). Precision: share of the images taken for "
    )
    note += "the class that are of it. A click on a heading sorts."
    return f"<h2>Accuracy of each class</h2><p>{note}</p>{table(heads, rows)}"


def _calibration(judged: Judged) -> str:
    caption = (
        f"Left, the accuracy of the images in each of {BINS} bins of confidence, the probability of the predicted "
        "class; a dot is a bin's mean confidence, and on the dashed line both are equal. Right, the images in each "
        "bin. ECE is the gap between accuracy and mean confidence, averaged over images (Guo et al. 2017)."
    )
    return section("Calibration", caption, calibration_pictures(judged.calibration))


def _wrong(judged: Judged) -> str:
    if not judged.mistakes:
        return "<h2>Most confidently wrong</h2><p>None: every test image was recognised.</p>"
    tiles = "".join(_tile(mistake, judged.class_names) for mistake in judged.mistakes)
    note = "Test images taken for another class, the highest confidence first; the number is the image's place in the "
    note += "test set."
    return f'<h2>Most confidently wrong</h2><p>{note}</p><div class="tiles">{tiles}</div>'


def _tile(mistake: Mistake, names: tuple[str, ...]) -> str:
    picture = '<span class="none">cannot be read any more</span>'
    true, taken = escape(names[mistake.label]), escape(names[mistake.predicted])
    if mistake.picture is not None:
        data = base64.b64encode(mistake.picture).decode("ascii")
        picture = f'<img src="data:image/png;base64,{data}" alt="{true}, taken for {taken}">'
    text = f"<strong>{true}</strong><br>taken for {taken}<br>"
    text += f"<small>{percent(mistake.confidence)}, no. {mistake.place}</small>"
    return f"<figure>{picture}<figcaption>{text}</figcaption></figure>"


def _model(model: ModelSummary | str) -> str:
    if isinstance(model, str):
        return f"<h2>Model</h2><p>Not shown: {escape(model)}</p>"
    count = model.parameters
    rows = {
        "Total parameters": f"{count.total:,}",
        "Trainable": f"{count.trainable:,}",
        "Not trainable": f"{count.statistics:,}, running means and variances of batch normalisation",
    }
    lines = "\n".join(map(_layer, model.layers))
    head = f'<tr><th scope="col">layer</th><th scope="col">kind</th><th scope="col"{NUMBER}>output shape</th>'
    head += f'<th scope="col"{NUMBER}>parameters</th></tr>'
    body = f'<div class="table"><table class="layers"><thead>{head}</thead>\n<tbody>{lines}</tbody></table></div>'
    note = "N images; a module that others are inside of has their parameters too."
    return f"<h2>Model</h2>{facts(rows)}<p>{note}</p>{body}"


def _layer(layer: Layer) -> str:
    name = _SPACE * 2 * layer.depth + layer.name.rpartition(".")[2]
    shape = ", ".join(["N", *map(str, layer.shape)])
    name = escape(name) if layer.is_whole else f"<strong>{escape(name)}</strong>"
    numbers = f"<td{NUMBER}>({shape})</td><td{NUMBER}>{layer.parameters:,}</td>"
    return f'<tr title="{escape(layer.name)}"><td>{name}</td><td>{escape(layer.kind)}</td>{numbers}</tr>'


def _environment(run: RunRecord) -> str:
    if not run.environment:
        return "<h2>Environment</h2><p>Not shown: the run has no env.json.</p>"
    rows: dict[str, str] = {}
    for key, value in run.environment.items():
        if isinstance(value, dict):
            rows[escape(key)] = escape(", ".join(f"{name} {_plain(part)}" for name, part in value.items()))
        else:
            rows[escape(key)] = escape(_plain(value))
    return f"<h2>Environment</h2>{facts(rows)}"


def _plain(value: object) -> str:
    if value is None or value == []:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

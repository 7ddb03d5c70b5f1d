"""``densenet-dist evaluate``, ``report``, ``predict`` and ``export``: commands for trained runs."""

from __future__ import annotations

import json
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from densenet_dist.cli.options import Checkpoint, Debug, Run, Settings, Trust, local_path, status
from densenet_dist.credentials import without_credentials
from densenet_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from densenet_dist.inference.classifier import Prediction

_BAR_LENGTH = 20


def evaluate(
    run: Run,
    settings: Settings = None,
    split: Annotated[Literal["test", "val", "train"], typer.Option(help="Which images to evaluate.")] = "test",
    checkpoint: Checkpoint = "best",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Evaluate a checkpoint of a run: loss, accuracies and macro F1.

    If the run has no test results yet, those of its best checkpoint are stored for its report.

    densenet-dist evaluate runs/k24
    densenet-dist evaluate k24 --split val --checkpoint last --json
    densenet-dist evaluate s3://bucket/runs/k24 data.root=/data
    """
    with status("loading PyTorch"):
        from densenet_dist.display.json_lines import finite
        from densenet_dist.train.evaluation import evaluate as evaluate_run

    notify = partial(typer.echo, err=True)
    with status("evaluating"):
        found = evaluate_run(
            run, split=split, checkpoint=checkpoint, overrides=tuple(settings or ()), notify=notify, trust=trust
        )
    if as_json:
        typer.echo(json.dumps(finite({"run": run, "split": split, "checkpoint": checkpoint, **found})))
    else:
        top5 = f"top-5 {found['top5']:.2%}, " if "top5" in found else ""
        typer.echo(
            f"{split}: loss {found['loss']:.4f}, top-1 {found['top1']:.2%}, {top5}"
            f"balanced accuracy {found['balanced_accuracy']:.2%}, worst class {found['worst_class_accuracy']:.2%}, "
            f"macro F1 {found['macro_f1']:.4f} "
            f"({found['images']:,.0f} images)"
        )


def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Folders of runs (paths or s3:// URIs), or their names in runs/."),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.html",
            help="Where to write the report; by default report.html in the run's folder, or for several runs in the "
            "working directory.",
            show_default=False,
        ),
    ] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Write the report of a run, or a comparison of several, as one HTML file.

    It shows test results if the run has finished, or after densenet-dist evaluate.

    densenet-dist report runs/k24
    densenet-dist report s3://bucket/runs/k24    (the report is written there)
    densenet-dist report runs/seed0 runs/seed1 runs/k24 --out compared.html
    """
    from densenet_dist.run_folder import PAGE_FILE

    if out is not None and "://" in out:
        raise ConfigError(f"--out {out}: must be a local file\n  without --out the report of a run is in its folder")
    path = local_path(out) if out is not None else Path(PAGE_FILE) if len(runs) > 1 else None
    with status("loading PyTorch"):
        from densenet_dist.report.page import write_report
    with status("writing the report"):
        written = write_report(runs, path, trust=trust)
    typer.echo(f"report: {written}")


def predict(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|EXPORT",
            help="The folder of a run (path or s3:// URI), its name in runs/, or an exported .safetensors file.",
        ),
    ],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="Number of classes to show for each image.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per image and line.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, max=10_000, help="Images per batch.")] = 64,
    tta: Annotated[
        bool, typer.Option("--tta", help="Average with the mirrored image: slower, slightly more accurate.")
    ] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto uses a GPU if there is one.")] = "auto",
    checkpoint: Checkpoint = "best",
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Classify images of any size: JPEG, PNG, WebP, AVIF, BMP, GIF, ICO, JPEG 2000, PPM, PSD, TIFF.

    Unusable images are listed on standard error, the others are classified, and the exit code is 4.

    densenet-dist predict runs/k24 photo.jpg
    densenet-dist predict k24.safetensors photos --json > predictions.jsonl
    """
    with status("loading PyTorch"):
        from densenet_dist.data.image_folder import printable
        from densenet_dist.inference.classifier import load_classifier
        from densenet_dist.inference.images import Unreadable, find

    warnings.filterwarnings("ignore", module="PIL")  # about unusual files, which are readable or listed
    classifier = load_classifier(model, checkpoint=checkpoint, device=device, trust=trust)
    started = time.perf_counter()
    good = bad = 0
    for item in classifier.stream(find(images), top=top, batch_size=batch_size, tta=tta):
        if isinstance(item, Unreadable):
            bad += 1
            typer.echo(without_credentials(f"{printable(item.source)}: {item.reason}"), err=True)
            continue
        good += 1
        if not as_json:
            _show(item)
        else:
            top_classes = [
                {"class": each.name, "label": each.label, "probability": each.probability} for each in item.top
            ]
            typer.echo(json.dumps({"image": item.source, "top": top_classes}))
    seconds = time.perf_counter() - started
    if good:
        count = "1 image" if good == 1 else f"{good:,} images"
        typer.echo(f"{count} in {seconds:.2f} s: {good / seconds:,.1f} images/s on {classifier.device}", err=True)
    if bad:
        raise DataError(f"{bad} of {bad + good} images could not be used; they are listed above")


def _show(item: Prediction) -> None:
    """Print an image's name, and below it its most probable classes with their probabilities as numbers and bars."""
    from rich.console import Console
    from rich.text import Text

    from densenet_dist.data.image_folder import printable

    console = Console(highlight=False, soft_wrap=True)  # unlike typer.echo it keeps the encoding of standard output
    block = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    width = max(len(found.name) for found in item.top)
    console.print(Text(printable(item.source), style="bold"))
    for found in item.top:
        bar = block * round(found.probability * _BAR_LENGTH)
        console.print(Text(f"  {found.name:<{width}}  {found.probability:7.2%}  {bar}".rstrip()))


def export(
    run: Run,
    settings: Settings = None,
    format: Annotated[
        Literal["safetensors", "torch-export", "onnx"],
        typer.Option(help="safetensors for this package, torch-export (.pt2) for PyTorch, onnx for ONNX runtimes."),
    ] = "safetensors",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="By default the name of the run, in the working directory.", show_default=False
        ),
    ] = None,
    checkpoint: Checkpoint = "best",
    check: Annotated[
        bool, typer.Option(help="Compare the file with the run on test images; needs the data set.")
    ] = True,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Export a trained model to one file, with class names and preprocessing, and check it.

    densenet-dist export runs/k24
    densenet-dist export runs/k24 --format onnx
    """
    with status("loading PyTorch"):
        from densenet_dist.inference.exporting import export as export_run

    with status("exporting"):
        made = export_run(
            run,
            format=format,
            out=out,
            checkpoint=checkpoint,
            check=check,
            overrides=tuple(settings or ()),
            trust=trust,
        )
    typer.echo(f"{made.path}: {made.bytes:,} bytes, {made.format}")
    if (found := made.check) is None:
        typer.echo("not checked")
        return
    same = "all" if found.agreeing == 1 else f"{found.agreeing:.2%}"
    typer.echo(
        f"checked on {found.images:,} test images: largest difference of a logit {found.largest:.2g}, "
        f"top-1 agrees on {same}"
    )

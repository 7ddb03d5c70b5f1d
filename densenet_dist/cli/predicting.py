"""``densenet-dist predict`` and ``export``: use a trained net."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from densenet_dist.cli.options import Checkpoint, Debug, Run
from densenet_dist.credentials import without_credentials
from densenet_dist.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

    from densenet_dist.inference.classifier import Prediction
    from densenet_dist.inference.exporting import Exported

_BAR = 20  # characters
_WIDE = 4000


def predict(
    net: Annotated[
        str,
        typer.Argument(
            metavar="RUN|EXPORT", help="A run's folder (path or s3:// URI), its name in runs/, or an exported file."
        ),
    ],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Pictures, folders of them, or patterns.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to give for each picture.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a picture, a line each.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, max=10_000, help="Pictures that the net sees at a time.")] = 64,
    tta: Annotated[bool, typer.Option("--tta", help="Mean with the mirror image: slower, a little better.")] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU if there is one.")] = "auto",
    checkpoint: Checkpoint = "best",
    debug: Debug = False,
) -> None:
    """Classify pictures of any size: JPEG, PNG, WebP, AVIF, BMP, GIF, ICO, JPEG 2000, PPM, PSD, TIFF.

    Pictures that cannot be used are named on standard error, the others are classified, and the exit code is 4.

    densenet-dist predict runs/k24 photo.jpg
    densenet-dist predict k24.safetensors photos '*.png' --json > found.jsonl
    """
    from densenet_dist.data.image_folder import printable
    from densenet_dist.inference.classifier import load_classifier
    from densenet_dist.inference.pictures import Unreadable, find

    classifier = load_classifier(net, checkpoint=checkpoint, device=device)
    started = time.perf_counter()
    table = None if as_json else _table()
    good = bad = 0
    for item in classifier.stream(find(images), top=top, batch_size=batch_size, tta=tta):
        if isinstance(item, Unreadable):
            bad += 1
            typer.echo(without_credentials(f"{printable(item.source)}: {item.reason}"), err=True)
            continue
        good += 1
        if table is not None:
            _add(table, item)
        else:
            guesses = [{"class": each.name, "label": each.label, "probability": each.probability} for each in item.top]
            typer.echo(json.dumps({"image": item.source, "top": guesses}))
    seconds = time.perf_counter() - started
    if good:
        if table is not None:
            _print(table)
        pictures = "1 picture" if good == 1 else f"{good:,} pictures"
        typer.echo(f"{pictures} in {seconds:.2f} s: {good / seconds:,.1f} images/s on {classifier.device}", err=True)
    if bad:
        raise DataError(f"{bad} of {bad + good} pictures could not be used; they are named above")


def export(
    run: Run,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Changes, such as data.root=DIR.")
    ] = None,
    format: Annotated[
        Literal["safetensors", "torch-export", "onnx"],
        typer.Option(help="safetensors for this package; torch-export (.pt2) for PyTorch alone; onnx for onnxruntime."),
    ] = "safetensors",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="By default the run's name in this folder.", show_default=False),
    ] = None,
    checkpoint: Checkpoint = "best",
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="bf16 for safetensors and torch-export.")] = "fp32",
    check: Annotated[
        bool, typer.Option(help="Whether to load the file again and compare it on test images; needs the data set.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Write a run's net into one file, with class names and preparation of pictures, and make sure that it is the same.

    densenet-dist export runs/k24
    densenet-dist export runs/k24 --format onnx
    """
    from densenet_dist.inference.exporting import export as write

    made = write(
        run,
        format=format,
        out=out,
        checkpoint=checkpoint,
        precision=precision,
        check=check,
        overrides=tuple(settings or ()),
    )
    typer.echo(f"{made.path}: {made.bytes:,} bytes, {made.format}, {made.header.precision}")
    typer.echo(_checked(made))


def _checked(made: Exported) -> str:
    check = made.check
    if check is None:
        return "not checked"
    same = "top-1 agrees on all" if check.agreeing == 1 else f"top-1 agrees on {check.agreeing:.2%}"
    lines = [f"checked on {check.images:,} test images: largest difference of a logit {check.largest:.2g}, {same}"]
    if made.header.precision != "fp32":
        lines.append(f"test top-1: {check.top1:.2%} in fp32, {check.exported_top1:.2%} in {made.header.precision}")
    return "\n".join(lines)


def _table() -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("picture", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    return table


def _add(table: Table, item: Prediction) -> None:
    from rich.text import Text

    from densenet_dist.data.image_folder import printable

    block = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
    for place, guess in enumerate(item.top):
        name = printable(item.source) if place == 0 else ""
        style = "bold" if place == 0 else None
        bar = block * round(guess.probability * _BAR)
        table.add_row(Text(name), Text(guess.name), f"{guess.probability:.2%}", bar, style=style)
    if len(item.top) > 1:
        table.add_section()


def _print(table: Table) -> None:
    from rich.console import Console

    # A file, or a program that reads on, wants whole names: only a terminal has a width.
    console = Console()
    console.print(table) if console.is_terminal else Console(width=_WIDE).print(table)

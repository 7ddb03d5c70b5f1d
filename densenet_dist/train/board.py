"""What TensorBoard shows of a run: curves, pictures, the model, settings beside results, and how the test went.

One folder of events, by rank 0 alone. What is written at step 0 is written once; a process that takes the run up again
hides what the one before wrote of steps that come again.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from densenet_dist.config import to_dict, to_yaml
from densenet_dist.data.datasets import Dataset
from densenet_dist.data.requests import Engine
from densenet_dist.pages.confusion import MOST_CLASSES, printed, printed_confusion
from densenet_dist.schema import Config
from densenet_dist.train.board_graph import model_graph
from densenet_dist.train.context import LocalContext
from densenet_dist.train.inputs import eval_loader
from densenet_dist.train.job import Job
from densenet_dist.train.judging import Mistake, Tally, pictures_of
from densenet_dist.yaml_settings import flatten

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import ImageFont

_HYPERPARAMETERS = ("model.", "train.", "data.name", "data.augment", "data.normalize", "data.limit", "seed")
"""What decides a result; where and how it is computed or kept would only crowd TensorBoard's table."""
_MOST_CURVES: Final = 10
"""Above so many classes there are curves of precision and recall for their averages only."""
_CELL_INCHES: Final = 0.3
"""Of the confusion matrix: TensorBoard shows pictures 320 pixels wide, whatever their size, and texts must be large."""
_LAYOUT: Final = {
    "training and validation": {
        "loss": ["Multiline", ["train/loss", "val/loss"]],
        "top-1": ["Multiline", ["train/top1", "val/top1"]],
        "top-5": ["Multiline", ["train/top5", "val/top5"]],
        "learning rate": ["Multiline", ["^lr$"]],
    },
    "speed": {
        "images a second": ["Multiline", ["perf/images_per_s"]],
        "goodput, and waiting for data": ["Multiline", ["goodput/ratio", "perf/data_wait"]],
        "what time was lost to": ["Multiline", ["goodput/lost_to_.*"]],
    },
}
"""The Custom Scalars tab: TensorBoard puts tags into one chart there alone."""


class Results:
    """The figures of the best epoch so far, for the HPARAMS tab: of all scalars it shows the first five at once.

    Args:
        monitor: ``val/top1``, the higher the better, or ``val/loss``.
    """

    def __init__(self, monitor: str) -> None:
        self._monitor, self._sign = monitor, 1 if monitor.endswith("top1") else -1
        self._best: dict[str, Any] = {}

    def add(self, record: dict[str, Any]) -> dict[str, float]:
        """Count a record of metrics.jsonl in.

        Returns:
            ``best/epoch``, ``best/val_loss``, ``best/val_top1``; for the record of the test ``best/test_...`` instead.
        """
        if "test/top1" in record:
            return {f"best/test_{name}": record[f"test/{name}"] for name in ("loss", "top1")}
        if self._monitor not in record:
            return {}
        if not self._best or self._sign * record[self._monitor] > self._sign * self._best[self._monitor]:
            self._best = record
        return {
            "best/epoch": self._best["epoch"],
            **{f"best/val_{name}": self._best[f"val/{name}"] for name in ("loss", "top1")},
        }


class Board:
    """The TensorBoard events of one run.

    Args:
        folder: for the files of events.
        hides_from: the step from which on what earlier processes wrote is hidden. Every process has to say one:
            where TensorBoard runs without its data server, the first that it reads hides nothing.
    """

    def __init__(self, folder: Path, hides_from: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import: only rank 0 pays it

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = SummaryWriter(str(folder), purge_step=hides_from, flush_secs=10)

    def scalars(self, values: dict[str, Any], step: int) -> None:
        """Show each number under its own tag."""
        for tag, value in values.items():
            if "/" in tag or tag == "lr":
                self._writer.add_scalar(tag, value, step)

    def introduce(self, config: Config, dataset: Dataset) -> None:
        """What is known before the first step: settings, the model's graph, which curves belong together."""
        self.hparams(config)
        self._writer.add_custom_scalars(_LAYOUT)
        self._writer.add_text("config", f"```yaml\n{to_yaml(config)}```", 0)
        self._graph(config, dataset)

    def images(self, tag: str, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], step: int) -> None:
        """Show up to 64 normalised images, (n, 3, H, W) float, as one grid."""
        shown = images[:64].detach().float().cpu()
        scale, shift = (shown.new_tensor(values).view(1, 3, 1, 1) for values in (std, mean))
        self._writer.add_images(tag, (shown * scale + shift).clamp(0, 1), step)

    def hparams(self, config: Config) -> None:
        """Fill TensorBoard's HPARAMS tab, in this same run (`SummaryWriter.add_hparams` would start another).

        Before the first step, so that a run that is stopped or lost is in it too. The settings alone: told what an
        experiment consists of, the tab would believe it, and not put first what differs between its runs. All scalars
        are metrics to it, in the order of their names; `Results` is there to come first.
        """
        from torch.utils.tensorboard.summary import hparams

        settings = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in flatten(to_dict(config)).items()
            if value is not None and key.startswith(_HYPERPARAMETERS)
        }
        writer = self._writer._get_file_writer()
        _, start, _ = hparams(settings, {})
        writer.add_summary(start)

    def judged(self, tally: Tally, names: Sequence[str], pictures: dict[int, Tensor], step: int) -> None:
        """How the test went: the confusion matrix, the worst mistakes, precision against recall.

        Args:
            tally: of the test images.
            names: of the classes.
            pictures: (H, W, 3) uint8 on the CPU, by place; of the tally's mistakes.
            step: the run's last.
        """
        self._precision_and_recall(tally, names, step)
        if len(names) <= MOST_CLASSES:
            with printed():
                pixels = _pixels(printed_confusion(tally.confusion.numpy(), names, _CELL_INCHES))
            self._writer.add_image("test/confusion", pixels, step, dataformats="HWC")
        if shown := [found for found in tally.mistakes if found.place in pictures]:
            sheet = _draw_mistakes(shown, names, pictures)
            self._writer.add_image("test/worst_mistakes", sheet, step, dataformats="HWC")

    def finished(self, step: int) -> None:
        """Tell the HPARAMS tab that the run came to its end; `step` is its last."""
        from torch.utils.tensorboard.summary import hparams

        self._writer._get_file_writer().add_summary(hparams({}, {})[2], step)

    def flush(self) -> None:
        """Write out what there is."""
        self._writer.flush()

    def close(self) -> None:
        """Write out and close everything."""
        self._writer.close()

    def _graph(self, config: Config, dataset: Dataset) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        graph = model_graph(config.model, dataset.num_classes, dataset.image_size)
        self._writer._get_file_writer().add_event(Event(graph_def=graph.SerializeToString()))

    def _precision_and_recall(self, tally: Tally, names: Sequence[str], step: int) -> None:
        curves = tally.curves()
        if len(names) <= _MOST_CURVES:
            some = tally.confusion.sum(1).tolist()
            shown = {f"test_pr/{name}": curves[label] for label, name in enumerate(names) if some[label]}
        else:
            shown = {"test_pr/micro_average": curves.sum(0), "test_pr/macro_average": curves}
        for tag, counts in shown.items():
            each = counts.reshape(-1, *counts.shape[-2:])
            precision, recall = _mean_curve(each)
            right, false, rejected, missed = each.sum(0)
            self._writer.add_pr_curve_raw(tag, right, false, rejected, missed, precision, recall, step)


def _pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", pad_inches=0.05)
    with Image.open(buffer) as picture:
        return np.asarray(picture.convert("RGB"))


def _mean_curve(counts: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Precision and recall by threshold, averaged over the curves whose class has images; `Tally.curves` has counts."""
    hits, false_alarms, _, missed = np.moveaxis(counts[(counts[:, 0, 0] + counts[:, 3, 0]) > 0], 1, 0)
    found = hits + false_alarms
    precision = np.where(found > 0, hits / np.maximum(found, 1), 1.0)  # who claims nothing is never wrong
    return precision.mean(0), (hits / (hits + missed)).mean(0)


def _draw_mistakes(
    mistakes: Sequence[Mistake], names: Sequence[str], pictures: dict[int, Tensor]
) -> npt.NDArray[np.uint8]:
    """Images in rows, each with what it was taken for, how surely, and what it is; (H, W, 3).

    By Pillow: Matplotlib takes seconds for so many small pictures.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    columns, side, width, height = min(4, len(mistakes)), 128, 160, 184
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    # The other engine fails on some texts, and a class may have any name.
    font = ImageFont.truetype(str(file), 15, layout_engine=ImageFont.Layout.BASIC)
    sheet = Image.new("RGB", (columns * width, -(-len(mistakes) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, found in enumerate(mistakes):
        left, top = number % columns * width, number // columns * height
        picture = Image.fromarray(pictures[found.place].numpy())
        larger = picture.width < side
        picture = picture.resize((side, side), Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)
        sheet.paste(picture, (left + (width - side) // 2, top + 46))
        texts = (names[found.predicted], f" {found.confidence:.0%}"), (f"is {names[found.label]}", "")
        for line, (text, end) in enumerate(texts):
            text = _fitting(text, font, width - 8 - font.getlength(end)) + end
            draw.text((left + width // 2, top + 15 + 19 * line), text, fill="black", font=font, anchor="mm")
    return np.asarray(sheet)


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """As much of a name as there is room for, in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def show_test(job: Job, board: Board, tally: Tally, engine: Engine) -> None:
    """Show how the test went; `tally` and `engine` are those of the test images. Rank 0's alone."""
    alone = LocalContext(job.context.run, job.context.device)
    places = np.array([found.place for found in tally.mistakes], dtype=np.int64)
    pictures: dict[int, Tensor] = {}
    if len(places):
        loader = eval_loader(job.config, alone, job.dataset.test, engine, places)
        pictures = pictures_of(job.config, job.dataset, loader)
    board.judged(tally, job.dataset.class_names, pictures, job.position.global_step)

"""TensorBoard: curves, images, hyperparameters and test results.

Rank 0 writes event files into one folder. A process that resumes the run hides the events of steps that are repeated.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from densenet_dist.config import to_yaml
from densenet_dist.pages.figures import MAX_CLASSES, PRINTED, confusion_figure, drawing, new_figure, shortened
from densenet_dist.schema import Config
from densenet_dist.trackers import flat_settings
from densenet_dist.train.results import Mistake, TestResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HYPERPARAMETERS = ("model.", "train.", "data.name", "data.augment", "data.normalize", "data.limit", "seed")
"""Settings that affect results. Others would only crowd the table of the HPARAMS tab."""
_CELL_INCHES: Final = 0.3
"""Cell size of the confusion matrix. TensorBoard shows all images 320 pixels wide, so the text must be large."""
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
"""Layout of the Custom Scalars tab, the only one where a chart can have several tags."""


class Board:
    """The TensorBoard events of one run.

    Args:
        folder: folder of the event files.
        hides_from: events of earlier processes from this step on are hidden. Every process must set it: without its
            data server, TensorBoard ignores it in the first file that it reads.
        earlier: names of the event files of earlier processes.
    """

    def __init__(self, folder: Path, hides_from: int = 0, earlier: Iterable[str] = ()) -> None:
        from tensorboard.summary.writer import event_file_writer
        from torch.utils.tensorboard import SummaryWriter  # a second to import: only rank 0 pays it

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of the times in their names, but clocks of machines differ.
        times = [int(found[1]) + 1 for name in earlier if (found := re.match(r"events\.out\.tfevents\.(\d+)\.", name))]
        named = max([int(time.time()), *times])
        event_file_writer.time = SimpleNamespace(time=lambda: named)
        try:
            self._writer = SummaryWriter(str(folder), purge_step=hides_from, flush_secs=10)
        finally:
            event_file_writer.time = time
        # Write in this thread, where errors can be handled; in TensorBoard's own thread they print a traceback.
        events = self._writer._get_file_writer().event_writer
        events._async_writer._worker.stop()
        events._async_writer = events._async_writer._writer

    def scalars(self, values: dict[str, Any], step: int) -> None:
        """Write each number under its own tag."""
        for tag, value in values.items():
            if "/" in tag or tag == "lr":
                self._writer.add_scalar(tag, value, step)

    def introduce(self, config: Config) -> None:
        """Write the settings, and which curves belong together, before the first step.

        `SummaryWriter.add_hparams` would start another run in TensorBoard. Stopped and lost runs are in the HPARAMS tab
        too, since it is not written at the end. Without a description of the experiment, the tab lists settings that
        differ between runs first, and all scalars as metrics, by name: ``best/...`` come first.
        """
        from torch.utils.tensorboard.summary import hparams

        settings = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in flat_settings(config).items()
            if key.startswith(_HYPERPARAMETERS)
        }
        self._writer._get_file_writer().add_summary(hparams(settings, {})[1])
        self._writer.add_custom_scalars(_LAYOUT)
        self._writer.add_text("config", f"```yaml\n{to_yaml(config)}```", 0)

    def images(self, tag: str, images: Tensor, mean: Sequence[float], std: Sequence[float], step: int) -> None:
        """Write up to 64 normalised images, (n, 3, H, W) float, as one grid."""
        shown = images[:64].detach().float().cpu()
        scale, shift = (shown.new_tensor(values).view(1, 3, 1, 1) for values in (std, mean))
        self._writer.add_images(tag, (shown * scale + shift).clamp(0, 1), step)

    def test_results(self, results: TestResults, step: int) -> None:
        """Write the confusion matrix and the worst mistakes; `step` is the last of the run."""
        names = results.class_names
        with drawing(PRINTED):
            if len(names) <= MAX_CLASSES:
                self._figure("test/confusion", confusion_figure(results.confusion, names, cell=_CELL_INCHES), step)
            if shown := [mistake for mistake in results.mistakes if mistake.png is not None]:
                self._figure("test/worst_mistakes", _mistakes_figure(shown, names), step)

    def finished(self, step: int) -> None:
        """Mark the run as finished in the HPARAMS tab; `step` is its last."""
        from torch.utils.tensorboard.summary import hparams

        self._writer._get_file_writer().add_summary(hparams({}, {})[2], step)

    def flush(self) -> None:
        """Flush the event file."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def _figure(self, tag: str, figure: Figure, step: int) -> None:
        figure.set_dpi(150)
        self._writer.add_figure(tag, figure, step)


def _mistakes_figure(mistakes: Sequence[Mistake], names: Sequence[str]) -> Figure:
    """Draw the images in rows, each with the predicted class, its probability, and the true class."""
    from PIL import Image

    columns = min(4, len(mistakes))
    rows = -(-len(mistakes) // columns)
    figure = new_figure(1.6 * columns, 1.9 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for tile in axes:
        tile.set_axis_off()
    for tile, mistake in zip(axes, mistakes, strict=False):
        tile.imshow(Image.open(io.BytesIO(mistake.png or b""), formats=["PNG"]))
        predicted, label = (shortened(names[found]) for found in (mistake.predicted, mistake.label))
        tile.set_title(f"{predicted} {mistake.confidence:.0%}\nis {label}", fontsize=8)
    return figure

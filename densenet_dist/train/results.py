"""Results on the test set: accumulated over all ranks in one pass, stored in the run's folder as test_results.json.

Memory does not grow with the number of images: predictions are counted, not stored.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from pydantic import Base64Bytes, ConfigDict, PlainSerializer, PlainValidator, TypeAdapter
from torch import Tensor, nn

from densenet_dist.data.engine import Engine
from densenet_dist.data.loader import EvalLoader
from densenet_dist.model.grad_cam import grad_cam, has_heat_maps
from densenet_dist.pages.figures import heat_overlay
from densenet_dist.run_folder import TEST_RESULTS_FILE, RunFolder
from densenet_dist.schema import Config
from densenet_dist.train.context import collective
from densenet_dist.train.network import suppress_out_of_memory
from densenet_dist.train.ranks import gather_objects, gather_ranks

if TYPE_CHECKING:
    from PIL import Image

BINS: Final = 15
"""Number of bins of confidence for the calibration."""
MAX_MISTAKES: Final = 24
TOP5_CLASSES: Final = 6
"""With fewer classes every prediction is in the top 5."""
_IMAGE_SIDE: Final = 128
_LOSS, _TOP1, _TOP5, _IMAGES = range(4)

_AS_LISTS = PlainSerializer(np.ndarray.tolist)
Counts = Annotated[npt.NDArray[np.int64], PlainValidator(partial(np.asarray, dtype=np.int64)), _AS_LISTS]
Numbers = Annotated[npt.NDArray[np.float64], PlainValidator(partial(np.asarray, dtype=np.float64)), _AS_LISTS]


@dataclass(frozen=True)
class Mistake:
    """A misclassified image.

    Attributes:
        index: its index in the test split.
        confidence: the probability of the predicted class.
        label_probability: the probability of the true class.
        png: the image as the model sees it, at most 128 pixels a side; None if the file can no longer be read.
        heat: the image overlaid with a heat map of the regions that support the predicted class (`grad_cam`), or None.
    """

    index: int
    label: int
    predicted: int
    confidence: float
    label_probability: float
    png: Base64Bytes | None = None
    heat: Base64Bytes | None = None


@dataclass(frozen=True, eq=False)
class Calibration:
    """Confidence compared with accuracy (Guo et al. 2017, "On Calibration of Modern Neural Networks", sec. 2).

    Attributes:
        images: (bins,) int64, images whose confidence is in the bin ((m - 1) / bins, m / bins].
        confidence: (bins,) float64, their mean confidence; 0 for an empty bin.
        accuracy: (bins,) float64, their accuracy; 0 for an empty bin.
    """

    images: Counts
    confidence: Numbers
    accuracy: Numbers

    @property
    def ece(self) -> float:
        """Expected calibration error: the gap between accuracy and confidence, averaged over images."""
        return float((self.images * np.abs(self.accuracy - self.confidence)).sum() / self.images.sum())


@dataclass(frozen=True, eq=False)
class TestResults:
    """Results of one checkpoint on the test set.

    Attributes:
        class_names: by label.
        loss, top1, top5: mean cross-entropy and accuracies in [0, 1] over `images` images; no top5 below 6 classes.
        pairs: (n, 3) int64, each pair of a true and a predicted class that occurs, in order, and its number of images.
        calibration: in `BINS` bins.
        mistakes: the `MAX_MISTAKES` with the highest confidence, highest first.
        device: the type of device that computed them.
    """

    __pydantic_config__ = ConfigDict(ser_json_inf_nan="constants")

    class_names: tuple[str, ...]
    loss: float
    top1: float
    top5: float | None
    images: float
    pairs: Counts
    calibration: Calibration
    mistakes: tuple[Mistake, ...]
    device: str

    @property
    def metrics(self) -> dict[str, float]:
        """Loss, accuracies and the metrics of `class_metrics`, by name."""
        top5 = {} if self.top5 is None else {"top5": self.top5}
        return {"loss": self.loss, "top1": self.top1, **top5, **class_metrics(self.class_counts)}

    @property
    def class_counts(self) -> Counts:
        """(3, classes) int64: correct predictions, images, and predictions of each class."""
        labels, predicted, images = self.pairs.T
        counts = np.zeros((3, len(self.class_names)), dtype=np.int64)
        np.add.at(counts[0], labels, images * (labels == predicted))
        np.add.at(counts[1], labels, images)
        np.add.at(counts[2], predicted, images)
        return counts

    @property
    def confusion(self) -> Counts:
        """The confusion matrix, (classes, classes) int64: images by true class (row) and predicted class (column)."""
        matrix = np.zeros((len(self.class_names),) * 2, dtype=np.int64)
        matrix[self.pairs[:, 0], self.pairs[:, 1]] = self.pairs[:, 2]
        return matrix

    def __post_init__(self) -> None:
        bins, labels = self.calibration, {label for each in self.mistakes for label in (each.label, each.predicted)}
        if [values.shape for values in (bins.images, bins.confidence, bins.accuracy)] != [(BINS,)] * 3:
            raise ValueError("the calibration has another number of bins")
        if self.pairs.shape != (len(self.pairs), 3) or self.pairs.min(initial=0) < 0 or bins.images.min() < 0:
            raise ValueError("a number of images is negative, or a pair of classes is not complete")
        if not labels | set(self.pairs[:, :2].flat) <= set(range(len(self.class_names))):
            raise ValueError("a label is not the number of a class")


class Metrics:
    """Running sums of loss, top-1 and top-5 hits and images, updated without a host sync.

    Attributes:
        sums: (4,) float64 on the device: summed loss, top-1 hits, top-5 hits, images.
    """

    def __init__(self, device: torch.device, num_classes: int) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._num_classes = num_classes

    @torch.no_grad()
    def update(self, loss_sum: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Add a batch: its summed loss, (), and logits, (n, classes); return the predicted labels, (n,) int64.

        Labels are (n,) int64, or (n, classes) float32 probabilities, by which hits are weighted.
        """
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = labels.gather(1, top) if labels.ndim == 2 else top == labels[:, None]
        self.sums[_LOSS] += loss_sum.detach()
        self.sums[_TOP1] += hits[:, 0].sum()
        self.sums[_TOP5] += hits.sum()
        self.sums[_IMAGES] += len(labels)
        return top[:, 0]

    def restore(self, gathered: Tensor, rank: int, world_size: int) -> None:
        """Load the sums of a checkpoint; if the world size differs, rank 0 gets all of them."""
        if len(gathered) == world_size:
            self.sums.copy_(gathered[rank])
        elif rank == 0:
            self.sums.copy_(gathered.sum(0))

    def compute(self, since: Metrics | None = None) -> dict[str, float]:
        """Return ``loss``, ``top1``, ``top5`` (in [0, 1]) and ``images`` over all ranks. A collective call.

        There is no ``top5`` below 6 classes. `since`: earlier sums, which are subtracted.
        """
        sums = self.sums if since is None else self.sums - since.sums
        loss, top1, top5, images = gather_ranks(sums).sum(0).tolist()
        count = max(images, 1.0)
        found = {"loss": loss / count, "top1": top1 / count}
        return found | ({"top5": top5 / count} if self._num_classes >= TOP5_CLASSES else {}) | {"images": images}


class ClassCounts:
    """Running counts of the images of each class, updated without a host sync.

    Attributes:
        counts: (3, classes) int64 on the device: correct predictions, images, and predictions of the class.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.counts = torch.zeros(3, num_classes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add a batch: predicted and true labels, (n,) int64."""
        ones, classes = torch.ones_like(labels), self.counts.shape[1]
        places = torch.cat([labels, labels + classes, predicted + 2 * classes])
        self.counts.view(-1).index_add_(0, places, torch.cat([(predicted == labels).long(), ones, ones]))

    def compute(self) -> dict[str, float]:
        """Return the metrics of `class_metrics` over all ranks. A collective call."""
        return class_metrics(gather_ranks(self.counts).sum(0).cpu().numpy())


def class_metrics(counts: Counts) -> dict[str, float]:
    """Return metrics in which every class counts the same, whatever its number of images, as scikit-learn defines them.

    ``balanced_accuracy`` is the mean accuracy of the classes that have images, ``worst_class_accuracy`` the lowest;
    ``macro_f1`` is the mean F1 score of those that have images or predictions. NaN without images.

    Args:
        counts: (3, classes): correct predictions, images, and predictions of each class.
    """
    correct, images, predicted = counts.astype(np.float64)
    found, seen = images > 0, images + predicted > 0
    accuracies = correct[found] / images[found] if found.any() else np.array([math.nan])
    return {
        "balanced_accuracy": float(np.mean(accuracies)),
        "worst_class_accuracy": float(np.min(accuracies)),
        "macro_f1": float(np.mean(2 * correct[seen] / (images + predicted)[seen])) if seen.any() else math.nan,
    }


class ResultsAccumulator:
    """Accumulates `TestResults` over the batches of one rank, then over all ranks.

    Attributes:
        pairs: number of images by true and predicted class.
        calibration: (3, `BINS`) float64 on the CPU: images, summed confidence and correct predictions by confidence.
        mistakes: as in `TestResults`, without images.
    """

    def __init__(self) -> None:
        self.pairs: Counter[tuple[int, int]] = Counter()
        self.calibration = torch.zeros(3, BINS, dtype=torch.float64)
        self.mistakes: list[Mistake] = []

    def update(self, logits: Tensor, labels: Tensor, indices: Counts) -> None:
        """Add a batch: logits, (n, classes); labels, (n,) int64; the images' indices in the split, (n,) int64."""
        predicted = logits.topk(min(5, logits.shape[1]), dim=1).indices[:, 0].cpu()  # ties as in `Metrics`
        probabilities, labels = logits.float().cpu().double().softmax(1).nan_to_num(), labels.cpu()
        confidence, label_probability = (
            probabilities.gather(1, chosen[:, None])[:, 0] for chosen in (predicted, labels)
        )
        self.pairs.update(zip(labels.tolist(), predicted.tolist(), strict=True))
        bins = torch.bucketize(confidence, torch.arange(1, BINS, dtype=torch.float64) / BINS)
        correct = (predicted == labels).double()
        self.calibration.index_add_(1, bins, torch.stack([torch.ones_like(confidence), confidence, correct]))
        values = torch.from_numpy(indices), labels, predicted, confidence, label_probability
        wrong = predicted != labels
        self._keep_worst(Mistake(*found) for found in zip(*(value[wrong].tolist() for value in values), strict=True))

    def compute(self, metrics: dict[str, float], class_names: tuple[str, ...], device: torch.device) -> TestResults:
        """Return the results of all ranks. A collective call; communication happens on `device`.

        `metrics` are those of the same images.
        """
        if dist.is_initialized():
            on_device = self.calibration.to(device)
            with collective():
                dist.all_reduce(on_device)
            self.calibration.copy_(on_device)
        gathered = gather_objects((self.pairs, self.mistakes))
        self.pairs, self.mistakes = Counter(), []
        for pairs, mistakes in gathered:
            self.pairs.update(pairs)
            self._keep_worst(mistakes)
        images, confidence, correct = self.calibration.numpy()
        filled = np.maximum(images, 1)
        return TestResults(
            class_names=class_names,
            loss=metrics["loss"],
            top1=metrics["top1"],
            top5=metrics.get("top5"),
            images=metrics["images"],
            pairs=np.array([(*pair, count) for pair, count in sorted(self.pairs.items())], np.int64).reshape(-1, 3),
            calibration=Calibration(images.astype(np.int64), confidence / filled, correct / filled),
            mistakes=tuple(self.mistakes),
            device=device.type,
        )

    def _keep_worst(self, mistakes: Iterable[Mistake]) -> None:
        self.mistakes = sorted([*self.mistakes, *mistakes], key=lambda found: (-found.confidence, found.index))
        del self.mistakes[MAX_MISTAKES:]


def add_images(results: TestResults, config: Config, engine: Engine, model: nn.Module) -> TestResults:
    """Add the images of the mistakes, read again with the engine of the test split, and heat maps by a DenseNet.

    Only one rank calls it.

    Raises:
        DataError: an image can no longer be read.
    """
    indices = np.array([mistake.index for mistake in results.mistakes], dtype=np.int64)
    size, geometry = config.train.eval_batch_size, config.data.augment
    loader = EvalLoader(engine, indices, batch_size=size, geometry=geometry)
    from PIL import Image

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (engine.mean, engine.std))
    predicted = {mistake.index: mistake.predicted for mistake in results.mistakes}
    images: dict[int, tuple[bytes, bytes | None]] = {}
    for batch in loader if len(indices) else ():
        pixels = ((batch.images.float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        found = loader.batch_indices.tolist()
        labels, heat = torch.tensor([predicted[index] for index in found]), None
        if has_heat_maps(model):
            with suppress_out_of_memory():  # the images alone, then
                heat = grad_cam(model, batch.images, labels).cpu().numpy()
        for number, (index, image) in enumerate(zip(found, pixels.permute(0, 2, 3, 1).numpy(), strict=True)):
            overlay = None if heat is None else _png(heat_overlay(image, heat[number]))
            images[index] = _png(Image.fromarray(image)), overlay
    pairs = [(mistake, *images.get(mistake.index, (None, None))) for mistake in results.mistakes]
    return replace(results, mistakes=tuple(replace(mistake, png=png, heat=heat) for mistake, png, heat in pairs))


def _png(image: Image.Image) -> bytes:
    image.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_test_results(run: RunFolder, results: TestResults) -> None:
    """Write test_results.json into the run's folder."""
    run.write(TEST_RESULTS_FILE, TypeAdapter(TestResults).dump_json(results).decode() + "\n")


def read_test_results(run: RunFolder) -> TestResults | None:
    """Read test_results.json; None if the run is not finished and was not evaluated."""
    return run.read(TEST_RESULTS_FILE, TestResults, remedy="delete it; densenet-dist evaluate writes it again")

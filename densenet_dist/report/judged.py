"""What a run's best checkpoint says of the test images: confusion, accuracy of each class, calibration, mistakes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from densenet_dist.errors import DataError
from densenet_dist.run_folder import RunFolder
from densenet_dist.train.evaluation import Evaluation, pictures_at, predict, prepare_evaluation

BINS: Final = 15
MOST_MISTAKES: Final = 24
_LARGEST_SIDE: Final = 160

Counts: TypeAlias = npt.NDArray[np.int64]
Numbers: TypeAlias = npt.NDArray[np.float64]


class Calibration(NamedTuple):
    """How far confidence is from accuracy (Guo et al. 2017, "On Calibration of Modern Neural Networks", sec. 2).

    Attributes:
        images: (bins,) int64, images whose confidence is in the bin ((m - 1) / bins, m / bins].
        confidence: (bins,) float64, their mean; 0 where there is none.
        accuracy: (bins,) float64, likewise.
    """

    images: Counts
    confidence: Numbers
    accuracy: Numbers

    @property
    def ece(self) -> float:
        """Expected calibration error: the gap between both, averaged over images."""
        return float((self.images * np.abs(self.accuracy - self.confidence)).sum() / self.images.sum())


class Mistake(NamedTuple):
    """An image that was taken for another class.

    Attributes:
        place: its place in the test split.
        label: its true class.
        predicted: the class it was taken for.
        confidence: the probability given to that.
        picture: PNG, as the model sees the image; None where the file can no longer be read.
    """

    place: int
    label: int
    predicted: int
    confidence: float
    picture: bytes | None


@dataclass(frozen=True, eq=False)
class Judged:
    """What became of the test images.

    Attributes:
        class_names: by label.
        figures: ``loss``, ``top1``, ``top5``, ``images``.
        confusion: (classes, classes) int64, images of each true class (row) by what they were taken for (column).
        calibration: in `BINS` bins.
        mistakes: those with the highest confidence, highest first.
        device: what it was computed on.
    """

    class_names: tuple[str, ...]
    figures: dict[str, float]
    confusion: Counts
    calibration: Calibration
    mistakes: tuple[Mistake, ...]
    device: str

    @property
    def class_accuracy(self) -> Numbers:
        """(classes,) float64: share of each class' images that are recognised; NaN for a class without images."""
        with np.errstate(invalid="ignore"):
            shares: Numbers = np.diag(self.confusion) / self.confusion.sum(1)
        return shares


def judge(run: str | Path | RunFolder, overrides: Sequence[str] = ()) -> Judged:
    """Show the test images to the best checkpoint, once.

    Args:
        run: its folder, path, URI or name under ``runs/``.
        overrides: changes to the run's configuration, such as ``data.root=...``.

    Raises:
        DataError: the data set is missing or damaged.
        StorageError, CheckpointError, EnvironmentProblem: as their names say.
    """
    found = judge_within(run, overrides)
    assert found is not None  # without a limit
    return found


def judge_within(
    run: str | Path | RunFolder,
    overrides: Sequence[str],
    device: Literal["auto", "cpu", "cuda"] = "auto",
    limit_s: float | None = None,
) -> Judged | None:
    """The same on a device, but None where the pass over the test images would take longer than `limit_s` seconds."""
    try:
        evaluation = prepare_evaluation(run, device=device, overrides=tuple(overrides))
        predictions = predict(evaluation, limit_s)
    except DataError as error:
        raise DataError(f"{error}\n  or report what the run's own records say, without its data: --no-judge") from error
    if predictions is None:
        return None
    probabilities = predictions.logits.double().softmax(1)
    confidence, predicted = (values.numpy() for values in probabilities.max(1))
    labels = predictions.labels.numpy()
    return Judged(
        class_names=evaluation.dataset.class_names,
        figures=predictions.figures,
        confusion=confusion_matrix(labels, predicted, evaluation.dataset.num_classes),
        calibration=calibrate(confidence, predicted == labels),
        mistakes=_mistakes(evaluation, predictions.indices, labels, predicted, confidence),
        device=evaluation.context.device.type,
    )


def confusion_matrix(labels: Counts, predicted: Counts, num_classes: int) -> Counts:
    """Count images by true class and predicted class.

    Args:
        labels: (n,) int64.
        predicted: (n,) int64.
        num_classes: of the data set.

    Returns:
        (classes, classes) int64; rows are true classes.
    """
    places = labels * num_classes + predicted
    return np.bincount(places, minlength=num_classes**2).reshape(num_classes, num_classes)


def calibrate(confidence: Numbers, correct: npt.NDArray[np.bool_], bins: int = BINS) -> Calibration:
    """Group images by confidence.

    Args:
        confidence: (n,) float64 in (0, 1], the probability of the predicted class.
        correct: (n,) bool.
        bins: of equal width.
    """
    inner = np.arange(1, bins) / bins
    places = np.searchsorted(inner, confidence, side="left")
    images = np.bincount(places, minlength=bins)
    some = np.maximum(images, 1)
    sums = (np.bincount(places, weights=values, minlength=bins) for values in (confidence, correct))
    return Calibration(images, *(total / some for total in sums))


def _mistakes(
    evaluation: Evaluation, places: Counts, labels: Counts, predicted: Counts, confidence: Numbers
) -> tuple[Mistake, ...]:
    wrong = np.flatnonzero(predicted != labels)
    rows = wrong[np.argsort(-confidence[wrong], kind="stable")[:MOST_MISTAKES]]
    pictures = pictures_at(evaluation, places[rows]) if len(rows) else {}
    return tuple(
        Mistake(
            place=place,
            label=int(labels[row]),
            predicted=int(predicted[row]),
            confidence=float(confidence[row]),
            picture=_png(pictures[place].numpy()) if place in pictures else None,
        )
        for row, place in zip(rows, places[rows].tolist(), strict=True)
    )


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

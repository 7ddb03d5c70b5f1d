"""What a test pass says beside its figures: confusion, precision and recall, the worst mistakes; over all ranks."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from densenet_dist.data.datasets import Dataset
from densenet_dist.data.loader import EvalLoader
from densenet_dist.schema import Config
from densenet_dist.train.inputs import Indices, normalisation
from densenet_dist.train.metrics import gather_ranks

THRESHOLDS: Final = 127
"""Of precision and recall: more than that TensorBoard does not show."""
MOST_MISTAKES: Final = 24


class Mistake(NamedTuple):
    """An image that was taken for another class.

    Attributes:
        confidence: the probability given to that.
        place: its place in the split.
        label: its true class.
        predicted: the class it was taken for.
    """

    confidence: float
    place: int
    label: int
    predicted: int


class Tally:
    """Counts what each image of a pass was taken for; sums that ranks can add up, whatever the number of images.

    Attributes:
        confusion: (classes, classes) int64 on the CPU, images of each true class (row) by what they were taken for.
        scores: (2, classes, `THRESHOLDS`) int64 on the CPU, how many images were given which probability of being of
            a class, in bins [i, i + 1) / (THRESHOLDS - 1): first images of other classes, then those of that class.
        mistakes: those with the highest confidence, highest first.
    """

    def __init__(self, num_classes: int) -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.scores = torch.zeros(2, num_classes, THRESHOLDS, dtype=torch.int64)
        self.mistakes: list[Mistake] = []

    def add(self, logits: Tensor, labels: Tensor, places: Indices) -> None:
        """Count a batch.

        Args:
            logits: (n, classes), any float dtype.
            labels: (n,) int64.
            places: (n,) int64, the images' places in the split.
        """
        classes = len(self.confusion)
        probabilities, true = logits.float().cpu().double().softmax(1), labels.cpu()
        confidence, predicted = probabilities.max(1)
        self.confusion += torch.bincount(true * classes + predicted, minlength=classes**2).view(classes, classes)
        bins = (probabilities * (THRESHOLDS - 1)).long() + torch.arange(classes) * THRESHOLDS
        own = bins.gather(1, true[:, None])[:, 0]
        every, right = (torch.bincount(found.flatten(), minlength=classes * THRESHOLDS) for found in (bins, own))
        self.scores += torch.stack([every - right, right]).view_as(self.scores)
        wrong = (predicted != true).nonzero()[:, 0]
        values = (confidence[wrong], torch.from_numpy(places)[wrong], true[wrong], predicted[wrong])
        self._keep([Mistake(*found) for found in zip(*(value.tolist() for value in values), strict=True)])

    def reduce(self, device: torch.device) -> None:
        """Add up those of all ranks, on each of them. A collective call, by way of `device`."""
        if not dist.is_initialized():
            return
        for counts in (self.confusion, self.scores):
            there = counts.to(device)
            dist.all_reduce(there)
            counts.copy_(there)
        mine = torch.full((MOST_MISTAKES, len(Mistake._fields)), -1.0, dtype=torch.float64)
        mine[: len(self.mistakes)] = torch.tensor(self.mistakes, dtype=torch.float64).view(-1, len(Mistake._fields))
        self.mistakes = []
        rows = gather_ranks(mine.to(device)).flatten(0, 1).tolist()
        self._keep([Mistake(row[0], *map(int, row[1:])) for row in rows if row[0] >= 0])

    def curves(self) -> npt.NDArray[np.float64]:
        """(classes, 4, `THRESHOLDS`): true positives, false positives, true negatives, false negatives of each class.

        An image counts as of a class where its probability reaches the threshold i / (THRESHOLDS - 1).
        """
        reached = self.scores.double().flip(2).cumsum(2).flip(2).numpy()
        false_positives, true_positives = reached
        true_negatives, false_negatives = (hits[:, :1] - hits for hits in (false_positives, true_positives))
        return np.stack([true_positives, false_positives, true_negatives, false_negatives], axis=1)

    def _keep(self, mistakes: list[Mistake]) -> None:
        self.mistakes = sorted([*self.mistakes, *mistakes], key=lambda found: (-found.confidence, found.place))
        del self.mistakes[MOST_MISTAKES:]


def pictures_of(config: Config, dataset: Dataset, loader: EvalLoader) -> dict[int, Tensor]:
    """The images of a loader as the model sees them, but not normalised.

    Returns:
        (H, W, 3) uint8 on the CPU, by place; those that can no longer be read are left out.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation(config, dataset))
    found: dict[int, Tensor] = {}
    for batch in loader:
        pixels = ((batch.images.float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        found |= dict(zip(loader.places.tolist(), pixels.permute(0, 2, 3, 1), strict=True))
    return found

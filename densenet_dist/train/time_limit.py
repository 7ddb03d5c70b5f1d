"""Fit a run to ``train.max_minutes``: how many steps there is time for, and when training ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from densenet_dist.train.ranks import broadcast
from densenet_dist.train.snapshot import Position

if TYPE_CHECKING:
    from densenet_dist.train.trainer import Trainer

INTERVAL: Final = 0.02
"""Time between two estimates, as a share of the limit."""
_NEWEST: Final = 0.3
"""Weight of the newest measurement of a step: other programs may change the speed of the machine for a while."""
_FORWARD: Final = 0.5
"""Time of an image in the validation, relative to training, until a validation has been measured."""


class TimeLimit:
    """Estimates on rank 0 how many steps there is time for.

    Args:
        minutes: ``train.max_minutes``.
        seconds: returns the seconds that the run has spent in each phase so far, see `Goodput`.
    """

    def __init__(self, minutes: float | None, seconds: Callable[[], Mapping[str, float]]) -> None:
        self._total_s, self._seconds = math.inf if minutes is None else 60 * minutes, seconds
        self._estimated: tuple[float, int] | None = None  # seconds of training steps then, and global steps
        self._step_s: float | None = None

    def is_due(self, global_step: int) -> bool:
        """Return whether an estimate is due. The first call starts the clock, so make it after a warm-up step."""
        trained = self._train_seconds()
        if self._estimated is None:
            self._estimated = trained, global_step
        before, step = self._estimated
        return global_step > step and trained - before >= INTERVAL * self._total_s

    def steps_left(self, position: Position, steps_per_epoch: int, val_share: float) -> int:
        """Estimate, when it is due, how many steps can be taken before a last validation; negative if none can.

        `val_share` is the number of validation images, relative to that of training images.
        """
        assert self._estimated is not None
        spent, trained, (before, step) = self._seconds(), self._train_seconds(), self._estimated
        newest = (trained - before) / (position.global_step - step)
        step_s = newest if self._step_s is None else self._step_s + _NEWEST * (newest - self._step_s)
        self._step_s, self._estimated = step_s, (trained, position.global_step)
        train_s = steps_per_epoch * step_s
        validation_s = spent["validate"] / position.epoch if position.epoch else _FORWARD * val_share * train_s
        # Whole epochs from the start of this one, then the steps of one that ends early.
        epochs, rest = divmod(self._total_s - sum(spent.values()) + position.step * step_s, train_s + validation_s)
        return int(epochs) * steps_per_epoch + max(0, int((rest - validation_s) / step_s)) - position.step

    def _train_seconds(self) -> float:
        spent = self._seconds()
        return spent["train"] + spent["wait"] + spent["save"]


def fit_to_time(trainer: Trainer) -> None:
    """Estimate again when training ends, if ``train.max_minutes`` is set and an estimate is due. A collective call.

    Call it just before a checkpoint is saved: a process that resumes from it repeats its steps with the same rates.
    """
    if trainer.config.train.max_minutes is None or trainer.finished:
        return
    position, controller = trainer.position, trainer.lr_controller
    steps = None  # rank 0 decides
    if trainer.context.rank == 0 and trainer.time_limit.is_due(position.global_step):
        images, val_images = trainer.num_images
        steps = trainer.time_limit.steps_left(position, trainer.steps_per_epoch, val_images / images)
    if (steps := broadcast(steps)) is not None:
        within_epoch = position.step > 0  # its last step is known before it is taken
        end = min(position.global_step + max(steps, int(within_epoch)), trainer.max_steps)
        if end < trainer.total_steps or controller.end_step < math.inf:
            controller.rescale_to(position.global_step, end)

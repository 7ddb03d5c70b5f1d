"""Learning-rate schedules by name: closed formulas of the step.

A function with `schedule` has its name as a value of ``train.schedule.name``, and its keyword
arguments are settings of ``train.schedule``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any, Final, Literal, NamedTuple, TypeAlias


class ScheduleState(NamedTuple):
    """The arguments of every schedule.

    Attributes:
        step: global step, from 0; a fraction if the schedule is fitted to ``train.max_minutes``.
        warmup: steps of warm-up, possibly fractional; the schedule is called for later steps only.
        steps: number of steps in the run.
        steps_per_epoch: number of steps in an epoch.
        lr: the peak rate.
    """

    step: float
    warmup: float
    steps: float
    steps_per_epoch: int
    lr: float


Schedule: TypeAlias = Callable[..., float]
"""Maps a `ScheduleState`, and settings of ``train.schedule`` as keywords, to the learning rate."""

SCHEDULES: Final[dict[str, Schedule]] = {}
OPEN_ENDED: Final = ("constant", "multistep", "plateau")
"""Schedules that do not depend on the number of steps."""


def schedule(function: Schedule) -> Schedule:
    """Register a schedule under its name."""
    SCHEDULES[function.__name__] = function
    return function


@schedule
def constant(now: ScheduleState) -> float:
    """The peak rate."""
    return now.lr


@schedule
def multistep(now: ScheduleState, *, milestones: tuple[float, ...], gamma: float) -> float:
    """Multiply the rate by `gamma` at each milestone, in epochs."""
    epoch = now.step / now.steps_per_epoch
    return now.lr * gamma ** sum(epoch >= milestone for milestone in milestones)


@schedule
def cosine(now: ScheduleState, *, final_lr: float) -> float:
    """Cosine annealing (SGDR without restarts, Loshchilov and Hutter 2017, eq. 5) over the steps after the warm-up."""
    progress = (now.step - now.warmup) / max(now.steps - now.warmup, 1)
    return final_lr + (now.lr - final_lr) * (1 + math.cos(math.pi * progress)) / 2


@schedule
def one_cycle(
    now: ScheduleState,
    *,
    pct_start: float,
    div_factor: float,
    final_div_factor: float,
    anneal: Literal["cos", "linear"],
) -> float:
    """Up and down once (Smith and Topin 2018); the same as `torch.optim.lr_scheduler.OneCycleLR`."""
    first = now.lr / div_factor
    last = first / final_div_factor
    top = pct_start * now.steps - 1
    if now.step <= top:
        return _between(first, now.lr, now.step / max(top, 1e-12), anneal)
    return _between(now.lr, last, (now.step - top) / (now.steps - 1 - top), anneal)


@schedule
def plateau(now: ScheduleState) -> float:
    """The peak rate, until `densenet_dist.train.optim.LRController` reduces it."""
    return now.lr


def _between(start: float, end: float, progress: float, anneal: str) -> float:
    if anneal == "linear":
        return start + (end - start) * progress
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def keyword_settings(function: Schedule, settings: Any) -> dict[str, Any]:
    """Return the settings of ``train.schedule`` that a schedule takes as keywords."""
    keywords = [name for name, one in signature(function).parameters.items() if one.kind is one.KEYWORD_ONLY]
    return {name: getattr(settings, name) for name in keywords}

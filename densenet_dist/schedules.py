"""The courses that a learning rate can take, by name: closed formulas of the step.

One more is one more function here: its name becomes a value of ``train.schedule.name``, and what it takes besides the
moment are settings of ``train.schedule`` by their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any, Final, Literal, NamedTuple, TypeAlias


class Moment(NamedTuple):
    """Where a run stands.

    Attributes:
        step: global, from 0.
        warmup: steps of the warm-up before it, which may end in a fraction; the course is asked from its end on.
        steps: of the whole run.
        steps_per_epoch: of an epoch.
        lr: the peak rate.
    """

    step: int
    warmup: float
    steps: int
    steps_per_epoch: int
    lr: float


Course: TypeAlias = Callable[..., float]
"""The rate at a moment, and settings of ``train.schedule`` as keywords."""

SCHEDULES: Final[dict[str, Course]] = {}


def schedule(course: Course) -> Course:
    """Make a course known by its name."""
    SCHEDULES[course.__name__] = course
    return course


@schedule
def constant(now: Moment) -> float:
    """The peak rate."""
    return now.lr


@schedule
def multistep(now: Moment, *, milestones: tuple[float, ...], gamma: float) -> float:
    """`gamma` times less from each milestone on, in epochs."""
    epoch = now.step / now.steps_per_epoch
    return now.lr * gamma ** sum(epoch >= milestone for milestone in milestones)


@schedule
def cosine(now: Moment, *, final_lr: float) -> float:
    """SGDR without restarts (Loshchilov and Hutter 2017, eq. 5), over what the warm-up leaves."""
    progress = (now.step - now.warmup) / max(now.steps - now.warmup, 1)
    return final_lr + (now.lr - final_lr) * (1 + math.cos(math.pi * progress)) / 2


@schedule
def one_cycle(
    now: Moment, *, pct_start: float, div_factor: float, final_div_factor: float, anneal: Literal["cos", "linear"]
) -> float:
    """Up and down once (Smith and Topin 2018); the same course as `torch.optim.lr_scheduler.OneCycleLR`."""
    first = now.lr / div_factor
    last = first / final_div_factor
    top = pct_start * now.steps - 1
    if now.step <= top:
        return _between(first, now.lr, now.step / max(top, 1e-12), anneal)
    return _between(now.lr, last, (now.step - top) / (now.steps - 1 - top), anneal)


@schedule
def plateau(now: Moment) -> float:
    """The peak rate, until `densenet_dist.train.optim.Course` reduces it."""
    return now.lr


def _between(start: float, end: float, progress: float, anneal: str) -> float:
    if anneal == "linear":
        return start + (end - start) * progress
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def settings_of(course: Course, settings: Any) -> dict[str, Any]:
    """What a course takes of ``train.schedule``: the settings that its keywords name."""
    keywords = [name for name, one in signature(course).parameters.items() if one.kind is one.KEYWORD_ONLY]
    return {name: getattr(settings, name) for name in keywords}

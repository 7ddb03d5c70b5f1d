"""Optimizers, learning-rate schedules, early stopping and the moving average of weights.

The rate at a step is a closed formula of the step, so resuming needs no state; only `Course` remembers
anything, and hands it over as plain values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from densenet_dist.schedules import SCHEDULES, Moment, settings_of
from densenet_dist.schema import OptimizerConfig, ScheduleConfig, TrainConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """The optimizer over `model`'s parameters, in two groups where biases and BatchNorm are spared the decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.decay == "all":
        groups = [{"params": parameters, "weight_decay": config.weight_decay}]
    else:
        # Weights of convolutions and linear layers have two dimensions or more; biases, gamma and beta have one.
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    adam = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return adam(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load the state of an optimizer, which keeps its own settings (a trial may inherit weights).

    PyTorch's fused kernels trust these tensors: with one of another shape or layout they write out of bounds.

    Raises:
        ValueError: the state does not fit the optimizer's parameters.
    """
    own = optimizer.state_dict()["param_groups"]
    keys = ("momentum_buffer",) if isinstance(optimizer, torch.optim.SGD) else ("step", "exp_avg", "exp_avg_sq")
    parameters = enumerate(parameter for group in optimizer.param_groups for parameter in group["params"])
    wanted = {(number, key): parameter for number, parameter in parameters for key in keys}
    found = {(number, key): value for number, values in saved["state"].items() for key, value in values.items()}
    same_groups = [group["params"] for group in saved["param_groups"]] == [group["params"] for group in own]
    if not same_groups or (found and found.keys() != wanted.keys()):
        raise ValueError("the state is that of another optimizer, or not complete")
    for (number, key), value in found.items():
        is_step = key == "step"
        if not _fits(value, torch.zeros(()) if is_step else wanted[number, key]) or (is_step and not value >= 0):
            raise ValueError(f"the optimizer's {key} of parameter {number} does not fit")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


def _fits(value: Any, like: Tensor) -> bool:
    """Whether a value is a tensor of the same dtype, shape and order in memory."""
    if not isinstance(value, Tensor) or value.layout != like.layout or value.is_meta:
        return False
    # The stride of a dimension of size 1 means nothing.
    found, wanted = ([s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1] for t in (value, like))
    return (value.dtype, value.shape, found) == (like.dtype, like.shape, wanted)


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step.

    Attributes:
        config: which course.
        lr: the peak rate.
        steps_per_epoch: optimizer steps an epoch.
        epochs: length of the run.
    """

    config: ScheduleConfig
    lr: float
    steps_per_epoch: int
    epochs: int

    def __call__(self, step: int) -> float:
        """The rate of global step `step` (from 0), before any reduction on a plateau."""
        warmup = self.config.warmup_epochs * self.steps_per_epoch
        if step < warmup:
            start = self.config.warmup_start
            return self.lr * (start + (1 - start) * (step + 1) / math.ceil(warmup))
        moment = Moment(step, warmup, self.steps_per_epoch * self.epochs, self.steps_per_epoch, self.lr)
        return SCHEDULES[self.config.name](moment, **self._settings)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return settings_of(SCHEDULES[self.config.name], self.config)


@dataclass
class Patience:
    """Counts epochs without improvement of the validation loss, as Keras' callbacks do.

    Keras acts in the epoch in which the count *reaches* the patience; torch's ReduceLROnPlateau one epoch later.
    """

    patience: int
    min_delta: float
    best: float = math.inf
    waited: int = 0

    def exhausted(self, loss: float) -> bool:
        """Take in an epoch's validation loss; whether `patience` epochs in a row have brought no improvement."""
        if loss < self.best - self.min_delta:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
        return self.waited >= self.patience


@dataclass
class Course:
    """Everything that decides the learning rate and the end of training, with its few remembered values.

    Attributes:
        plateau: counts for ReduceLROnPlateau, which multiplies the rate when the validation loss stands still.
        early: counts for early stopping.
        scale: product of the reductions so far.
        stopped: whether early stopping has ended the run.
    """

    schedule: Schedule
    plateau: Patience
    early: Patience | None
    scale: float = 1.0
    stopped: bool = False

    @classmethod
    def build(cls, config: TrainConfig, steps_per_epoch: int) -> Course:
        """The course that a configuration describes."""
        early = config.early_stopping
        return cls(
            Schedule(config.schedule, config.lr, steps_per_epoch, config.epochs),
            Patience(config.schedule.patience, config.schedule.min_delta),
            Patience(early.patience, early.min_delta) if early.enabled else None,
        )

    def lr(self, step: int) -> float:
        """The rate of global step `step`."""
        rate = self.schedule(step) * self.scale
        return max(rate, self.schedule.config.min_lr) if self.scale < 1 else rate

    def epoch_end(self, val_loss: float | None) -> None:
        """Take in an epoch's validation loss, if there is one."""
        if val_loss is None:
            return
        schedule = self.schedule.config
        if schedule.name == "plateau" and self.plateau.exhausted(val_loss):
            self.scale *= schedule.factor
            self.plateau.waited = 0
        self.stopped = self.early is not None and self.early.exhausted(val_loss)

    def state_dict(self) -> dict[str, float]:
        """What it remembers, as plain numbers."""
        watches = {"plateau": self.plateau, "early": self.early or Patience(1, 0.0)}
        state = {f"{name}.{key}": float(value) for name, w in watches.items() for key, value in asdict(w).items()}
        return state | {"scale": self.scale, "stopped": float(self.stopped)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up what another `state_dict` remembered; patience and min_delta stay those of the configuration."""
        for name, watch in (("plateau", self.plateau), ("early", self.early)):
            if watch is not None:
                watch.best, watch.waited = state[f"{name}.best"], int(state[f"{name}.waited"])
        self.scale, self.stopped = state["scale"], bool(state["stopped"])


class WeightAverage:
    """Exponential moving average of parameters and BatchNorm statistics (Polyak averaging).

    Attributes:
        model: the averaged model, to evaluate with.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self._averaged = [tensor for tensor in self.model.state_dict().values() if tensor.is_floating_point()]
        self._source = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """``average += (1 - decay) * (model - average)``, after optimizer step `step`.

        The first steps use a smaller decay, (1 + step) / (10 + step), so that the random start is soon forgotten.
        """
        torch._foreach_lerp_(self._averaged, self._source, 1 - min(self.decay, (1 + step) / (10 + step)))

"""Optimizers, the learning rate, early stopping and the moving average of weights.

The learning rate is a closed formula of the step, so resuming needs no state, except for the counters of
`LRController`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from densenet_dist.custom import is_custom
from densenet_dist.schedules import OPEN_ENDED, SCHEDULES, ScheduleState, keyword_settings
from densenet_dist.schema import OptimizerConfig, TrainConfig
from densenet_dist.train.custom_parts import custom_optimizer, custom_schedule


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    lr: float,
    head_lr: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer.

    With ``decay: weights``, biases and BatchNorm are in groups of their own without weight decay; with `head_lr`, the
    parameters of the classifier are, whose learning rate is the schedule's times ``lr_scale``. `options` are those of a
    custom optimizer.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": config.weight_decay}]
    if config.decay == "weights":
        # Weights of convolutions and linear layers have two dimensions or more; biases, gamma and beta have one.
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if head_lr is not None:
        head = {id(p) for p in model.get_submodule("classifier").parameters()}
        groups = [
            {**group, "params": [p for p in group["params"] if (id(p) in head) == in_head], "lr_scale": scale}
            for in_head, scale in ((False, 1.0), (True, head_lr / lr))
            for group in groups
        ]
    if is_custom(config.name):
        return custom_optimizer(config.name, options or {}, groups, lr)
    if config.name == "sgd":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
        for parameter in parameters if config.momentum > 0 else ():  # PyTorch's are garbage if step 1 is skipped
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if config.name == "muon":
        return Muon(groups, lr, config)
    adam = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return adam(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` for the weights of convolutions, `torch.optim.AdamW` for all other parameters.

    Muon takes a weight (K, C, h, w) as a matrix of K rows. Its updates are scaled to the size of AdamW's, so both use
    the same learning rate and weight decay (Liu et al. 2025, arXiv:2502.16982). `state` and `param_groups` hold the
    model's parameters, as in other optimizers; each step passes them to the two inner optimizers.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, config: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": lr, "fused": True})
        self._matrices: list[tuple[nn.Parameter, nn.Parameter]] = []
        muon_groups, adam_groups = [], []
        for group in self.param_groups:
            weights = [parameter for parameter in group["params"] if _is_conv(parameter)]
            matrices = [nn.Parameter(_matrix(weight, weight.detach())) for weight in weights]
            self._matrices += zip(weights, matrices, strict=True)
            muon_groups.append({**group, "params": matrices})
            adam_groups.append({**group, "params": [p for p in group["params"] if not _is_conv(p)]})
        for weight, _ in self._matrices:
            self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        self._muon = torch.optim.Muon(
            muon_groups, momentum=config.momentum, nesterov=config.nesterov, adjust_lr_fn="match_rms_adamw"
        )
        self._adam = torch.optim.AdamW(adam_groups, betas=config.betas, eps=config.eps, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters; `closure` is not supported."""
        for own, *inner in zip(self.param_groups, self._muon.param_groups, self._adam.param_groups, strict=True):
            for group in inner:
                group.update({key: value for key, value in own.items() if key != "params"})
        for weight, matrix in self._matrices:
            matrix.grad = None if weight.grad is None else _matrix(weight, weight.grad)
            self._muon.state[matrix]["momentum_buffer"] = _matrix(weight, self.state[weight]["momentum_buffer"])
        self._adam.state = self.state  # loading a state replaces it
        self._muon.step()
        self._adam.step()
        self._muon.zero_grad()  # the matrices' gradients are views of the weights', which would stay in memory


def _is_conv(parameter: Tensor) -> bool:
    """Return whether a parameter has three dimensions or more and can be viewed as a matrix."""
    return parameter.ndim > 2 and _matrix(parameter, parameter).data_ptr() == parameter.data_ptr()


def _matrix(weight: Tensor, values: Tensor) -> Tensor:
    """Return `values`, which have the shape of `weight`, as a matrix (K, n): a view if they have its layout."""
    inner = sorted(range(1, weight.ndim), key=weight.stride, reverse=True)
    return values.permute(0, *inner).flatten(1)


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load the state of an optimizer, but not the settings of its groups: they come from the configuration.

    PyTorch's fused kernels do not check these tensors: with another shape or layout they write out of bounds. Adam has
    no state of parameters that have had no gradient yet, as with stochastic depth.

    Raises:
        ValueError: the state does not fit the optimizer's parameters.
    """
    own = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups, own_groups = ([group["params"] for group in each["param_groups"]] for each in (saved, own))
    if groups != own_groups:
        raise ValueError("the state is that of another optimizer")
    for number, values in saved["state"].items():
        momentum = "momentum_buffer" in own["state"].get(number, ())
        if values.keys() != ({"momentum_buffer"} if momentum else {"step", "exp_avg", "exp_avg_sq"}):
            raise ValueError("the state is that of another optimizer, or not complete")
        for key, value in values.items():
            if not _fits(value, torch.zeros(()) if key == "step" else parameters[number]):
                raise ValueError(f"the optimizer's {key} of parameter {number} does not fit")
    optimizer.load_state_dict({"state": own["state"] | saved["state"], "param_groups": own["param_groups"]})


def _fits(value: Any, like: Tensor) -> bool:
    """Return whether a value is a tensor of the same dtype, shape and memory layout."""
    if not isinstance(value, Tensor) or value.layout != like.layout or value.is_meta:
        return False
    # The stride of a dimension of size 1 is arbitrary.
    found, wanted = ([s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1] for t in (value, like))
    return (value.dtype, value.shape, found) == (like.dtype, like.shape, wanted)


@dataclass
class Patience:
    """Counts epochs without improvement of the validation loss, like Keras' callbacks.

    Keras acts in the epoch in which the count *reaches* the patience; torch's ReduceLROnPlateau one epoch later.
    """

    patience: int
    min_delta: float
    best: float = math.inf
    waited: int = 0

    def exhausted(self, loss: float) -> bool:
        """Count an epoch; return whether the last `patience` epochs brought no improvement."""
        if loss < self.best - self.min_delta:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
        return self.waited >= self.patience


class LRController:
    """The learning rate of each step, and the end of training; `options` are those of a custom schedule.

    Attributes:
        scale: product of the reductions by the ``plateau`` schedule so far.
        stopped: whether early stopping has ended the run.
        end_step: number of steps for which there is time, see `rescale_to`; infinite without a limit.
    """

    def __init__(self, config: TrainConfig, steps_per_epoch: int, options: Mapping[str, Any] | None = None) -> None:
        self._config, self._steps_per_epoch = config, steps_per_epoch
        self._steps = steps_per_epoch * config.epochs
        name = config.schedule.name
        if is_custom(name):
            self._schedule = custom_schedule(name, options or {})
        else:
            self._schedule = partial(SCHEDULES[name], **keyword_settings(SCHEDULES[name], config.schedule))
        self._plateau = Patience(config.schedule.patience, config.schedule.min_delta)
        self._early = Patience(config.early_stopping.patience, config.early_stopping.min_delta)
        self.scale = 1.0
        self.stopped = False
        self.end_step = math.inf
        self._fitted = (0, 0.0)  # step of the last `rescale_to`, and the progress there
        self._minutes = config.max_minutes or math.inf
        self.lr(0)  # raises an error of a custom schedule
        self.lr(self._steps - 1)

    def lr(self, step: int) -> float:
        """Return the learning rate of global step `step`, counted from 0."""
        rate = self._scheduled(step) * self.scale
        return max(rate, self._config.schedule.min_lr) if self.scale < 1 else rate

    def _scheduled(self, step: int) -> float:
        schedule, lr = self._config.schedule, self._config.lr
        warmup: float = schedule.warmup_epochs * self._steps_per_epoch
        steps = self._steps
        now: float = step
        if self.end_step < math.inf and schedule.name not in OPEN_ENDED:
            now = self._progress(step) * steps
        if now < warmup:
            start = schedule.warmup_start
            return lr * (start + (1 - start) * min(now + 1, math.ceil(warmup)) / math.ceil(warmup))
        return float(self._schedule(ScheduleState(now, warmup, steps, self._steps_per_epoch, lr)))

    def rescale_to(self, step: int, end_step: int) -> None:
        """Let the schedule continue at `step` where it is, and reach its last step just before `end_step`."""
        self._fitted, self.end_step = (step, self._progress(step)), end_step

    def _progress(self, step: int) -> float:
        """Return the share of the schedule that is complete before a step."""
        if self.end_step == math.inf:
            return step / self._steps
        (first, done), last = self._fitted, 1 - 1 / self._steps
        return min(last, max(0.0, done + (last - done) * (step - first) / max(self.end_step - 1 - first, 1)))

    def end_epoch(self, val_loss: float | None) -> None:
        """Reduce the learning rate or stop, depending on an epoch's validation loss, if there is one."""
        if val_loss is None:
            return
        schedule = self._config.schedule
        if schedule.name == "plateau" and self._plateau.exhausted(val_loss):
            self.scale *= schedule.factor
            self._plateau.waited = 0
        self.stopped = self._config.early_stopping.enabled and self._early.exhausted(val_loss)

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        counters = {"plateau": self._plateau, "early": self._early}
        state = {f"{name}.{key}": float(value) for name, c in counters.items() for key, value in asdict(c).items()}
        step, progress = self._fitted
        fitted = {
            "fit.step": float(step),
            "fit.progress": progress,
            "fit.end": self.end_step,
            "fit.minutes": self._minutes,
            "fit.steps": self._steps,
        }
        return state | fitted | {"scale": self.scale, "stopped": float(self.stopped)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Load a state; patience and min_delta come from the configuration, and the end if what set it differs."""
        for name, counter in (("plateau", self._plateau), ("early", self._early)):
            counter.best, counter.waited = state[f"{name}.best"], int(state[f"{name}.waited"])
        self.scale, self.stopped = state["scale"], bool(state["stopped"])
        steps = state.get("fit.steps", self._steps)
        ends = steps == self._steps or state["fit.end"] < steps  # the end was not that of fewer epochs
        if ends and state.get("fit.minutes", math.inf) == self._minutes < math.inf:
            self._fitted, self.end_step = (int(state["fit.step"]), state["fit.progress"]), state["fit.end"]


class WeightAverage:
    """Exponential moving average of parameters and BatchNorm statistics (Polyak averaging): `model`."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self._averaged = [tensor for tensor in self.model.state_dict().values() if tensor.is_floating_point()]
        self._source = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Compute ``average += (1 - decay) * (model - average)`` after optimizer step `step`.

        The first steps use a smaller decay, (1 + step) / (10 + step), so that the random initial weights soon fade.
        """
        torch._foreach_lerp_(self._averaged, self._source, 1 - min(self.decay, (1 + step) / (10 + step)))

"""Custom parts of a run: built, and checked before anything is trained (see `densenet_dist.custom`)."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from densenet_dist.custom import Callback, is_custom, short_name, user_code_errors
from densenet_dist.custom_options import bind
from densenet_dist.data.augment import Augmentation, draw
from densenet_dist.data.datasets import Channels, Dataset, take_first
from densenet_dist.errors import ConfigError, DataError, TrainingError
from densenet_dist.schedules import Schedule, ScheduleState
from densenet_dist.schema import Config

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Maps logits, (n, classes) float32, and targets, (n,) int64 or (n, classes) float32, to the summed loss, ()."""


def custom_model(name: str, options: Mapping[str, Any], num_classes: int, image_size: int) -> nn.Module:
    """Build a custom model on the CPU.

    Raises:
        ConfigError: it fails, does not return logits of this number of classes, has no parameters to train, or shared
            ones, which checkpoints cannot hold.
    """
    # The caller may be in a context without gradients.
    with user_code_errors("model.variant", name), torch.inference_mode(False), torch.enable_grad():
        model = bind("model", name, options)(num_classes, image_size)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model.variant: {name} returned a {type(model).__name__}, not a torch.nn.Module")
        if getattr(model, "num_classes", None) != num_classes:
            model.num_classes = num_classes  # type: ignore[assignment]  # as a DenseNet has
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(f"model.variant: {name} has no parameters to train")
        with torch.random.fork_rng([]):
            images = torch.zeros(2, 3, image_size, image_size).to(memory_format=torch.channels_last)
            shape = tuple(copy.deepcopy(model).eval()(images).shape)  # of a copy: a model may cache results
        model.train()
    if shape != (2, num_classes):
        raise ConfigError(
            f"model.variant: {name} maps images (2, 3, {image_size}, {image_size}) to {shape}; it must return logits "
            f"(2, {num_classes})"
        )
    owners: dict[int, str] = {}
    for key, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise ConfigError(f"model.variant: {name}: {key} is a {kind}, not a tensor, which checkpoints cannot hold")
        if tensor.numel() and (other := owners.setdefault(tensor.data_ptr(), key)) != key:
            raise ConfigError(f"model.variant: {name}: {other} and {key} share memory, which checkpoints cannot store")
    return model


def custom_dataset(config: Config) -> Dataset:
    """Load a custom data set.

    Raises:
        DataError: it fails, or is not as `Dataset` describes.
    """
    name, limit = config.data.name, config.data.limit
    make = bind("dataset", name, config.options.dataset)
    with user_code_errors("data.name", name, DataError):
        found = make(config.data.root, config.seed)
        if problem := _dataset_problem(found):
            raise DataError(f"data.name: {name} {problem}; it must return a Dataset (docs/extending.md)")
        mean, std = (cast(Channels, tuple(map(float, values))) for values in (found.mean, found.std))
    size = config.data.resolved_image_size
    if found.image_size != size or found.test.image_size != size:
        raise ConfigError(f"data.image_size: {size}, but the images of {name} have {found.image_size} pixels")
    if found.val is not None and limit is not None:
        raise ConfigError(f"data.limit: {name} has validation images of its own; leave the limit at null")
    train, test = take_first(found.train, limit), take_first(found.test, config.data.test_limit)
    names = tuple(map(str, found.class_names))
    dataset: Dataset = replace(found, name=name, class_names=names, train=train, test=test, mean=mean, std=std)
    return dataset


def _dataset_problem(found: Any) -> str | None:
    """Return what is wrong with the type, or with an array's dtype, shape or range."""
    if not isinstance(found, Dataset):
        return f"returned a {type(found).__name__}"
    for split in (found.train, found.test):
        images: Any = split.images
        labels = split.labels
        if not _is_array(images, np.uint8, 4) or images.shape[1] != images.shape[2] or images.shape[3] != 3:
            return "returned images that are not a uint8 array (n, side, side, 3)"
        if not _is_array(labels, np.int64, 1) or len(labels) != len(images):
            return "returned labels that are not an int64 array (n,)"
        if not len(labels) or labels.min() < 0 or labels.max() >= found.num_classes:
            return f"returned a split without images, or labels outside 0 to {found.num_classes - 1}"
    if not (
        len(found.mean) == len(found.std) == 3 and np.isfinite([*found.mean, *found.std]).all() and min(found.std) > 0
    ):
        return "has a mean or std other than three numbers, those of std above 0"
    val, count = found.val, len(found.train.labels)
    if val is not None and not (_is_array(val, np.int64, 1) and ((val >= 0) & (val < count)).all()):
        return "has a val other than indices of its training images, an int64 array (m,)"
    return None


def _is_array(value: Any, dtype: Any, ndim: int) -> bool:
    return isinstance(value, np.ndarray) and (value.dtype, value.ndim) == (dtype, ndim)


def geometry(config: Config) -> str | Callable[[npt.NDArray[np.float64]], Any]:
    """Return the name of the built-in augmentation, or the custom one.

    Raises:
        ConfigError: a custom one fails, or does not return what `Augmentation` describes.
    """
    name = config.data.augment
    if not is_custom(name):
        return name
    function = bind("augmentation", name, config.options.augmentation)
    with user_code_errors("data.augment", name):
        draw(Augmentation(function), config.seed, 0, 5, config.data.resolved_image_size)
    return function


def training_loss(config: Config, num_classes: int, weights: Tensor | None) -> LossFunction:
    """Return the training loss, summed over images; `weights` (classes,) are those of the classes, or None.

    Raises:
        ConfigError: a custom loss fails, or does not return one value per image.
    """
    name = config.train.loss
    if not is_custom(name):
        smoothing = config.train.label_smoothing
        return partial(F.cross_entropy, weight=weights, reduction="sum", label_smoothing=smoothing)
    function = bind("loss", name, config.options.loss)

    def loss(logits: Tensor, targets: Tensor, kind: Any = TrainingError) -> Tensor:
        with user_code_errors("train.loss", name, kind):
            found = function(logits, targets)
        if not isinstance(found, Tensor) or found.shape != logits.shape[:1]:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"train.loss: {name} must return one loss per image, ({len(logits)},), not {shape}")
        return found.sum()

    labels = torch.arange(4) % num_classes
    mixes = config.data.mixup > 0 or config.data.cutmix > 0
    logits = torch.linspace(-1, 1, 4 * num_classes).view(4, num_classes).requires_grad_()
    if not loss(logits, F.one_hot(labels, num_classes).float() if mixes else labels, ConfigError).requires_grad:
        raise ConfigError(f"train.loss: the values of {name} do not depend on the logits, so nothing would be learned")
    return loss


def custom_optimizer(
    name: str, options: Mapping[str, Any], groups: list[dict[str, Any]], lr: float
) -> torch.optim.Optimizer:
    """Build a custom optimizer.

    Raises:
        ConfigError: it fails, or does not have exactly the given parameters.
    """
    given = {id(parameter) for group in groups for parameter in group["params"]}
    with user_code_errors("train.optimizer.name", name):
        optimizer = bind("optimizer", name, options)(groups, lr)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(f"train.optimizer.name: {name} returned a {type(optimizer).__name__}, not an Optimizer")
    if {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} != given:
        raise ConfigError(f"train.optimizer.name: {name} must optimize exactly the parameters that it is given")
    return optimizer


def load_custom_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load the state of a custom optimizer without changes of dtype: PyTorch casts it to that of the parameters.

    The state is not checked, since only the optimizer knows its form. Parameter groups may contain state, too.
    """
    with user_code_errors("train.optimizer.name", f"{type(optimizer).__name__}.load_state_dict", TrainingError):
        optimizer.load_state_dict(dict(saved))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in saved["state"].items():
        own = optimizer.state[parameters[number]]
        for key, value in values.items():
            if isinstance(value, Tensor) and own[key].dtype != value.dtype:
                own[key] = value.to(own[key].device)


def custom_schedule(name: str, options: Mapping[str, Any]) -> Schedule:
    """Return a custom schedule that raises a ConfigError if it fails, or if its learning rate is impossible."""
    function = bind("schedule", name, options)

    def schedule(state: ScheduleState) -> float:
        with user_code_errors("train.schedule.name", name):
            rate = float(function(state))
        if not 0 <= rate < math.inf:
            raise ConfigError(f"train.schedule.name: {name} returned the learning rate {rate} at step {state.step}")
        return rate

    return schedule


def callbacks_of(config: Config) -> dict[str, Callback]:
    """Create the callbacks, by the names of their functions.

    Raises:
        ConfigError: one fails, or is not a `Callback`.
    """
    found = {}
    for name in config.callbacks:
        with user_code_errors("callbacks", name):
            made = bind("callbacks", name, config.options.callbacks.get(short_name(name), {}))()
        if not isinstance(made, Callback):
            raise ConfigError(f"callbacks: {name} is a {type(made).__name__}, not a subclass of densenet_dist.Callback")
        found[short_name(name)] = made
    return found


def require_plain(value: Any, what: str) -> None:
    """Raise a TrainingError if a state has values that checkpoints cannot hold: they are read without unpickling.

    So no subclasses are allowed.
    """
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, each in value.items():
            require_plain(key, what)
            require_plain(each, what)
    elif kind in (list, tuple, torch.Size):
        for each in value:
            require_plain(each, what)
    elif kind not in (int, float, bool, str, bytes, type(None), Tensor, nn.Parameter):
        raise TrainingError(
            f"the state of {what} has a {kind.__name__}, which a checkpoint cannot hold: it may have tensors, "
            "numbers, text, lists and dictionaries"
        )

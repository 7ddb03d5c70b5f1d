"""Check that a configuration can be trained, without importing PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from densenet_dist import custom
from densenet_dist.conflicts import validation_conflicts
from densenet_dist.custom_options import load
from densenet_dist.data.datasets import Dataset, train_size
from densenet_dist.data.plan import BatchPlan
from densenet_dist.errors import ConfigError
from densenet_dist.model.architecture import Architecture
from densenet_dist.model.variants import variant_architecture
from densenet_dist.schema import Config, WorkerRange

if TYPE_CHECKING:
    import torch


def check_run(config: Config) -> None:
    """Check the model, and the batches if the numbers of images and workers are known from the configuration.

    Custom parts are imported.

    Raises:
        ConfigError: settings cannot work; the message names each of them.
    """
    for part, name in custom.names_in(config):
        load(part, name)
    architecture, frozen = _architecture(config), config.train.freeze
    blocks = len(architecture.num_layers) if architecture else 0
    if frozen != "backbone" and (missing := [part for part in frozen if part != "stem" and part > blocks]):
        raise ConfigError(f"train.freeze: there is no block {missing[0]}; the model has {blocks}")
    images = train_size(config.data.name, config.data.limit)
    if images is not None and config.cluster.engine == "ray" and config.cluster.workers != "auto":
        check_batches(config, images - round(config.data.val_fraction * images), config.cluster.worker_range)


def check_data(
    config: Config, dataset: Dataset, num_images: tuple[int, int], world_size: int, device: torch.device
) -> None:
    """Check what depends on the numbers of training and validation images, before anything is built.

    Raises:
        ConfigError: there are too few of them, or `device` has not enough memory.
    """
    train, (num_train, num_val) = config.train, num_images
    if not num_val and (problem := next(validation_conflicts(train), None)):
        raise ConfigError(
            f"{problem}\n  raise data.val_fraction or data.limit, or add a folder val beside train and test"
        )
    workers = config.cluster.workers  # an elastic run must not fail when it gets more of them
    others = config.cluster.worker_range if isinstance(workers, WorkerRange) else ()
    check_batches(config, num_train, {world_size, *others})
    trained = max(1, min(train.global_batch_size, num_train) // world_size // train.grad_accum_steps)
    evaluated = min(train.eval_batch_size, max(num_val, len(dataset.test.labels)) // world_size)
    check_device(config, dataset.num_classes, device, trained, evaluated)


def check_batches(config: Config, num_images: int, world_sizes: Iterable[int]) -> None:
    """Raise a ConfigError unless every rank has an image in each forward pass of training, or two for BatchNorm.

    The message suggests settings that work. `world_sizes` are the possible numbers of ranks.
    """
    train, size = config.train, config.train.global_batch_size
    sizes = range(size, max(size, num_images) + 1)
    for ranks in world_sizes:
        needed = least_images(config, ranks)
        least = (BatchPlan(num_images, each).smallest_micro_batch(ranks, train.grad_accum_steps) for each in sizes)
        working = next((each for each, images in zip(sizes, least, strict=True) if images >= needed), None)
        if working == size:
            continue
        remedies = [f"train.global_batch_size={working}"] if working else ["more training images"]
        remedies += ["train.sync_bn=true"] if needed > 1 and ranks > 1 else []
        reason = ": the model's last maps are 1x1, where BatchNorm needs 2 images at a time" if needed > 1 else ""
        raise ConfigError(
            f"train.global_batch_size: {num_images:,} training images in batches of {size} leave a batch of "
            f"{BatchPlan(num_images, size).smallest}, too few for world size {ranks} and train.grad_accum_steps="
            f"{train.grad_accum_steps}{reason}\n"
            f"  use {' or '.join(remedies)}, fewer workers or a lower train.grad_accum_steps"
        )


def least_images(config: Config, ranks: int) -> int:
    """Return the fewest images of a rank in a forward pass of training: two if BatchNorm sees one pixel of each.

    Only the maps of the last block can be that small. Of a custom model it is unknown.
    """
    architecture, frozen = _architecture(config), config.train.freeze
    if architecture is None or (config.train.sync_bn and ranks > 1):
        return 1
    trains_last_block = frozen != "backbone" and len(architecture.num_layers) not in frozen
    return 2 if trains_last_block and architecture.block_sides()[-1] == 1 else 1


def check_device(config: Config, num_classes: int, device: torch.device, trained: int, evaluated: int) -> None:
    """Raise a ConfigError, before anything is built, if `device` lacks the memory or the precision that is configured.

    The least memory is that of weights, gradients, the optimizer's state, and the feature maps of `trained` images in
    all dense blocks or of `evaluated` images in the largest block; of one on a GPU, where batches are divided if
    necessary. What a custom model needs is unknown.
    """
    if device.type == "cuda" and config.train.precision == "bf16" and trained:
        import torch

        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError("train.precision=bf16: needs a GPU of the Ampere generation or newer; use fp16 or fp32")
    if custom.is_custom(config.model.variant):
        return
    if device.type == "cuda":
        trained, evaluated = min(trained, 1), min(evaluated, 1)
    train, side = config.train, config.data.resolved_image_size
    net = variant_architecture(**config.model.network, num_classes=num_classes, image_size=side)
    state = {"adam": 2, "adamw": 2, "muon": 1, "sgd": int(train.optimizer.momentum > 0)}.get(train.optimizer.name, 0)
    values = max(trained * sum(net.block_values()), evaluated * max(net.block_values()))
    needed = net.num_parameters() * 4 * (2 + state if trained else 1) + values * (4 if train.precision == "fp32" else 2)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no cgroup, or no limit ("max")
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    if device.type == "cuda":
        import torch

        memory = int(torch.cuda.get_device_properties(device).total_memory)
    if needed > memory:
        raise ConfigError(
            f"{net.num_parameters():,} parameters and {max(trained, evaluated):,} images of {side}x{side} at a time "
            f"need {needed / 2**30:,.1f} GiB of memory or more, {device} has {memory / 2**30:,.1f} GiB\n"
            "  lower model.num_layers or growth_rate, data.image_size, train.global_batch_size or eval_batch_size"
        )


def _architecture(config: Config) -> Architecture | None:
    if custom.is_custom(config.model.variant):
        return None
    return variant_architecture(**config.model.network, num_classes=10, image_size=config.data.resolved_image_size)

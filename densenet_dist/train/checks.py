"""Check that a configuration can be trained, without importing PyTorch."""

from __future__ import annotations

from collections.abc import Iterable

from densenet_dist.data.datasets import train_size
from densenet_dist.data.plan import BatchPlan
from densenet_dist.errors import ConfigError
from densenet_dist.model.architecture import Architecture
from densenet_dist.model.variants import variant_architecture
from densenet_dist.schema import Config


def check_run(config: Config) -> None:
    """Check the model, and the batches if the numbers of images and workers are known from the configuration.

    Raises:
        ConfigError: settings cannot work; the message names each of them.
    """
    blocks, frozen = len(_architecture(config).num_layers), config.train.freeze
    if frozen != "backbone" and (missing := [part for part in frozen if part != "stem" and part > blocks]):
        raise ConfigError(f"train.freeze: there is no block {missing[0]}; the model has {blocks}")
    images = train_size(config.data.name, config.data.limit)
    if images is not None and config.cluster.engine == "ray" and config.cluster.workers != "auto":
        check_batches(config, images - round(config.data.val_fraction * images), config.cluster.worker_range)


def check_batches(config: Config, num_images: int, world_sizes: Iterable[int]) -> None:
    """Check that every rank has enough images in each forward pass of training: one, or two if BatchNorm needs them.

    Args:
        num_images: number of training images.
        world_sizes: possible numbers of ranks.

    Raises:
        ConfigError: it has not; the message suggests settings that work.
    """
    train, size = config.train, config.train.global_batch_size
    sizes = range(size, max(size, num_images) + 1)
    ends_in_one_pixel = _architecture(config).block_sides()[-1] == 1
    for ranks in world_sizes:
        needed = 2 if ends_in_one_pixel and not (train.sync_bn and ranks > 1) else 1
        parts = (BatchPlan(num_images, each).smallest_part(ranks, train.grad_accum_steps) for each in sizes)
        working = next((each for each, part in zip(sizes, parts, strict=True) if part >= needed), None)
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


def _architecture(config: Config) -> Architecture:
    return variant_architecture(**config.model.network, num_classes=10, image_size=config.data.side)

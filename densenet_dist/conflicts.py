"""Combinations of settings that cannot work together."""

from __future__ import annotations

import re
from collections.abc import Iterator

from densenet_dist.custom import is_custom, short_name
from densenet_dist.schema import PRETRAINED, Config, ModelConfig, TrainConfig


def validation_conflicts(train: TrainConfig) -> Iterator[str]:
    """Yield a message for settings that need validation images."""
    if train.early_stopping.enabled or train.schedule.name == "plateau":
        what = "train.early_stopping" if train.early_stopping.enabled else "train.schedule.name: plateau"
        yield f"data.val_fraction: there are no validation images, but {what} needs the validation loss"


def _custom_conflicts(config: Config) -> Iterator[str]:
    """Yield a message for each setting that a custom part does not have."""
    train, model, builtin = config.train, config.model, ModelConfig()
    if is_custom(model.variant):
        for key, value in model.network.items():
            if key != "variant" and value != getattr(builtin, key):
                yield f"model.{key}: is a setting of DenseNets; the options of {model.variant} are under options.model"
        for key in ("freeze", "head_lr"):
            if getattr(train, key) not in ((), None):
                yield f"train.{key}: needs a DenseNet, not model.variant={model.variant}"
    if is_custom(train.loss) and (train.label_smoothing or train.class_weights is not None):
        key = "label_smoothing" if train.label_smoothing else "class_weights"
        yield f"train.{key}: needs train.loss=cross_entropy; implement it in {train.loss}"
    if train.cuda_graph and (names := [*filter(is_custom, (model.variant, train.loss, train.optimizer.name))]):
        yield f"train.cuda_graph: {names[0]} may not work in a CUDA graph; leave it at false"
    short = [short_name(name) for name in config.callbacks]
    if len(set(short)) < len(short):
        yield f"callbacks: {', '.join(short)}: two have the same name, which options.callbacks needs"


def conflicts(config: Config) -> Iterator[str]:
    """Yield a message for each combination of settings that cannot work together."""
    train, data, schedule = config.train, config.data, config.train.schedule
    yield from _custom_conflicts(config)
    if config.model.pretrained and config.model.variant not in PRETRAINED:
        yield f"model.pretrained: choose model.variant={', '.join(PRETRAINED)}; {config.model.variant} has no weights"
    if config.model.pretrained and config.model.weights is not None:
        yield "model.pretrained: model.weights is given as well; remove one of them"
    own_images = data.name == "folder" or is_custom(data.name)
    if data.image_size is not None and not own_images:
        yield f"data.image_size: is for data.name=folder; the images of {data.name} have 32 pixels a side"
    if data.flip == "alternating" and data.augment == "none":
        yield "data.flip: alternating changes nothing with data.augment=none; choose crop_flip, for example"
    if data.flip == "alternating" and data.sampler == "balanced":
        yield "data.flip: alternating needs every image once per epoch; use data.sampler=uniform or data.flip=random"
    if data.sampler == "balanced" and train.class_weights == "balanced":
        yield "train.class_weights: balanced, as data.sampler is already: use one of them"
    if isinstance(train.class_weights, tuple) and not any(train.class_weights):
        yield "train.class_weights: at least one must be above 0"
    if data.cutout > data.resolved_image_size:
        yield f"data.cutout: a hole of {data.cutout} pixels is larger than the images of {data.resolved_image_size}"
    if data.val_fraction == 0 and not own_images:
        yield from validation_conflicts(train)
    if schedule.name == "multistep" and list(schedule.milestones) != sorted(set(schedule.milestones)):
        yield f"train.schedule.milestones: must be strictly increasing, not {list(schedule.milestones)}"
    if schedule.name != "one_cycle" and schedule.warmup_epochs >= train.epochs and schedule.warmup_epochs > 0:
        yield f"train.schedule.warmup_epochs: {schedule.warmup_epochs:g} must be less than train.epochs={train.epochs}"
    if schedule.name == "one_cycle" and schedule.warmup_epochs > 0:
        yield "train.schedule.warmup_epochs: one_cycle has its own warm-up (pct_start); leave this at 0"
    if schedule.name == "plateau" and schedule.min_lr > train.lr:
        yield f"train.schedule.min_lr: {schedule.min_lr:g} is above train.lr={train.lr:g}"
    if schedule.name == "cosine" and schedule.final_lr > train.lr:
        yield f"train.schedule.final_lr: {schedule.final_lr:g} is above train.lr={train.lr:g}"
    if train.cuda_graph and train.precision == "fp16":
        yield "train.cuda_graph: fp16 decides on the CPU whether to skip a step; use train.precision=bf16 (or fp32)"
    if train.cuda_graph and train.optimizer.name == "muon":
        yield "train.cuda_graph: PyTorch's Muon reads its learning rate on the CPU; use another train.optimizer.name"
    if train.cuda_graph and train.grad_accum_steps > 1:
        yield "train.cuda_graph: a captured step has one micro-batch; leave train.grad_accum_steps at 1"
    if train.compile and train.bucket_mb is not None and train.bucket_mb < 1:
        yield f"train.bucket_mb: must be at least 1 with train.compile=true, not {train.bucket_mb:g}"
    if train.profile is not None and not 0 < train.profile[1] - train.profile[0] <= 100:
        yield f"train.profile: must be up to 100 steps, [START, STOP] with START below STOP, not {list(train.profile)}"
    if train.optimizer.nesterov and train.optimizer.name in ("sgd", "muon") and train.optimizer.momentum == 0:
        yield "train.optimizer.nesterov: needs momentum > 0; set nesterov=false or a momentum"
    for name in config.cluster.variables:
        if re.search("key|secret|token|passw|credential", name, re.IGNORECASE):
            yield f"cluster.env: {name} may be a credential, which run folders would show; set it on the nodes instead"
    for name in {"CPU", "GPU"} & config.cluster.node_resources.keys():
        yield f"cluster.resources_per_worker: {name} is requested with cluster.cpus_per_worker and cluster.device"
    if config.cluster.workers != "auto":
        least, workers = config.cluster.worker_range
        if least > workers:
            yield f"cluster.workers: min={least} is above max={workers}"
        if workers > train.global_batch_size:
            yield f"cluster.workers: {workers} workers cannot share train.global_batch_size={train.global_batch_size}"
        if config.cluster.engine == "local" and workers > 1:
            yield "cluster.workers: cluster.engine=local is one process; for more use ray or torchrun"

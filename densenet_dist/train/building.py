"""A `Job`, built from its configuration."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from densenet_dist.data.datasets import Dataset
from densenet_dist.errors import ConfigError
from densenet_dist.schema import Config, WorkerRange, without_validation
from densenet_dist.train.block_choice import choose_block
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.classes import load_data_of
from densenet_dist.train.context import RunContext
from densenet_dist.train.ddp import wrap
from densenet_dist.train.identity import require_same_files
from densenet_dist.train.inputs import engine_of, eval_loader, train_and_val, train_loader
from densenet_dist.train.job import Job
from densenet_dist.train.loader_choice import choose_loader
from densenet_dist.train.network import autocast, build_model, check_batches, require_memory
from densenet_dist.train.optim import Course, WeightAverage, build_optimizer
from densenet_dist.train.profiling import StepProfiler
from densenet_dist.train.step_graph import StepGraph


def build_job(config: Config, context: RunContext, dataset: Dataset | None = None) -> Job:
    """Load the data, unless they are given, build the model and all that trains it.

    Raises:
        DataError: where the data set is missing or damaged.
        CheckpointError: where the run has begun on other classes.
        ConfigError: where model, data, number of workers and memory do not fit together.
    """
    _choose_kernels(config, context)
    dataset = load_data_of(config, context.run) if dataset is None else dataset
    require_same_files(dataset, context)
    train_indices, val_indices = train_and_val(config, dataset)
    for problem in () if len(val_indices) else without_validation(config.train):
        raise ConfigError(f"{problem}\n  set it, or add a folder val beside train and test")
    workers = config.cluster.workers  # a run must not come to its end where it gets more of them
    ranks = {context.world_size, *(config.cluster.worker_range if isinstance(workers, WorkerRange) else ())}
    check_batches(config, len(train_indices), ranks)
    train, world_size = config.train, context.world_size
    trained = min(train.global_batch_size, len(train_indices)) // world_size // train.grad_accum_steps
    evaluated = min(train.eval_batch_size, max(len(val_indices), len(dataset.test.labels)) // world_size)
    require_memory(config, dataset.num_classes, context.device, trained, evaluated)
    loader = choose_loader(config, context, dataset, train_indices)
    engine = engine_of(config, context.device, dataset, dataset.train, loader)
    batches = train_loader(config, context, dataset, engine, train_indices)
    total = config.train.epochs * len(train_indices)
    settings = choose_block(config, context, dataset.num_classes, dataset.image_size, total)
    model = build_model(settings, dataset.num_classes, dataset.image_size, config.seed)
    model = model.to(context.device)
    store = CheckpointStore(context.run, keep=config.checkpoint.keep, monitor=config.checkpoint.monitor)
    decay = config.train.ema_decay
    job = Job(
        config=config,
        context=context,
        dataset=dataset,
        model=model,
        forward=wrap(model, config, context, autocast(context.device, config.train.precision)),
        average=WeightAverage(model, decay) if decay is not None else None,
        optimizer=build_optimizer(model, config.train.optimizer, config.train.lr),
        scaler=GradScaler(context.device.type, enabled=config.train.precision == "fp16"),
        course=Course.build(config.train, batches.steps_per_epoch),
        loader=loader,
        engine=engine,
        train_loader=batches,
        val_loader=eval_loader(config, context, engine, val_indices) if len(val_indices) else None,
        num_images=(len(train_indices), len(val_indices)),
        store=store,
    )
    job.step_graph = _step_graph(job)
    job.profiler = _profiler(job)
    return job


def _profiler(job: Job) -> StepProfiler | None:
    steps, context = job.config.train.profile, job.context
    if steps is None:
        return None
    total = job.config.train.epochs * job.train_loader.steps_per_epoch
    if steps[0] >= total:
        raise ConfigError(
            f"train.profile: starts when {steps[0]:,} steps are taken, but the whole run has {total:,}: give it "
            "earlier steps"
        )
    if context.rank != 0:
        return None
    return StepProfiler(context.run, steps, context.device, lambda text: context.report({"kind": "note", "text": text}))


def _step_graph(job: Job) -> StepGraph | None:
    train, context = job.config.train, job.context
    if not train.cuda_graph or context.device.type != "cuda" or context.world_size > 1:
        return None

    def step(images: Tensor, aims: Tensor) -> tuple[Tensor, Tensor]:
        made = job.forward_backward(images, aims, 1 / len(images))
        job.update_weights()
        return made

    return StepGraph(step, job.optimizer, context.device)


def _choose_kernels(config: Config, context: RunContext) -> None:
    if context.device.type != "cuda":
        return  # CPU kernels are deterministic at a fixed number of threads
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts, later than this
    torch.backends.cudnn.benchmark = not config.train.deterministic
    torch.use_deterministic_algorithms(config.train.deterministic)
    # That would also fill all new memory with NaN, which is slow and makes no result more deterministic.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

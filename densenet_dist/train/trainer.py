"""`Trainer`: model, optimizer, loaders and counters of one rank."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from densenet_dist import custom
from densenet_dist.data.datasets import Dataset
from densenet_dist.data.loader import Batch, BatchRecipe
from densenet_dist.errors import TrainingError
from densenet_dist.model import DenseNet
from densenet_dist.schema import Config
from densenet_dist.train.autotune import choose_block, choose_loader
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.context import Goodput, Phase, RunContext
from densenet_dist.train.custom_parts import callbacks_of, training_loss
from densenet_dist.train.initial_weights import load_initial_weights
from densenet_dist.train.inputs import (
    class_weights,
    engine_of,
    eval_loader,
    load_run_data,
    require_same_files,
    train_and_val,
    train_loader,
)
from densenet_dist.train.micro_batches import MicroBatches
from densenet_dist.train.network import autocast, build_model, set_determinism, wrap
from densenet_dist.train.optim import LRController, WeightAverage, build_optimizer
from densenet_dist.train.performance import StepTimer
from densenet_dist.train.preflight import check_data
from densenet_dist.train.profiling import StepProfiler
from densenet_dist.train.ranks import RankSync
from densenet_dist.train.results import Metrics
from densenet_dist.train.snapshot import Position
from densenet_dist.train.step_graph import StepGraph
from densenet_dist.train.time_limit import TimeLimit

if TYPE_CHECKING:
    from densenet_dist.train.logs import RunLog


class Trainer:
    """One rank of a run: everything that a training step needs. `dataset` is given if it is already loaded.

    Attributes:
        model: the plain model, whose state dict is in checkpoints.
        train_model: `model`, compiled and wrapped for DDP as configured; a training step calls it.
        average: the moving average of the weights, if configured.
        loader_name: torch or dali.
        engine: produces the pixels of the training split.
        num_images: (training images, validation images).
        position: steps and epochs completed.
        micro_batches: the number of micro-batches of a step.
        saved_step: the global step of the newest checkpoint, known on every rank.
        epoch_start: `train_time` at the start of the epoch.
        epoch_lr: the learning rate at the start of the epoch.
        logged, logged_at: `metrics` and seconds of `train_time` at the last record of ``log.every_steps``.
        goodput: how the run spends its time, as seen by rank 0.
        time_limit: on rank 0, estimates how many steps fit into ``train.max_minutes``.
        log: metrics.jsonl and TensorBoard, on rank 0 of a run.
        step_graph: takes the steps if they are captured as a CUDA graph.

    Raises:
        DataError: the data set is missing or damaged.
        CheckpointError: the run was started with other classes.
        ConfigError: model, data, number of workers and memory do not fit together.
    """

    def __init__(self, config: Config, context: RunContext, dataset: Dataset | None = None) -> None:
        set_determinism(config, context.device)
        self.config, self.context = config, context
        self.dataset = dataset = load_run_data(config, context.run) if dataset is None else dataset
        require_same_files(dataset)
        train_indices, val_indices = train_and_val(config, dataset)
        self.num_images = len(train_indices), len(val_indices)
        # Before anything is measured or built.
        check_data(config, dataset, self.num_images, context.world_size, context.device)
        self.class_weights = class_weights(config, dataset, train_indices, context.device)
        self.loss = training_loss(config, dataset.num_classes, self.class_weights)
        self.callbacks = callbacks_of(config)

        # Validation images are part of the training split, so that one engine serves both loaders.
        self.loader_name = choose_loader(config, context, dataset, train_indices)
        self.engine = engine_of(config, context.device, dataset, dataset.train, self.loader_name)
        self.train_loader = train_loader(config, context, dataset, self.engine, train_indices)
        self.val_loader = None
        if len(val_indices):
            self.val_loader = eval_loader(config, context, self.engine, val_indices)

        train = config.train
        images = train.epochs * len(train_indices)
        model_config = choose_block(config, context, dataset, images)
        # Weights are drawn on the CPU from the seed, so that they do not depend on the device.
        options = config.options
        sizes = dataset.num_classes, dataset.image_size
        self.model = build_model(model_config, *sizes, config.seed, options.model).to(context.device)
        if config.model.weights or config.model.pretrained:
            load_initial_weights(self.model, config, context)
        if isinstance(self.model, DenseNet) and train.freeze:
            self.model.freeze(train.freeze)
        self.micro_batches = MicroBatches(config, context, self.model)
        self.train_model = wrap(self.model, config, context, several_passes=self.micro_batches.several)
        self.average = None if train.ema_decay is None else WeightAverage(self.model, train.ema_decay)
        self.optimizer = build_optimizer(self.model, train.optimizer, train.lr, train.head_lr, options.optimizer)
        self.scaler = GradScaler(context.device.type, enabled=train.precision == "fp16")
        self.steps_per_epoch = self.train_loader.steps_per_epoch
        self.lr_controller = LRController(train, self.steps_per_epoch, options.schedule)

        keep, monitor = config.checkpoint.keep, config.checkpoint.monitor
        self.store = CheckpointStore(context.run, keep=keep, monitor=monitor, status=context.status)
        self.metrics = Metrics(context.device, self.dataset.num_classes)
        self.logged, self.logged_at = Metrics(context.device, self.dataset.num_classes), 0.0
        self.log: RunLog | None = None
        self.rank_sync = RankSync(context)
        self.goodput = Goodput(context.status, context.launch_id, context.world_size)
        self.time_limit = TimeLimit(train.max_minutes, self.goodput.seconds)
        self.position = Position()
        self.saved_step: int | None = None
        self.epoch_start, self.epoch_lr = (0.0, 0.0), 0.0
        self._is_random = config.model.drop_rate > 0 or any(custom.names_in(config))  # custom parts may be
        self.step_graph: StepGraph | None = None
        captured = train.cuda_graph and train.grad_accum_steps == 1
        if captured and context.device.type == "cuda" and context.world_size == 1:
            self.step_graph = StepGraph(self._graph_step, self.optimizer, context.device)
        self.timer = StepTimer(self.model, context.device, captured=self.step_graph is not None)
        self.warned_of_slow_rank = False
        self.profiler = StepProfiler(context, train.profile, train.epochs * self.steps_per_epoch)

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate: the weight average if there is one."""
        return self.average.model if self.average else self.model

    @property
    def steps_left(self) -> float:
        """The number of steps left in the current epoch, which ends early if the time is over."""
        return min(self.steps_per_epoch - self.position.step, self.lr_controller.end_step - self.position.global_step)

    @property
    def total_steps(self) -> int:
        """The number of steps after which training ends, unless it stops early."""
        return int(min(self.max_steps, self.lr_controller.end_step))

    @property
    def max_steps(self) -> int:
        """The global step at which the last epoch ends, if there is time for it."""
        position, epochs = self.position, self.config.train.epochs
        return position.global_step + (epochs - position.epoch) * self.steps_per_epoch - position.step

    @property
    def finished(self) -> bool:
        """Whether training is over: after the last epoch, by early stopping, or because the time is over."""
        ended = self.position.global_step >= self.total_steps and self.position.step == 0
        return ended or self.lr_controller.stopped

    def batches(self) -> Iterator[Batch | BatchRecipe]:
        """Yield the remaining batches of the epoch; as recipes if the CUDA graph of a step can include the batch."""
        start = (self.position.epoch, self.position.step)
        recipes = None if self.step_graph is None else self.train_loader.recipes(*start)
        batches: Iterator[Batch | BatchRecipe] = self.train_loader.epoch(*start) if recipes is None else recipes
        return takewhile(lambda _: self.steps_left > 0, batches)

    def prepare_step(self) -> None:
        """Set the learning rate and seed dropout, and whatever else is random.

        The seed is a function of the step and the rank, so a resumed run needs no random number generator state.
        """
        self.timer.start()
        self.micro_batches.keep_statistics()
        if self.micro_batches.repeated_by(self.position.global_step):
            self._drop_graph()
        lr = self.lr_controller.lr(self.position.global_step)
        if self.step_graph is not None:
            self.step_graph.set_learning_rate(lr)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
        if self._is_random:
            self._seed("dropout", self.context.rank)

    def _seed(self, use: str, rank: int) -> None:
        key = f"{use}/{self.config.seed}/{self.position.global_step}/{rank}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()))

    def halve_micro_batches(self, batch: Batch | BatchRecipe) -> None:
        """Prepare to repeat a step that ran out of memory: drop its CUDA graph, or else use smaller micro-batches."""
        captured = self.step_graph is not None
        self._drop_graph()
        self.optimizer.zero_grad(set_to_none=True)
        self.micro_batches.halve(self.position.global_step, batch.global_size, captured=captured)

    def _drop_graph(self) -> None:
        if self.step_graph is not None:
            self.step_graph = None
            self.optimizer.zero_grad(set_to_none=True)  # the gradients are in its memory

    def forward_backward(self, images: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Run the forward and backward pass; gradients of ``scale`` times the summed loss are accumulated.

        Returns:
            The summed loss, (), and the logits, (n, classes).
        """
        with autocast(self.context.device, self.config.train.precision), custom.step_errors("model", self.config):
            logits = self.train_model(images)
        loss = self.loss(logits.float(), targets)
        part = "model" if custom.is_custom(self.config.model.variant) else "loss"  # an error may come from either
        with custom.step_errors(part, self.config):
            self.scaler.scale(loss * scale).backward()
        return loss.detach(), logits.detach()

    def update_weights(self) -> None:
        """Clip the gradients if configured, and update the weights."""
        if custom.is_custom(self.config.train.optimizer.name):
            self._seed("optimizer", 0)  # the same random numbers on every rank
        if self.config.train.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_grad_norm)
        with custom.step_errors("optimizer", self.config):
            self.scaler.step(self.optimizer)
        self.scaler.update()

    def update_metrics(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Add a batch to the running metrics, without a host sync."""
        self.metrics.update(loss, logits, targets)
        self.rank_sync.watch(loss, self.position.global_step)

    def train_time(self) -> tuple[float, float]:
        """Return the seconds spent in training epochs, over all restarts, and how many of them waiting for batches."""
        spent = self.goodput.seconds()
        return spent["train"] + spent["wait"], spent["wait"]

    def epoch_time(self) -> tuple[float, float]:
        """Return the part of `train_time` since the start of the current epoch."""
        trained, waited = self.train_time()
        return trained - self.epoch_start[0], waited - self.epoch_start[1]

    def end_step(self) -> None:
        """Update the weight average and move on to the next step."""
        self.timer.stop()
        step = self.position.global_step
        if self.average is not None:
            self.average.update(step)
        self.position = Position(self.position.epoch, self.position.step + 1, step + 1)
        self.notify("on_step")

    def end_epoch(self, val_loss: float | None) -> None:
        """Move on to the next epoch."""
        self.lr_controller.end_epoch(val_loss)
        self.position = Position(self.position.epoch + 1, 0, self.position.global_step)
        self.logged.sums -= self.metrics.sums  # keeps `metrics - logged` as `metrics` restarts at 0
        self.metrics = Metrics(self.context.device, self.dataset.num_classes)
        self.epoch_start = self.train_time()

    def notify(self, event: str, *values: Any) -> None:
        """Call the callbacks: on_start, on_step, on_epoch or on_end. Every rank calls it."""
        phase: Phase = "train" if event == "on_step" else "save"  # in "save", slowness is not a hang
        for name, callback in self.callbacks.items():
            with (
                self.context.status.during(phase),
                custom.user_code_errors("callbacks", f"{name}.{event}", TrainingError),
            ):
                getattr(callback, event)(self, *values)

    def divergence_error(self, what: str, step: int) -> TrainingError:
        """Return the error for a value that is not finite."""
        kept = "no checkpoint was saved yet"
        if self.saved_step is not None:
            kept = f"the checkpoint of step {self.saved_step} is kept"
        return TrainingError(
            f"the {what} is NaN or infinite at step {step} (epoch {self.position.last_epoch}); {kept}\n"
            "  try a lower train.lr, a warm-up (train.schedule.warmup_epochs), train.clip_grad_norm=1 "
            "or train.precision=fp32"
        )

    def _graph_step(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        made = self.forward_backward(images, targets, 1 / len(images))
        self.update_weights()
        return made

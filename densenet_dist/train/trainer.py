"""`Trainer`: model, optimizer, loaders and counters of one rank, which checkpoints save and restore."""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from densenet_dist import custom
from densenet_dist.conflicts import validation_conflicts
from densenet_dist.data.datasets import Dataset
from densenet_dist.data.loader import Batch, BatchRecipe
from densenet_dist.errors import CheckpointError, ConfigError, TrainingError
from densenet_dist.model import DenseNet
from densenet_dist.schema import Config, WorkerRange
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.checks import check_batches, require_memory
from densenet_dist.train.choices import choose_block, choose_loader
from densenet_dist.train.context import Goodput, RunContext
from densenet_dist.train.custom_parts import callbacks_of, require_plain, training_loss
from densenet_dist.train.initial_weights import load_initial_weights
from densenet_dist.train.inputs import (
    class_weights,
    digest_of_files,
    engine_of,
    eval_loader,
    load_run_data,
    require_same_files,
    train_and_val,
    train_loader,
)
from densenet_dist.train.micro_batches import MicroBatches
from densenet_dist.train.network import autocast, build_model, free_memory, wrap
from densenet_dist.train.optim import LRController, WeightAverage, build_optimizer, load_optimizer_state
from densenet_dist.train.performance import StepTimer
from densenet_dist.train.profiling import StepProfiler
from densenet_dist.train.ranks import RankSync, broadcast, gather_ranks
from densenet_dist.train.results import Metrics
from densenet_dist.train.snapshot import Position, Snapshot, identity_of, load_weights, require_same
from densenet_dist.train.step_graph import StepGraph
from densenet_dist.train.time_budget import TimeBudget

if TYPE_CHECKING:
    from densenet_dist.train.logs import RunLog


class Trainer:
    """One rank of a run: everything that a training step needs. `dataset` is given if it is already loaded.

    Attributes:
        model: the plain model, whose state dict is in checkpoints.
        forward: `model`, compiled and wrapped for DDP as configured; a training step calls it.
        average: the moving average of the weights, if configured.
        loader_name: torch or dali.
        engine: produces the pixels of the training split.
        num_images: training and validation images.
        position: steps and epochs completed.
        micro_batches: the number of parts in which a step is computed.
        saved_step: the global step of the newest checkpoint, known on every rank.
        goodput: how the run spends its time; that of rank 0 is reported.
        budget: on rank 0 estimates the steps for which there is time.
        log: metrics.jsonl and TensorBoard, on rank 0 of a run.
        step_graph: takes the steps if they are captured as a CUDA graph.

    Raises:
        DataError: the data set is missing or damaged.
        CheckpointError: the run was started with other classes.
        ConfigError: model, data, number of workers and memory do not fit together.
    """

    def __init__(self, config: Config, context: RunContext, dataset: Dataset | None = None) -> None:
        _set_determinism(config, context)
        self.config, self.context = config, context
        self.dataset = dataset = load_run_data(config, context.run) if dataset is None else dataset
        require_same_files(dataset)
        train_indices, val_indices = train_and_val(config, dataset)
        self.num_images = len(train_indices), len(val_indices)
        self._require_feasible()  # before anything is measured or built
        weights = class_weights(config, dataset, train_indices)
        self.class_weights = None if weights is None else weights.to(context.device)
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
        model = choose_block(config, context, dataset, images)
        # Weights are drawn on the CPU from the seed, so that they do not depend on the device.
        options = config.options
        plain = build_model(model, dataset.num_classes, dataset.image_size, config.seed, options.model)
        self.model = plain.to(context.device)
        if config.model.weights or config.model.pretrained:
            load_initial_weights(self.model, config, context)
        if isinstance(self.model, DenseNet):
            self.model.freeze(train.freeze)
        self.micro_batches = MicroBatches(config, context)
        self.forward = wrap(self.model, config, context, in_parts=self.micro_batches.several)
        buffers = list(self.model.buffers())  # by type, so that a copy is one operation
        self._statistics = [[b for b in buffers if b.is_floating_point() is real] for real in (True, False)]
        self._statistics_before = copy.deepcopy(self._statistics)
        self.average = None if train.ema_decay is None else WeightAverage(self.model, train.ema_decay)
        self.optimizer = build_optimizer(self.model, train.optimizer, train.lr, train.head_lr, options.optimizer)
        self.scaler = GradScaler(context.device.type, enabled=train.precision == "fp16")
        self.steps_per_epoch = self.train_loader.steps_per_epoch
        self.lr_controller = LRController(train, self.steps_per_epoch, options.schedule)

        keep, monitor = config.checkpoint.keep, config.checkpoint.monitor
        self.store = CheckpointStore(context.run, keep=keep, monitor=monitor, status=context.status)
        self.metrics = Metrics(context.device, self.dataset.num_classes)
        self._logged = Metrics(context.device, self.dataset.num_classes)  # `metrics` at the last `step_figures`
        self._logged_at = 0.0  # `train_time` then
        self.log: RunLog | None = None
        self.rank_sync = RankSync(context)
        self.goodput = Goodput(context.status, context.launch, context.launched, context.world_size)
        self.budget = TimeBudget(train.max_minutes, self.goodput.seconds)
        self.position = Position()
        self.saved_step: int | None = None
        self._epoch_start = (0.0, 0.0)  # `train_time` then
        self._is_random = config.model.drop_rate > 0 or any(custom.names_in(config))  # custom parts may be
        self.step_graph: StepGraph | None = None
        captured = train.cuda_graph and not self.micro_batches.several
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
        return int(min(self._most_steps, self.lr_controller.end_step))

    @property
    def _most_steps(self) -> int:
        position, epochs = self.position, self.config.train.epochs
        return position.global_step + (epochs - position.epoch) * self.steps_per_epoch - position.step

    @property
    def finished(self) -> bool:
        """Whether training is over: after the last epoch, by early stopping, or because the time is over."""
        ended = self.position.global_step >= self.total_steps and self.position.step == 0
        return ended or self.lr_controller.stopped

    def fit_to_time(self) -> None:
        """Plan anew when training ends, if ``train.max_minutes`` is set and that is due. A collective call.

        To be called just before a checkpoint is saved: steps that are repeated from there on have the same rates.
        """
        if self.config.train.max_minutes is None or self.finished:
            return
        step, steps = self.position.global_step, None  # rank 0 decides
        if self.context.rank == 0 and self.budget.is_due(step):
            images, val_images = self.num_images
            steps = self.budget.steps_left(self.position, self.steps_per_epoch, val_images / images)
        if (steps := broadcast(steps)) is not None:
            within_epoch = self.position.step > 0  # its last step is known before it is taken
            end = min(step + max(steps, int(within_epoch)), self._most_steps)
            if end < self.total_steps or self.lr_controller.end_step < math.inf:
                self.lr_controller.fit(step, end)

    def batches(self) -> Iterator[Batch | BatchRecipe]:
        """Yield the remaining batches of the epoch; as recipes if the CUDA graph of a step can include the batch."""
        start = (self.position.epoch, self.position.step)
        recipes = None if self.step_graph is None else self.train_loader.recipes(*start)
        batches: Iterator[Batch | BatchRecipe] = self.train_loader.epoch(*start) if recipes is None else recipes
        return takewhile(lambda _: self.steps_left > 0, batches)

    def prepare_step(self) -> None:
        """Set the learning rate and seed dropout, and whatever else is random.

        Both are functions of the step, so a resumed run needs no state of a scheduler or random number generator.
        """
        self.timer.start()
        if self.context.world_size == 1:  # the step may be repeated, see `halve_micro_batch`
            for saved, current in zip(self._statistics_before, self._statistics, strict=True):
                torch._foreach_copy_(saved, current)
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

    def halve_micro_batch(self, batch: Batch | BatchRecipe) -> None:
        """Free the memory of a step that ran out of it, and prepare to repeat it in more parts; errors as `halve`."""
        self.micro_batches.halve(self.position.global_step, batch.global_size)
        self.step_graph = None  # it takes a step as a whole
        self.optimizer.zero_grad(set_to_none=True)
        for saved, current in zip(self._statistics_before, self._statistics, strict=True):
            torch._foreach_copy_(current, saved)
        free_memory()

    def forward_backward(self, images: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Run the forward and backward pass; gradients of ``scale`` times the summed loss are accumulated.

        Returns:
            The summed loss, (), and the logits, (n, classes).
        """
        with autocast(self.context.device, self.config.train.precision):
            logits = self.forward(images)
        loss = self.loss(logits.float(), targets)
        self.scaler.scale(loss * scale).backward()
        return loss.detach(), logits.detach()

    def update_weights(self) -> None:
        """Clip the gradients if configured, and update the weights."""
        if custom.is_custom(self.config.train.optimizer.name):
            self._seed("optimizer", 0)  # the same random numbers on every rank
        if self.config.train.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_grad_norm)
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
        return trained - self._epoch_start[0], waited - self._epoch_start[1]

    def step_figures(self) -> dict[str, float]:
        """Return the ``log.every_steps`` figures of the steps since the last call. A collective call."""
        difference = self.metrics.sums - self._logged.sums
        loss, top1, _, images = gather_ranks(difference).sum(0).tolist()  # waits for the device
        before, self._logged_at = self._logged_at, self.train_time()[0]
        self._logged.sums.copy_(self.metrics.sums)
        return {
            "step/loss": loss / images,
            "step/top1": top1 / images,
            "step/lr": self.lr_controller.lr(self.position.global_step - 1),
            "step/images_per_s": images / (self._logged_at - before),
        }

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
        self._logged.sums -= self.metrics.sums  # `metrics` starts at 0 again
        self.metrics = Metrics(self.context.device, self.dataset.num_classes)
        self._epoch_start = self.train_time()

    def notify(self, event: str, *values: Any) -> None:
        """Call the callbacks: on_start, on_step, on_epoch or on_end. Every rank calls it."""
        for name, callback in self.callbacks.items():
            with custom.errors("callbacks", f"{name}.{event}", TrainingError):
                getattr(callback, event)(self, *values)

    def diverged(self, what: str, step: int) -> TrainingError:
        """Return the error for a value that is not finite."""
        kept = "no checkpoint was saved yet"
        if self.saved_step is not None:
            kept = f"the checkpoint of step {self.saved_step} is kept"
        epoch = step // self.steps_per_epoch + 1
        return TrainingError(
            f"the {what} is NaN or infinite at step {step} (epoch {epoch}); {kept}\n"
            "  try a lower train.lr, a warm-up (train.schedule.warmup_epochs), train.clip_grad_norm=1 "
            "or train.precision=fp32"
        )

    def snapshot(self, metrics: dict[str, float] | None = None, *, validated: bool = True) -> Snapshot:
        """Return the current state. A collective call: it contains the running metrics of every rank."""
        sums = gather_ranks(torch.stack([self.metrics.sums, self._logged.sums], dim=0)).cpu()
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "lr_controller": self.lr_controller.state_dict(),
            "sums": sums[:, 0].contiguous(),
            "clock": {
                "seconds": self.train_time()[0],
                "epoch_time": self.epoch_time(),
                "logged_at": self._logged_at,
                "goodput": self.goodput.state_dict(),
            },
            "callbacks": {name: callback.state_dict() for name, callback in self.callbacks.items()},
            "pictures": digest_of_files(self.dataset),
            "identity": identity_of(self.config, self.dataset),
        }
        if self.config.log.every_steps is not None:
            state["logged"] = sums[:, 1].contiguous()
        if custom.is_custom(self.config.train.optimizer.name):
            require_plain(state["optimizer"], self.config.train.optimizer.name)
        require_plain(state["callbacks"], "callbacks")
        average = self.average.model.state_dict() if self.average else None
        return Snapshot(self.model.state_dict(), average, state, self.position, metrics or {}, validated)

    def resume(self) -> None:
        """Restore the latest intact checkpoint, if there is one.

        Rank 0 reads and verifies it for all ranks, so that a restart of many workers does not load the storage.
        """
        snapshot = None
        if self.context.rank == 0:
            snapshot = self.store.load_latest()
            if self.store.rebuilt:
                self.context.warn(f"{self.store.rebuilt}; rebuilt from the folders of the checkpoints")
            self.report_damage()
        snapshot = broadcast(snapshot)
        if snapshot is not None:
            self.restore(snapshot)
            if snapshot.state.get("pictures") != digest_of_files(self.dataset):
                self.context.warn(
                    "the images differ from those at the start of the run, so its results will differ too"
                )

    def report_damage(self) -> None:
        """Show which checkpoints were found damaged while loading."""
        for problem in self.store.damaged:
            self.context.warn(f"{problem}; it is skipped")

    def restore(self, snapshot: Snapshot) -> None:
        """Load a checkpoint.

        Raises:
            CheckpointError: it does not fit this model, or holds values that training cannot continue from.
        """
        origin = f"the checkpoint of step {snapshot.position.global_step}"
        try:
            self._restore(snapshot, origin)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{origin} is damaged: {type(error).__name__}: {error}\n"
                "  delete its folder to resume from the checkpoint before it, or restore a copy"
            ) from error

    def _restore(self, snapshot: Snapshot, origin: str) -> None:
        state = snapshot.state
        require_same(snapshot, identity_of(self.config, self.dataset), origin)
        controller = state["lr_controller" if "lr_controller" in state else "course"]  # its name in older checkpoints
        _require_valid(state, controller)
        if snapshot.position.step > self.steps_per_epoch:
            raise ValueError(f"an epoch has {self.steps_per_epoch} steps, not {snapshot.position.step}")
        load_weights(self.model, snapshot.model, origin)
        if self.average:
            load_weights(self.average.model, snapshot.average or snapshot.model, origin)
        is_custom = custom.is_custom(self.config.train.optimizer.name)
        load_optimizer_state(self.optimizer, state["optimizer"], custom=is_custom)
        for name, saved in state.get("callbacks", {}).items():
            self.callbacks[name].load_state_dict(saved)
        # Only the state is restored: settings such as the growth interval come from the configuration.
        scale = {key: state["scaler"][key] for key in ("scale", "_growth_tracker") if key in state["scaler"]}
        self.scaler.load_state_dict(self.scaler.state_dict() | scale)
        self.lr_controller.load_state_dict(controller)
        self.metrics.restore(state["sums"], self.context.rank, self.context.world_size)
        self.position = snapshot.position
        self.goodput.load_state_dict(state["clock"]["goodput"])
        (trained, waited), (epoch_trained, epoch_waited) = self.train_time(), state["clock"]["epoch_time"]
        self._epoch_start = trained - epoch_trained, waited - epoch_waited
        self._logged.restore(state.get("logged", state["sums"]), self.context.rank, self.context.world_size)
        self._logged_at = state["clock"]["logged_at"] if "logged" in state else trained
        self.saved_step = snapshot.position.global_step

    def _require_feasible(self) -> None:
        """Raise a ConfigError for what cannot work, before anything is built."""
        config, context, train = self.config, self.context, self.config.train
        num_train, num_val = self.num_images
        if not num_val and (problem := next(validation_conflicts(train), None)):
            raise ConfigError(
                f"{problem}\n  raise data.val_fraction or data.limit, or add a folder val beside train and test"
            )
        workers = config.cluster.workers  # an elastic run must not fail when it gets more of them
        ranks = {context.world_size, *(config.cluster.worker_range if isinstance(workers, WorkerRange) else ())}
        check_batches(config, num_train, ranks)
        trained = max(1, min(train.global_batch_size, num_train) // context.world_size // train.grad_accum_steps)
        num_test = len(self.dataset.test.labels)
        evaluated = min(train.eval_batch_size, max(num_val, num_test) // context.world_size)
        require_memory(config, self.dataset.num_classes, context.device, trained, evaluated)

    def _graph_step(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        made = self.forward_backward(images, targets, 1 / len(images))
        self.update_weights()
        return made


def _require_valid(state: Mapping[str, Any], controller: Mapping[str, float]) -> None:
    """Raise a ValueError if a number in a checkpoint's state is impossible. NaN fails each of the comparisons."""
    scaler, sums, clock = state["scaler"], state["sums"], state["clock"]
    for found in (sums, state.get("logged", sums)):
        if (found.dtype, found.shape[1:], found.is_contiguous()) != (torch.float64, (4,), True):
            raise ValueError("the sums of loss, hits and images have another form")
    counts = [controller["plateau.waited"], controller["early.waited"], scaler.get("_growth_tracker", 0)]
    times = [clock["seconds"], *clock["epoch_time"], clock.get("logged_at", 0.0), *clock["goodput"]["seconds"].values()]
    if not (
        all(0 <= count < math.inf for count in (*counts, *sums[:, 1:].flatten()))
        and all(map(math.isfinite, times))
        and 0 <= controller["scale"] <= 1
        and 0 <= controller.get("fit.progress", 0) <= 1
        and 0 <= controller.get("fit.step", 0) <= controller.get("fit.end", math.inf)
        and 0 < scaler.get("scale", 1) <= torch.finfo(torch.float32).max
    ):
        raise ValueError("it holds an impossible count, time or scale")


def _set_determinism(config: Config, context: RunContext) -> None:
    if context.device.type != "cuda":
        return  # CPU kernels are deterministic at a fixed number of threads
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # takes effect when cuBLAS is initialised, later
    torch.backends.cudnn.benchmark = not config.train.deterministic
    torch.use_deterministic_algorithms(config.train.deterministic)
    # Deterministic mode would also fill new memory with NaN, which is slow and makes no result more deterministic.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

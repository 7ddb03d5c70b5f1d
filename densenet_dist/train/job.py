"""Everything one rank needs to train, saved to and restored from a checkpoint; `building` makes it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from densenet_dist.data.datasets import Dataset
from densenet_dist.data.engine import Engine
from densenet_dist.data.image_folder import few
from densenet_dist.data.loader import EvalLoader, TrainLoader
from densenet_dist.errors import CheckpointError
from densenet_dist.model import DenseNet, count_parameters
from densenet_dist.schema import Config
from densenet_dist.train.checkpoint import CheckpointStore, Position, Snapshot, load_weights
from densenet_dist.train.context import RunContext
from densenet_dist.train.ddp import RankSync
from densenet_dist.train.identity import digest_of_files, identity_of, require_same
from densenet_dist.train.metrics import FiniteWatch, Metrics
from densenet_dist.train.network import autocast
from densenet_dist.train.optim import Course, WeightAverage, load_optimizer_state
from densenet_dist.train.profiling import StepProfiler
from densenet_dist.train.saver import Saver
from densenet_dist.train.step_graph import StepGraph


@dataclass
class Job:
    """One rank's share of a run.

    Attributes:
        model: the plain model, whose state dict is what checkpoints hold.
        forward: what a training step calls: `model` compiled and wrapped for DDP as configured.
        loader: what makes the batches, torch or dali.
        engine: of the training split.
        num_images: training and validation images.
        position: the next step to take.
        saved_step: the global step of the newest checkpoint, known on every rank.
        seconds: time spent in training epochs so far, over all restarts.
        epoch_time: of the current epoch so far: seconds of training, seconds of those spent waiting for batches.
        step_graph: what takes the steps where they are captured as a CUDA graph.
        profiler: what records some of them, on rank 0 where that is asked for.
    """

    config: Config
    context: RunContext
    dataset: Dataset
    model: DenseNet
    forward: nn.Module
    average: WeightAverage | None
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    course: Course
    loader: str
    engine: Engine
    train_loader: TrainLoader
    val_loader: EvalLoader | None
    num_images: tuple[int, int]
    store: CheckpointStore
    saver: Saver = field(init=False)
    metrics: Metrics = field(init=False)
    finite: FiniteWatch = field(init=False)
    rank_sync: RankSync = field(init=False)
    position: Position = field(default_factory=Position)
    saved_step: int | None = None
    seconds: float = 0.0
    epoch_time: tuple[float, float] = (0.0, 0.0)
    step_graph: StepGraph | None = None
    profiler: StepProfiler | None = None
    _counted: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        self.saver = Saver(self.store, self.context.status)
        self.metrics = Metrics(self.context.device)
        self.finite = FiniteWatch(self.context.device)
        self.rank_sync = RankSync(self.context, self.finite)

    @property
    def eval_model(self) -> nn.Module:
        """The model to judge: the weight average where there is one."""
        return self.average.model if self.average else self.model

    def warn(self, text: str) -> None:
        """Show a warning; rank 0 does."""
        if self.context.rank == 0:
            self.context.report({"kind": "note", "text": text, "warning": True})

    def forward_backward(self, images: Tensor, aims: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Add to the gradients those of ``scale`` times the summed loss.

        Returns:
            The summed loss, (), and the logits.
        """
        with autocast(self.context.device, self.config.train.precision):
            logits = self.forward(images)
        smoothing = self.config.train.label_smoothing
        loss = F.cross_entropy(logits.float(), aims, reduction="sum", label_smoothing=smoothing)
        self.scaler.scale(loss * scale).backward()
        return loss.detach(), logits.detach()

    def update_weights(self) -> None:
        """Clip the gradients as configured, and take the optimizer's step."""
        if self.config.train.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def reseed_dropout(self) -> None:
        """Make this step's dropout masks a function of (seed, global step, rank), so that no generator is saved."""
        if self.config.model.drop_rate > 0:
            key = f"dropout/{self.config.seed}/{self.position.global_step}/{self.context.rank}"
            torch.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()))

    def count_time(self) -> tuple[float, float]:
        """Add what the status has counted since the last call to `seconds` and `epoch_time`.

        Returns:
            `epoch_time`.
        """
        spent = self.context.status.seconds()
        waited, trained = spent.get("wait", 0.0), spent.get("wait", 0.0) + spent.get("train", 0.0)
        news = trained - self._counted[0], waited - self._counted[1]
        self._counted = trained, waited
        self.seconds += news[0]
        self.epoch_time = self.epoch_time[0] + news[0], self.epoch_time[1] + news[1]
        return self.epoch_time

    def end_epoch(self, val_loss: float | None) -> None:
        """Go over to the next epoch."""
        self.course.epoch_end(val_loss)
        self.position = Position(self.position.epoch + 1, 0, self.position.global_step)
        self.metrics = Metrics(self.context.device)
        self.epoch_time = (0.0, 0.0)

    def snapshot(self, metrics: dict[str, float] | None = None, *, validated: bool = True) -> Snapshot:
        """The state as it stands. A collective call: every rank's running sums go in."""
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "course": self.course.state_dict(),
            "sums": self.metrics.gather(),
            "clock": {
                "seconds": self.seconds,
                "epoch_time": self.epoch_time,
                "goodput": self.context.goodput.state_dict(),
            },
            "pictures": digest_of_files(self.dataset),
            "identity": identity_of(self.config, self.dataset),
        }
        average = self.average.model.state_dict() if self.average else None
        return Snapshot(self.model.state_dict(), average, state, self.position, metrics or {}, validated)

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
                "  delete its folder to continue from the checkpoint before it, or bring back a copy"
            ) from error

    def _restore(self, snapshot: Snapshot, origin: str) -> None:
        state = snapshot.state
        require_same(snapshot, identity_of(self.config, self.dataset), origin)
        _require_possible(state)
        if snapshot.position.step > self.train_loader.steps_per_epoch:
            raise ValueError(f"an epoch has {self.train_loader.steps_per_epoch} steps, not {snapshot.position.step}")
        load_weights(self.model, snapshot.model, origin)
        if self.average:
            load_weights(self.average.model, snapshot.average or snapshot.model, origin)
        load_optimizer_state(self.optimizer, state["optimizer"])
        # A checkpoint holds state; settings are the configuration's.
        scale = {key: state["scaler"][key] for key in ("scale", "_growth_tracker") if key in state["scaler"]}
        self.scaler.load_state_dict(self.scaler.state_dict() | scale)
        self.course.load_state_dict(state["course"])
        self.metrics.restore(state["sums"], self.context.rank, self.context.world_size)
        self.position = snapshot.position
        self.seconds, self.epoch_time = state["clock"]["seconds"], state["clock"]["epoch_time"]
        self.context.goodput.load_state_dict(state["clock"]["goodput"])
        self.saved_step = snapshot.position.global_step


def _require_possible(state: Mapping[str, Any]) -> None:
    """Check the numbers in a checkpoint's state; NaN passes none of the comparisons.

    Raises:
        ValueError: a count is negative, or another number is impossible.
    """
    course, scaler, sums, clock = (state[part] for part in ("course", "scaler", "sums", "clock"))
    if (sums.dtype, sums.shape[1:], sums.is_contiguous()) != (torch.float64, (4,), True):
        raise ValueError("the sums of loss, hits and images have another form")
    counts = [course["plateau.waited"], course["early.waited"], scaler.get("_growth_tracker", 0)]
    times = [clock["seconds"], *clock["epoch_time"], *clock["goodput"]["seconds"].values()]
    if not (
        all(0 <= count < math.inf for count in (*counts, *sums[:, 1:].flatten()))
        and all(map(math.isfinite, times))
        and 0 <= course["scale"] <= 1
        and 0 < scaler.get("scale", 1) <= torch.finfo(torch.float32).max
    ):
        raise ValueError("it holds an impossible count, time or scale")


def describe(job: Job) -> dict[str, Any]:
    """What is about to be trained, on what: the ``start`` event."""
    device = torch.cuda.get_device_name(job.context.device) if job.context.device.type == "cuda" else "CPU"
    best = next((entry for entry in job.store.entries if entry.name == job.store.best and entry.metrics), None)
    return {
        "kind": "start",
        "model": job.config.model.variant,
        "parameters": count_parameters(job.model).trainable,
        "data": job.config.data.name,
        "classes": job.dataset.num_classes,
        "class_names": few(job.dataset.class_names),
        "train_images": job.num_images[0],
        "val_images": job.num_images[1],
        "epochs": job.config.train.epochs,
        "steps_per_epoch": job.train_loader.steps_per_epoch,
        "global_batch_size": job.config.train.global_batch_size,
        "precision": job.config.train.precision,
        "loader": job.loader,
        "world_size": job.context.world_size,
        "device": device,
        "epoch": job.position.epoch,
        "global_step": job.position.global_step,
        "best": None if best is None else {"epoch": best.position.epoch, **best.metrics},
    }

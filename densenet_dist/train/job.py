"""Everything one rank needs to train: built from a configuration, saved to and restored from a checkpoint."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from densenet_dist.data.datasets import Dataset
from densenet_dist.data.image_files import ImageFiles
from densenet_dist.data.loader import EvalLoader, TrainLoader
from densenet_dist.data.requests import Engine
from densenet_dist.errors import DataError
from densenet_dist.model import DenseNet, count_parameters, densenet
from densenet_dist.model.kernels.choice import unavailable
from densenet_dist.schema import Config, ModelConfig
from densenet_dist.train.agreement import Agreement
from densenet_dist.train.checkpoint import CheckpointStore, Position, Snapshot, load_weights
from densenet_dist.train.context import RunContext
from densenet_dist.train.ddp import wrap
from densenet_dist.train.identity import identity_of, require_same
from densenet_dist.train.inputs import engine_of, eval_loader, load_dataset_of, train_and_val, train_loader
from densenet_dist.train.loader_choice import choose_loader
from densenet_dist.train.metrics import FiniteWatch, Metrics
from densenet_dist.train.optim import Course, WeightAverage, build_optimizer
from densenet_dist.train.profiling import StepProfiler, require_steps
from densenet_dist.train.saver import Saver
from densenet_dist.train.step_graph import StepGraph
from densenet_dist.train.steps_taken import StepsTaken

AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    agreement: Agreement = field(init=False)
    position: Position = field(default_factory=Position)
    taken: StepsTaken | None = None
    saved_step: int | None = None
    seconds: float = 0.0
    epoch_time: tuple[float, float] = (0.0, 0.0)
    step_graph: StepGraph | None = None
    profiler: StepProfiler | None = None
    _counted: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        self.saver = Saver(self.store, self.context.pulse)
        self.metrics = Metrics(self.context.device)
        self.finite = FiniteWatch(self.context.device)
        self.agreement = Agreement(self.context, self.finite)

    @property
    def eval_model(self) -> nn.Module:
        """The model to judge: the weight average where there is one."""
        return self.average.model if self.average else self.model

    def autocast(self) -> torch.autocast:
        """Mixed precision as configured."""
        return autocast(self.context.device, self.config.train.precision)

    def forward_backward(self, images: Tensor, aims: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Add to the gradients those of ``scale`` times the summed loss.

        Returns:
            The summed loss, (), and the logits.
        """
        with self.autocast():
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

    def close(self) -> None:
        """Finish what is being written, after an error too."""
        self.saver.close()
        if self.taken is not None:
            self.taken.close()

    def count_time(self) -> tuple[float, float]:
        """Add what the pulse has counted since the last call to `seconds` and `epoch_time`.

        Returns:
            `epoch_time`.
        """
        spent = self.context.pulse.seconds()
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
        """Take up a checkpoint.

        Raises:
            CheckpointError: where it does not fit this model.
        """
        origin = f"the checkpoint of step {snapshot.position.global_step}"
        require_same(snapshot, identity_of(self.config, self.dataset), origin)
        load_weights(self.model, snapshot.model, origin)
        if self.average:
            load_weights(self.average.model, snapshot.average or snapshot.model, origin)
        settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(snapshot.state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(
                own
            )  # a checkpoint holds state; settings are the configuration's (a trial may inherit weights)
        self.scaler.load_state_dict(snapshot.state["scaler"])
        self.course.load_state_dict(snapshot.state["course"])
        self.metrics.restore(snapshot.state["sums"], self.context.rank, self.context.world_size)
        self.position = snapshot.position
        clock = snapshot.state["clock"]
        self.seconds, self.epoch_time = clock["seconds"], clock["epoch_time"]
        self.context.goodput.load_state_dict(clock["goodput"])
        self.saved_step = snapshot.position.global_step


def build_job(config: Config, context: RunContext) -> Job:
    """Load the data, build the model and all that trains it.

    Raises:
        DataError: where the data set is missing or damaged.
        ConfigError: where model, data and number of workers do not fit together.
    """
    _choose_kernels(config, context)
    dataset = load_dataset_of(config)
    _require_same_files(dataset, context)
    train_indices, val_indices = train_and_val(config, dataset)
    loader = choose_loader(config, context, dataset, train_indices)
    engine = engine_of(config, context.device, dataset, dataset.train, loader)
    batches = train_loader(config, context, dataset, engine, train_indices)
    model = build_model(_usable(config.model, context), dataset.num_classes, dataset.image_size, config.seed)
    model = model.to(context.device)
    store = CheckpointStore(context.run, keep=config.checkpoint.keep, monitor=config.checkpoint.monitor)
    decay = config.train.ema_decay
    job = Job(
        config=config,
        context=context,
        dataset=dataset,
        model=model,
        forward=_wrap(model, config, context),
        average=WeightAverage(model, decay) if decay is not None else None,
        optimizer=build_optimizer(model, config.train.optimizer, config.train.lr),
        scaler=GradScaler(context.device.type, enabled=config.train.precision == "fp16"),
        course=Course.build(config.train, batches.steps_per_epoch),
        loader=loader,
        engine=engine,
        train_loader=batches,
        val_loader=eval_loader(config, context, dataset.train, engine, val_indices) if len(val_indices) else None,
        num_images=(len(train_indices), len(val_indices)),
        store=store,
        taken=StepsTaken(context.run) if context.rank == 0 else None,
    )
    job.step_graph = _step_graph(job)
    job.profiler = _profiler(job)
    return job


def _profiler(job: Job) -> StepProfiler | None:
    steps, context = job.config.train.profile, job.context
    if steps is None:
        return None
    require_steps(steps, job.config.train.epochs * job.train_loader.steps_per_epoch)
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


def _usable(config: ModelConfig, context: RunContext) -> ModelConfig:
    """The form of the dense block that this device has kernels for; says so where it is another than configured."""
    reason = None if config.block == "reference" else unavailable(context.device.type)
    if reason is None:
        return config
    context.report({"kind": "note", "text": f"dense blocks are computed in the reference form: {reason}"})
    return replace(config, block="reference")


def build_model(config: ModelConfig, num_classes: int, image_size: int = 32, seed: int | None = None) -> DenseNet:
    """The configured DenseNet on the CPU, its weights drawn from `seed` where one is given.

    Raises:
        ConfigError: naming every setting that cannot work.
    """
    if seed is not None:
        torch.manual_seed(seed)
    return densenet(**asdict(config), num_classes=num_classes, image_size=image_size)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision on `device`; a context that does nothing for fp32."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype=None if precision == "fp32" else dtype, enabled=precision != "fp32")


def describe(job: Job) -> dict[str, Any]:
    """What is about to be trained, on what: the ``start`` event."""
    device = torch.cuda.get_device_name(job.context.device) if job.context.device.type == "cuda" else "CPU"
    best = next((entry for entry in job.store.entries if entry.name == job.store.best and entry.metrics), None)
    return {
        "kind": "start",
        "model": job.config.model.variant,
        "parameters": count_parameters(job.model).trainable,
        "data": job.config.data.name,
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


@torch.no_grad()
def sync_from_rank0(tensors: list[Tensor]) -> None:
    """Give every rank rank 0's values. A collective call.

    BatchNorm's running statistics differ by rank while training (only rank 0's are kept), so they are shared before
    an evaluation rather than before every step, as DDP does by default.
    """
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def digest_of_files(dataset: Dataset) -> str | None:
    """What tells the pictures of a set of files from other ones, by their names; None for images in memory."""
    train, test = dataset.train.images, dataset.test.images
    if not (isinstance(train, ImageFiles) and isinstance(test, ImageFiles)):
        return None
    names = "\n".join([*train.names, "", *test.names])
    return hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _require_same_files(dataset: Dataset, context: RunContext) -> None:
    """Pictures are numbered by their names: ranks that see other files would train on other images than agreed."""
    digest = digest_of_files(dataset)
    if digest is None or not dist.is_initialized():
        return
    found: list[Any] = [None] * context.world_size
    dist.all_gather_object(found, (os.uname().nodename, digest))
    if len({other for _, other in found}) > 1:
        raise DataError(
            "the nodes do not see the same pictures in data.root: "
            + ", ".join(f"rank {rank} on {node}" for rank, (node, _) in enumerate(found))
            + "\n  give data.root a folder that all nodes share, or copy the same files to each"
        )


def _choose_kernels(config: Config, context: RunContext) -> None:
    if context.device.type != "cuda":
        return  # CPU kernels are deterministic at a fixed number of threads
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts, later than this
    torch.backends.cudnn.benchmark = not config.train.deterministic
    torch.use_deterministic_algorithms(config.train.deterministic)


def _wrap(model: DenseNet, config: Config, context: RunContext) -> nn.Module:
    return wrap(model, config, context, autocast(context.device, config.train.precision))

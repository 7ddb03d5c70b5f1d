"""Every setting: a field of a frozen dataclass, with its type, limits, default and meaning.

`densenet_dist.config` reads them from YAML files and the command line, and reports errors.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, WithJsonSchema
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from densenet_dist import custom
from densenet_dist.schedules import SCHEDULES
from densenet_dist.settings import STRICT

Fraction: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat: TypeAlias = Annotated[float, Field(gt=0)]
NonNegativeFloat: TypeAlias = Annotated[float, Field(ge=0)]
PositiveInt: TypeAlias = Annotated[int, Field(ge=1, le=10**9)]
NonNegativeInt: TypeAlias = Annotated[int, Field(ge=0, le=10**9)]
Workers: TypeAlias = Annotated[int, Field(ge=1, le=100_000)]
Seconds: TypeAlias = Annotated[float, Field(gt=0, le=1e9)]
if TYPE_CHECKING:
    ScheduleName: TypeAlias = str
else:
    ScheduleName = Literal[tuple(SCHEDULES)]


def _expand_home(place: str) -> str:
    expanded = os.path.expanduser(place)
    if expanded.startswith("~"):
        raise PydanticCustomError("home", "there is no such home folder; give an absolute path")
    return expanded


PathOrUri: TypeAlias = Annotated[str, AfterValidator(_expand_home)]
"""A path, which may start with ``~`` or ``~user``, or the URI of an object store."""


def _form(pattern: str | re.Pattern[str], form: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise PydanticCustomError("form", f"Input should be {form}")
        return text

    return AfterValidator(check)


CustomName: TypeAlias = Annotated[
    str,
    _form(custom.NAME, "package.module:function (docs/extending.md)"),
    WithJsonSchema({"type": "string", "pattern": f"^{custom.NAME.pattern}$"}),
]
"""The name of a custom part."""
PRETRAINED = ("densenet121", "densenet161", "densenet169", "densenet201")
"""Variants with weights published by torchvision."""
EnvVariable: TypeAlias = Annotated[str, _form(r"(?s)[A-Za-z_]\w*=.*", "NAME=VALUE")]
ResourceAmount: TypeAlias = Annotated[
    str, _form(r"[^=]+=([1-9]\d{0,14}|0\.\d{0,3}[1-9])", "NAME=AMOUNT, with an integer or a fraction below 1")
]


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """The DenseNet. Settings that are null take the variant's values."""

    variant: (
        Literal["notebook", "densenet", "densenet_bc", "densenet121", "densenet161", "densenet169", "densenet201"]
        | CustomName
    ) = "notebook"
    """notebook: the Keras notebook's; densenet, densenet_bc: the paper's networks for CIFAR; others: torchvision's; or
    your own model (docs/extending.md), which has its settings under options.model."""
    growth_rate: PositiveInt | None = None
    """Feature maps each layer adds (k in the paper)."""
    num_layers: PositiveInt | tuple[PositiveInt, ...] | None = None
    """Layers in each dense block: one number for all, or a list with one number per block."""
    depth: PositiveInt | None = None
    """Total depth of the paper's networks (L in the paper), instead of num_layers."""
    compression: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of feature maps a transition keeps (theta in the paper)."""
    drop_rate: Fraction = 0.0
    """Probability that dropout zeroes a value."""
    block: Literal["auto", "fused", "reference"] = "auto"
    """Implementation of dense blocks. All compute the same function: reference is the plain definition; fused needs
    memory linear in depth and is usually faster; auto: the faster one, measured at the start (short runs: fused)."""
    weights: PathOrUri | None = None
    """Start from the weights of a run (best checkpoint), an exported .safetensors file or a PyTorch state dict, which
    may come from torchvision or timm. With another number of classes the classifier starts from random weights."""
    pretrained: bool = False
    """densenet121 to densenet201: start from torchvision's weights of ImageNet, downloaded once and verified."""

    @property
    def network(self) -> dict[str, Any]:
        """The settings that determine the network: the arguments of `densenet` that come from the configuration."""
        return {key: value for key, value in vars(self).items() if key not in ("weights", "pretrained")}


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """The images, their augmentation and loading."""

    name: Literal["shapes", "cifar10", "cifar100", "folder"] | CustomName = "shapes"
    """shapes: generated images; cifar10, cifar100: downloaded if they are not in root; folder: your own images in root,
    with a folder for each class, or such folders in train and test (and val); or your own data set as a function."""
    root: PathOrUri = "data"
    """Folder of the data sets, relative to the working directory; or an object store, s3://bucket/path (credentials
    from the environment), from which each node copies the data set once to its cache ($DENSENET_DIST_CACHE, else
    densenet_dist in $XDG_CACHE_HOME or ~/.cache)."""
    download: bool = True
    """Whether to download a missing data set; with an object store, the process that starts a run uploads it there."""
    url: str | None = None
    """A mirror to download from instead of the official address; checksums are verified all the same."""
    limit: PositiveInt | None = None
    """Train and validate with the first N training images only (folder: N spread evenly over the classes)."""
    test_limit: PositiveInt | None = None
    """Test on the first N test images only (folder: spread likewise); null: on all of them."""
    val_fraction: Fraction = 0.1
    """Share of the training images held out for validation."""
    stratified: bool | None = None
    """Whether to hold out the same share of every class; null: only for data.name=folder."""
    sampler: Literal["uniform", "balanced"] = "uniform"
    """uniform: every training image once per epoch; balanced: as many images, equally many of each class;
    images of small classes repeat, with different augmentation."""
    augment: Literal["none", "notebook", "crop_flip", "random_resized_crop"] | CustomName = "crop_flip"
    """notebook: rotation, shift, zoom, flip as Keras does; crop_flip: pad 4, crop, flip; random_resized_crop: a part
    of random size and shape, resized, flip; or your own function."""
    flip: Literal["random", "alternating"] = "random"
    """random: drawn in each epoch; alternating: drawn in the first epoch, then inverted in every epoch, so that two
    successive epochs show each image both ways, which helps short runs."""
    crop_scale: Annotated[float, Field(gt=0, le=1)] = 0.08
    """random_resized_crop: the smallest share of the area that a crop covers."""
    trivial_augment: bool = False
    """Whether to apply one of TrivialAugment's fourteen operations at a random strength to each image."""
    cutout: NonNegativeInt = 0
    """Side in pixels of a square hole in each training image (16 in the paper for CIFAR-10); 0: none."""
    mixup: NonNegativeFloat = 0.0
    """alpha of the Beta distribution by which two images and their labels are mixed (1 for CIFAR, 0.2 for ImageNet in
    the paper); 0: off."""
    cutmix: NonNegativeFloat = 0.0
    """alpha likewise, for a box of one image pasted into the other (1 in the paper); with both, half of the images get
    each; 0: off."""
    image_size: Annotated[int, Field(ge=8, le=10**9)] | None = None
    """Side in pixels of the square images. folder: after cropping and resizing; null: 224. Your own data set: the size
    of its images; null: 32."""
    on_bad_image: Literal["error", "skip"] = "error"
    """folder: error: unreadable images end the run with a list of them; skip: they are left out. The run always ends if
    no image of a class, or none of the validation images, can be read."""
    test_fraction: Fraction = 0.1
    """folder: share of the images held out for the test if there is no folder test."""
    normalize: Literal["standard", "unit"] = "standard"
    """standard: by the mean and standard deviation of the data set (folder: ImageNet's); unit: only pixel / 255."""
    loader: Literal["auto", "torch", "dali"] = "auto"
    """Library that produces the batches (equal up to rounding in both); auto: the faster one, measured at the start."""
    prefetch: Annotated[int, Field(ge=1, le=1000)] = 2
    """Number of batches prepared ahead, except from images that are already on a GPU."""

    @property
    def is_stratified(self) -> bool:
        """Whether the validation images are the same share of every class."""
        return self.name == "folder" if self.stratified is None else self.stratified

    @property
    def resolved_image_size(self) -> int:
        """Side of the square images in pixels."""
        return self.image_size or (224 if self.name == "folder" else 32)


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """The optimizer."""

    name: Literal["adam", "adamw", "muon", "sgd"] | CustomName = "sgd"
    """adam: weight decay as part of the gradient; adamw: decoupled weight decay; sgd: with momentum; muon: for
    convolutions, and adamw for other parameters, with lr as for adamw (0.01, not 0.1); or your own."""
    momentum: Fraction = 0.9
    """SGD and Muon only."""
    nesterov: bool = True
    """SGD and Muon only."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Adam and AdamW; with Muon, of the other parameters."""
    eps: PositiveFloat = 1e-8
    """Adam and AdamW; with Muon, of the other parameters. (Keras' default is 1e-7.)"""
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty (sgd, adam) or decoupled decay (adamw, muon)."""
    decay: Literal["all", "weights"] = "weights"
    """What weight_decay applies to: weights (not biases or BatchNorm's gamma and beta), or all, as in the paper."""


@dataclass(frozen=True, config=STRICT)
class ScheduleConfig:
    """The learning rate over the run. Epochs may be fractions, except for plateau."""

    name: ScheduleName | CustomName = "cosine"
    """multistep with milestones [50, 75] and gamma 0.1 is the notebook's step function. Or your own function."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Epochs of linear warm-up from warmup_start * lr to lr, before the schedule itself (not for one_cycle)."""
    warmup_start: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of lr at which the warm-up starts."""
    milestones: tuple[PositiveFloat, ...] = (50.0, 75.0)
    """multistep: epochs at which the rate is multiplied by gamma."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """multistep: the factor at each milestone."""
    final_lr: NonNegativeFloat = 0.0
    """cosine: the rate at the end."""
    pct_start: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """one_cycle: share of the run during which the rate rises."""
    div_factor: Annotated[float, Field(ge=1)] = 25.0
    """one_cycle: the first rate is lr / div_factor."""
    final_div_factor: Annotated[float, Field(ge=1)] = 1e4
    """one_cycle: the last rate is the first / final_div_factor."""
    anneal: Literal["cos", "linear"] = "cos"
    """one_cycle: the shape of both slopes."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """plateau: the factor for the rate when the validation loss stops improving."""
    patience: PositiveInt = 5
    """plateau: epochs without improvement before the rate is reduced."""
    min_delta: NonNegativeFloat = 0.01
    """plateau: the least decrease of the loss that counts as improvement."""
    min_lr: NonNegativeFloat = 0.0
    """plateau: lower limit of the rate."""


@dataclass(frozen=True, config=STRICT)
class EarlyStoppingConfig:
    """Stop when the validation loss has not improved for some epochs."""

    enabled: bool = False
    """Whether training may stop before its last epoch."""
    patience: PositiveInt = 10
    """Epochs without improvement before training stops."""
    min_delta: NonNegativeFloat = 0.0
    """The least decrease of the loss that counts as improvement."""


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """Training of the model."""

    epochs: PositiveInt = 30
    """Passes over the training images; with max_minutes, the maximum."""
    max_minutes: Annotated[float, Field(gt=0, le=10**7)] | None = None
    """Limit from the start of the workers to the end of the last validation, including restarts but not pauses before
    --resume. Cosine, one_cycle and custom schedules shrink to fit; others are cut off. null: no limit."""
    global_batch_size: PositiveInt = 64
    """Images per step, over all workers; the last step of an epoch may have fewer, or up to 1/8 more."""
    eval_batch_size: PositiveInt = 500
    """Images per evaluation step and worker."""
    lr: PositiveFloat = 0.1
    """The peak learning rate; it is not scaled with the batch size."""
    head_lr: PositiveFloat | None = None
    """The peak learning rate of the classifier, which follows the same schedule; null: lr."""
    freeze: Literal["backbone"] | tuple[Literal["stem"] | PositiveInt, ...] = ()
    """Parts that are not trained: [stem, 1, 2] is the stem and the first two blocks, backbone all but the classifier.
    Their BatchNorm layers use the running statistics."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: automatic mixed precision with fp32 weights; fp16 scales the loss. In fp32, convolutions on a GPU use
    TF32 (10 bits of mantissa), PyTorch's default; results differ from those on a CPU by about 1e-3."""
    compile: bool = False
    """Whether to use torch.compile."""
    cuda_graph: bool = False
    """Whether to launch a step as one CUDA graph, which helps small batches; ignored unless there is a single GPU and
    grad_accum_steps is 1. The graph includes the augmentation of images that the torch loader keeps on the GPU (not
    folder), except for trivial_augment."""
    deterministic: bool = False
    """On a GPU: use only deterministic kernels, so that a resumed run equals the uninterrupted one bit for bit, at some
    cost in speed. On CPUs training is always deterministic."""
    grad_accum_steps: PositiveInt = 1
    """Number of micro-batches of each worker's share of a step, to save memory; gradients are those of the whole."""
    clip_grad_norm: PositiveFloat | None = None
    """Maximum L2 norm of all gradients together; null: no clipping."""
    class_weights: Literal["balanced"] | tuple[NonNegativeFloat, ...] | None = None
    """Weights of the classes in the training loss; balanced: inversely proportional to their numbers of images."""
    loss: Literal["cross_entropy"] | CustomName = "cross_entropy"
    """The training loss: cross_entropy, or your own function. Evaluations report the cross-entropy."""
    label_smoothing: Fraction = 0.0
    """Share of the target that is distributed evenly over all classes."""
    ema_decay: Fraction | None = None
    """Decay per step of an exponential moving average of the weights, which evaluations use; null: none."""
    sync_bn: bool = False
    """Whether BatchNorm uses the statistics of the global batch."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """bf16: workers exchange gradients in half the bytes, with 8 bits of mantissa; weights and optimizer stay fp32."""
    bucket_mb: PositiveFloat | None = None
    """DDP's bucket size in MiB of gradients; null: the gradients of a dense block (docs/scaling.md)."""
    profile: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """Range of steps to profile: [100, 105] profiles the five steps after step 100. A trace and a table are written to
    the run's folder, under profile/; null: none."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """Checkpoints. The newest and the best are always kept."""

    every_epochs: PositiveInt = 1
    """Save every N epochs, and at the end of training."""
    every_steps: PositiveInt | Literal["auto"] | None = "auto"
    """Also save every N steps within epochs; auto: as often as possible at a cost below 1 % of the time, at most twice
    per minute; null: never. Files are written while training continues."""
    keep: PositiveInt = 1
    """Number of newest checkpoints to keep besides the best."""
    monitor: Literal["val/top1", "val/balanced_accuracy", "val/worst_class_accuracy", "val/macro_f1", "val/loss"] = (
        "val/top1"
    )
    """The metric of the best checkpoint: the lowest val/loss, or the highest of the others."""


@dataclass(frozen=True, config=STRICT)
class WorkerRange:
    """As many workers as the cluster has resources for."""

    min: Workers
    """The minimum; the run waits until this many are available."""
    max: Workers
    """The maximum."""


@dataclass(frozen=True, config=STRICT)
class ClusterConfig:
    """Where training runs."""

    engine: Literal["ray", "local"] = "ray"
    """ray: Ray Train; local: this process, or the processes that torchrun started."""
    workers: Workers | WorkerRange | Literal["auto"] = "auto"
    """DDP workers; auto: one per GPU of the cluster, or two on CPUs; {min: 1, max: 4}: as many as the cluster has
    resources for, changing as nodes are lost or added, with the same images in every step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs if the cluster has any."""
    cpus_per_worker: PositiveInt | Literal["auto"] = "auto"
    """CPU cores and torch threads per worker; auto: its share of the machine, less one for Ray."""
    accelerator_type: str | None = None
    """Use only nodes with this accelerator, by Ray's name, such as H100; null: any node."""
    resources_per_worker: tuple[ResourceAmount, ...] = ()
    """Further Ray resources of each worker, such as ["rdma=1"], which nodes get with ray start --resources."""
    placement: Literal["pack", "spread"] = "pack"
    """pack: as few nodes as possible; spread: workers on as many nodes as possible."""
    env: tuple[EnvVariable, ...] = ()
    """Environment variables of Ray's workers, such as ["NCCL_SOCKET_IFNAME=eth1"]; credentials are refused."""
    address: str | None = None
    """Address of a running Ray cluster, as for ray.init; null: RAY_ADDRESS, else a cluster started by this process."""
    max_failures: NonNegativeInt = 3
    """How many times a run is restarted from its last checkpoint after losing a worker or node."""
    timeout_s: Seconds = 600.0
    """How long to wait for resources, and for a collective operation, before giving up."""

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables by name."""
        return {name: value for name, _, value in (variable.partition("=") for variable in self.env)}

    @property
    def node_resources(self) -> dict[str, float]:
        """The Ray resources, besides CPUs and GPUs, that a worker's node must have."""
        amounts = {
            name: float(amount) for name, _, amount in (each.partition("=") for each in self.resources_per_worker)
        }
        # Ray gives each node one resource of its accelerator's type; a small share of it selects the node.
        return amounts | ({f"accelerator_type:{self.accelerator_type}": 0.001} if self.accelerator_type else {})

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most workers, where they are given."""
        if isinstance(self.workers, WorkerRange):
            return self.workers.min, self.workers.max
        assert self.workers != "auto"
        return self.workers, self.workers


@dataclass(frozen=True, config=STRICT)
class FaultConfig:
    """Handling of failures on a cluster."""

    hang_timeout_s: Seconds = 60.0
    """How long a worker may be unresponsive, or make no progress (ten times its longest step, if that is longer),
    before it is replaced."""
    grace_s: Seconds = 15.0
    """How long a run may take to save after SIGTERM or Ctrl-C; Kubernetes kills pods after 30 s."""


@dataclass(frozen=True, config=STRICT)
class WandbConfig:
    """Weights & Biases; its key comes from WANDB_API_KEY or 'wandb login'."""

    enabled: bool = False
    """Whether to send metrics to W&B; needs the extra wandb."""
    project: Annotated[str, Field(min_length=1, max_length=128)] = "densenet-dist"
    """The project at W&B."""
    entity: str | None = None
    """The user or team at W&B; null: your default."""


@dataclass(frozen=True, config=STRICT)
class MlflowConfig:
    """MLflow; user and password come from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""

    enabled: bool = False
    """Whether to send metrics to MLflow; needs the extra mlflow."""
    tracking_uri: PathOrUri | None = None
    """The tracking server, such as http://mlflow:5000; null: MLFLOW_TRACKING_URI."""
    experiment: Annotated[str, Field(min_length=1, max_length=200)] = "densenet-dist"
    """The experiment at MLflow."""


@dataclass(frozen=True, config=STRICT)
class LogConfig:
    """What is recorded, and services to which it is also sent; training continues if they do not respond."""

    every_steps: PositiveInt | None = None
    """Also record the training loss, top-1, learning rate and images/s every N steps; null: only every epoch."""
    wandb: WandbConfig = WandbConfig()
    mlflow: MlflowConfig = MlflowConfig()


@dataclass(frozen=True, config=STRICT)
class OptionsConfig:
    """The options of custom parts: the keyword-only arguments of their functions, such as options.loss.gamma=2."""

    model: dict[str, Any] = Field(default_factory=dict)
    """Of model.variant."""
    dataset: dict[str, Any] = Field(default_factory=dict)
    """Of data.name."""
    augmentation: dict[str, Any] = Field(default_factory=dict)
    """Of data.augment."""
    loss: dict[str, Any] = Field(default_factory=dict)
    """Of train.loss."""
    optimizer: dict[str, Any] = Field(default_factory=dict)
    """Of train.optimizer.name."""
    schedule: dict[str, Any] = Field(default_factory=dict)
    """Of train.schedule.name."""
    callbacks: dict[str, Any] = Field(default_factory=dict)
    """Of callbacks, by the name of the function: options.callbacks.Print.every=10."""


@dataclass(frozen=True, config=STRICT)
class Config:
    """The configuration of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "run"
    """Name of the run and of its folder; by default the name of the config file."""
    storage: PathOrUri = "runs"
    """Path or URI of the run folders: a path (shared by all nodes of a cluster) or s3://bucket/path."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Determines the split, the order, every augmentation, the initial weights and dropout."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    fault: FaultConfig = FaultConfig()
    log: LogConfig = LogConfig()
    callbacks: tuple[CustomName, ...] = ()
    """Your own callbacks, each package.module:Class (docs/extending.md)."""
    options: OptionsConfig = OptionsConfig()

"""Typed configuration: defaults <- YAML files <- ``key=value``.

Every setting is a field of a frozen dataclass below, with its meaning beside it. `load_config` merges, validates and
reports *all* problems at once, each with its full key, before any work starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from densenet_dist.errors import ConfigError

_STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

Probability: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Positive: TypeAlias = Annotated[float, Field(gt=0)]
NonNegative: TypeAlias = Annotated[float, Field(ge=0)]
Count: TypeAlias = Annotated[int, Field(ge=1)]
Index: TypeAlias = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """Which DenseNet. Everything left at null takes the variant's own value."""

    variant: Literal[
        "notebook", "densenet", "densenet_bc", "densenet121", "densenet161", "densenet169", "densenet201"
    ] = "notebook"
    """notebook: the Keras notebook's net; densenet, densenet_bc: the paper's CIFAR nets; the others: torchvision's."""
    growth_rate: Count | None = None
    """Feature maps each layer adds (k in the paper)."""
    num_layers: Count | tuple[Count, ...] | None = None
    """Layers in each dense block: one number for all, or a list with one number a block."""
    depth: Count | None = None
    """Total depth of the paper's nets (L in the paper), instead of num_layers."""
    compression: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of feature maps a transition keeps (theta in the paper)."""
    drop_rate: Probability = 0.0
    """Probability that dropout zeroes a value."""
    block: Literal["reference"] = "reference"
    """Implementation of the dense block."""


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """Which images, and what is done to them."""

    name: Literal["shapes", "cifar10", "cifar100"] = "shapes"
    """shapes is generated; the CIFAR sets are downloaded when they are not in root."""
    root: str = "data"
    """Folder that holds the data sets; relative paths are taken from where the command is started."""
    download: bool = True
    """Whether a missing set may be downloaded."""
    url: str | None = None
    """Where to download from instead of the official address (a mirror); the files are checked all the same."""
    limit: Count | None = None
    """Use only the first so many training images, and as many test images."""
    val_fraction: Probability = 0.1
    """Share of the training images held out for validation."""
    stratified: bool = False
    """Whether every class is held out in the same proportion."""
    augment: Literal["none", "notebook", "crop_flip"] = "crop_flip"
    """notebook: rotation, shift, zoom, flip as Keras does; crop_flip: pad 4, crop, flip."""
    normalize: Literal["standard", "unit"] = "standard"
    """standard: the set's own mean and standard deviation; unit: pixel / 255 and nothing else."""
    prefetch: Count = 2
    """Batches prepared ahead on a CPU."""


@dataclass(frozen=True, config=_STRICT)
class OptimizerConfig:
    """How parameters follow gradients."""

    name: Literal["adam", "adamw", "sgd"] = "sgd"
    """adam, adamw: with weight decay as part of the gradient, or beside it; sgd: with momentum."""
    momentum: Probability = 0.9
    """SGD only."""
    nesterov: bool = True
    """SGD only."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """Adam and AdamW only."""
    eps: Positive = 1e-8
    """Adam and AdamW only. (Keras' default is 1e-7.)"""
    weight_decay: NonNegative = 0.0
    """L2 penalty (sgd, adam) or decoupled decay (adamw)."""
    decay: Literal["all", "weights"] = "weights"
    """weights: no decay on biases and BatchNorm's gamma and beta; all: decay everything, as the paper does."""


@dataclass(frozen=True, config=_STRICT)
class ScheduleConfig:
    """The learning rate over the run. Epochs may be fractions, except for plateau."""

    name: Literal["constant", "multistep", "cosine", "one_cycle", "plateau"] = "cosine"
    """multistep with milestones [50, 75] and gamma 0.1 is the notebook's step function."""
    warmup_epochs: NonNegative = 0.0
    """Epochs of linear warm-up from warmup_start * lr to lr, before the schedule's own course (not for one_cycle)."""
    warmup_start: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of lr at which the warm-up starts."""
    milestones: tuple[Positive, ...] = (50.0, 75.0)
    """multistep: epochs at which the rate is multiplied by gamma."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """multistep: the factor at each milestone."""
    final_lr: NonNegative = 0.0
    """cosine: the rate at the very end."""
    pct_start: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """one_cycle: share of the run in which the rate rises."""
    div_factor: Annotated[float, Field(ge=1)] = 25.0
    """one_cycle: the first rate is lr / div_factor."""
    final_div_factor: Annotated[float, Field(ge=1)] = 1e4
    """one_cycle: the last rate is the first / final_div_factor."""
    anneal: Literal["cos", "linear"] = "cos"
    """one_cycle: the form of both slopes."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """plateau: what the rate is multiplied by when validation loss stands still."""
    patience: Count = 5
    """plateau: epochs without improvement until then."""
    min_delta: NonNegative = 0.01
    """plateau: how much lower counts as improvement."""
    min_lr: NonNegative = 0.0
    """plateau: the rate never falls below."""


@dataclass(frozen=True, config=_STRICT)
class EarlyStoppingConfig:
    """Stop when validation loss has not improved for a while."""

    enabled: bool = False
    """Whether training may stop before its last epoch."""
    patience: Count = 10
    """Epochs without improvement until training stops."""
    min_delta: NonNegative = 0.0
    """How much lower counts as improvement."""


@dataclass(frozen=True, config=_STRICT)
class TrainConfig:
    """How the model is trained."""

    epochs: Count = 30
    """How often every training image is seen."""
    global_batch_size: Count = 64
    """Images a step, over all workers together."""
    eval_batch_size: Count = 500
    """Images a step of evaluation, a worker."""
    lr: Positive = 0.1
    """The peak learning rate, for the global batch size as it stands."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: automatic mixed precision over fp32 weights; fp16 scales the loss."""
    compile: bool = False
    """Whether torch.compile is used."""
    deterministic: bool = False
    """On a GPU: use deterministic kernels only, so that a resumed run equals the undisturbed one bit for bit, at some
    cost in speed. On CPUs training always is deterministic."""
    grad_accum_steps: Count = 1
    """Parts into which each worker's share of a step is cut to save memory; the result stays that of the whole."""
    clip_grad_norm: Positive | None = None
    """Largest L2 norm of all gradients together."""
    label_smoothing: Probability = 0.0
    """Share of the target that is spread evenly over all classes."""
    ema_decay: Probability | None = None
    """Decay a step of an exponential moving average of the weights, which is then what is evaluated."""
    sync_bn: bool = False
    """Whether BatchNorm's statistics are those of the global batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How parameters follow gradients."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the run."""
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    """When to stop before the last epoch."""


@dataclass(frozen=True, config=_STRICT)
class CheckpointConfig:
    """What is kept for resuming. The last and the best are always kept."""

    every_epochs: Count = 1
    """Save at the end of every so many epochs, and of the last."""
    every_steps: Count | None = None
    """Save within epochs too, every so many steps."""
    keep: Count = 1
    """How many of the newest checkpoints to keep beside the best."""
    monitor: Literal["val/top1", "val/loss"] = "val/top1"
    """What makes a checkpoint the best: the highest val/top1 or the lowest val/loss."""


@dataclass(frozen=True, config=_STRICT)
class ClusterConfig:
    """Where training runs."""

    engine: Literal["ray", "local"] = "ray"
    """ray: Ray Train; local: this process alone, or the ranks that torchrun started."""
    workers: Count | Literal["auto"] = "auto"
    """DDP workers; auto: one a GPU of the cluster, or two on CPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs if the cluster has any."""
    cpus_per_worker: Count | Literal["auto"] = "auto"
    """CPU cores, and so torch threads, a worker; auto: an equal share of the cores beside it."""
    address: str | None = None
    """A running Ray cluster, as for ray.init; null: the one in RAY_ADDRESS, else one of this process' own."""
    max_failures: Index = 3
    """How often a run is restarted from its last checkpoint after a lost worker or node."""
    timeout_s: Positive = 600.0
    """How long to wait for resources, and for a collective operation, before giving up."""


@dataclass(frozen=True, config=_STRICT)
class Config:
    """Everything a run depends on."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "run"
    """The run's name, and its folder's; by default the config file's name."""
    storage: str = "runs"
    """Where run folders are: a path (shared by all nodes, where there are several) or s3://bucket/path."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Fixes the split, the order, every augmentation, the initial weights and dropout."""
    model: ModelConfig = ModelConfig()
    """Which DenseNet."""
    data: DataConfig = DataConfig()
    """Which images, and what is done to them."""
    train: TrainConfig = TrainConfig()
    """How the model is trained."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept for resuming."""
    cluster: ClusterConfig = ClusterConfig()
    """Where training runs."""


_ADAPTER = TypeAdapter(Config)
_Path: TypeAlias = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` that refuses duplicate keys and reads 1e-3 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a single word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands here a second time", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """`yaml.SafeDumper` that quotes every text which `_Loader` would read as something else."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def load_config(*sources: str | Path | Mapping[str, Any]) -> Config:
    """Merge `sources` over the defaults, left to right, and validate the result.

    Args:
        sources: a path of a YAML file; a ``dotted.key=value`` string, its value read as YAML; or a mapping, nested or
            with dotted keys (a search trial's overrides). Where none gives a ``name``, the last file's stem becomes it.

    Raises:
        ConfigError: with every problem found, one a line.
    """
    merged: dict[str, Any] = {}
    name: dict[str, str] = {}
    for source in sources:
        if isinstance(source, Mapping):
            layer = _nest(source)
        elif isinstance(source, str) and "=" in source and not os.path.exists(source):
            layer = _override(source)
        else:
            layer = read_yaml(Path(source))
            stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(source).stem).lstrip("._-")[:100]
            name = {"name": stem} if stem else name
        _merge(merged, layer)
    return validate(name | merged)


def validate(values: Mapping[str, Any]) -> Config:
    """Turn nested plain values into a `Config`, or raise one `ConfigError` that lists every problem."""
    try:
        # JSON's strict mode takes lists for tuples and mappings for groups, and nothing else for something else.
        config = _ADAPTER.validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError(_join(_problems(error))) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"the configuration holds a value that cannot be written down: {error}") from None
    problems = list(_impossible(config))
    if problems:
        raise ConfigError(_join(problems))
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as nested plain values, ready for YAML or JSON."""
    values = _ADAPTER.dump_python(config, mode="json")
    assert isinstance(values, dict)
    return values


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal `Config`."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, default_flow_style=None)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one level of dotted keys: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file that must hold a mapping.

    Raises:
        ConfigError: where the file is missing, is not YAML, repeats a key, or holds something else.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a subclass of SafeLoader
        values = _nest(values) if isinstance(values, dict) else values
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}{_similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the config file {path} is not valid YAML: {error}") from None
    except (ValueError, RecursionError) as error:  # a date such as 2026-13-01, a number of thousands of digits
        raise ConfigError(f"the config file {path} cannot be understood: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"the config file {path} holds a {type(values).__name__}; it must hold keys and values")
    return values


def _override(text: str) -> dict[str, Any]:
    key, _, value = text.partition("=")
    if not key.strip():
        raise ConfigError(f"{text!r} has no key before its =")
    try:
        return _nest({key.strip(): yaml.load(value, Loader=_Loader)})
    except yaml.YAMLError as error:
        raise ConfigError(f"the value in {text!r} is not valid YAML: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the value in {text!r} cannot be understood: {error}") from None


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = str(key).split(".")
        layer: dict[str, Any] = {last: _nest(value) if isinstance(value, Mapping) else value}
        for parent in reversed(parents):
            layer = {parent: layer}
        _merge(nested, layer)
    return nested


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = _nest(value) if isinstance(value, Mapping) else value


def _problems(error: ValidationError) -> list[str]:
    """One line for each setting that is wrong."""
    lines: dict[_Path, str] = {}
    for item in error.errors():
        path = _real_path(item["loc"])
        if item["type"] == "missing":  # a list that is too short: the input is all of it
            path = path[:-1]
        unknown = item["type"] in ("unexpected_keyword_argument", "extra_forbidden")
        lines[path] = _unknown(path) if unknown else _wrong(path, item["input"])
    # Of a list that could also be a single number, only the wrong element matters.
    return [line for path, line in lines.items() if not any(path == other[:-1] for other in lines)]


def _unknown(path: _Path) -> str:
    *group, key = (str(part) for part in path)
    known = list(_at(_DEFAULTS, group))
    everywhere = _all_keys(_DEFAULTS)
    near = [".".join([*group, name]) for name in difflib.get_close_matches(key, known, n=1)]
    near += [other for other in everywhere if other.split(".")[-1] == key]
    near += [other for other in everywhere if difflib.get_close_matches(key, [other.split(".")[-1]], cutoff=0.8)]
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"{_dotted(path)}: unknown key; {hint}"


def _wrong(path: _Path, value: Any) -> str:
    shown = "null" if value is None else f"{value!r} ({type(value).__name__})"
    if len(shown) > 70:
        shown = f"{shown[:50]}... ({type(value).__name__})"
    group = _at(_DEFAULTS, path)
    if isinstance(group, dict):
        return f"{_dotted(path)}: holds {shown}, but is a group of settings: {', '.join(group)}"
    schema = _ADAPTER.json_schema()
    return f"{_dotted(path)}: must be {_expected(_schema_at(schema, path))}, not {shown}"


def _expected(schema: Mapping[str, Any]) -> str:
    """What a JSON schema asks for, in words."""
    if "anyOf" in schema:
        options = sorted(schema["anyOf"], key=lambda option: option["type"] == "array")  # the longest words last
        return " or ".join(_expected(option) for option in options)
    if "const" in schema or "enum" in schema:
        return " or ".join(repr(option) for option in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        items = schema.get("prefixItems", [schema.get("items")])
        count = f"{len(items)} values" if "prefixItems" in schema else "values"
        return f"a list of {count}, each {_expected(items[0])}"
    words = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "text"}
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    limits += [f"that matches {schema['pattern']}"] if "pattern" in schema else []
    return " ".join([str(words.get(schema["type"], schema["type"])), " and ".join(limits)]).strip()


def _schema_at(schema: dict[str, Any], path: _Path) -> dict[str, Any]:
    level = schema
    for part in path:
        if isinstance(part, int):
            lists = [option for option in level.get("anyOf", [level]) if option.get("type") == "array"]
            level = lists[0]["items"] if "items" in lists[0] else lists[0]["prefixItems"][part]
        else:
            level = level["properties"][part]
        if "$ref" in level:
            level = schema["$defs"][level["$ref"].rpartition("/")[2]]
    return level


def _real_path(location: Sequence[str | int]) -> _Path:
    # pydantic appends which member of a union it tried; only keys and list positions mean anything to a reader.
    path: list[str | int] = []
    for part in location:
        if isinstance(part, int) or isinstance(_at(_DEFAULTS, path), dict):
            path.append(part)
    return tuple(path)


def _at(values: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _dotted(path: _Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]


def _all_keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    groups = [(key, value) for key, value in values.items() if isinstance(value, Mapping)]
    below = [key for name, value in groups for key in _all_keys(value, f"{prefix}{name}.")]
    return [prefix + key for key in values] + below


def _similar_file(path: Path) -> str:
    names = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _join(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the configuration:\n" + "\n".join(f"  {problem}" for problem in problems)


def _impossible(config: Config) -> Iterator[str]:
    """Combinations that are each legal alone but cannot work together."""
    train, data, schedule = config.train, config.data, config.train.schedule
    if data.val_fraction == 0 and (train.early_stopping.enabled or schedule.name == "plateau"):
        what = "train.early_stopping" if train.early_stopping.enabled else "train.schedule.name: plateau"
        yield f"data.val_fraction: 0 leaves nothing to validate on, but {what} watches the validation loss"
    if schedule.name == "multistep" and list(schedule.milestones) != sorted(set(schedule.milestones)):
        yield f"train.schedule.milestones: must rise, not {list(schedule.milestones)}"
    if schedule.name != "one_cycle" and schedule.warmup_epochs >= train.epochs and schedule.warmup_epochs > 0:
        yield f"train.schedule.warmup_epochs: {schedule.warmup_epochs:g} is the whole run of {train.epochs} epochs"
    if schedule.name == "one_cycle" and schedule.warmup_epochs > 0:
        yield "train.schedule.warmup_epochs: one_cycle has its own warm-up (pct_start); leave this at 0"
    if schedule.name == "plateau" and schedule.min_lr > train.lr:
        yield f"train.schedule.min_lr: {schedule.min_lr:g} is above train.lr={train.lr:g}"
    if schedule.name == "cosine" and schedule.final_lr > train.lr:
        yield f"train.schedule.final_lr: {schedule.final_lr:g} is above train.lr={train.lr:g}"
    if train.optimizer.nesterov and train.optimizer.name == "sgd" and train.optimizer.momentum == 0:
        yield "train.optimizer.nesterov: needs momentum > 0; set nesterov=false or a momentum"
    if isinstance(config.cluster.workers, int):
        workers = config.cluster.workers
        if workers > train.global_batch_size:
            yield f"cluster.workers: {workers} workers cannot share train.global_batch_size={train.global_batch_size}"
        if config.cluster.engine == "local" and workers > 1:
            yield "cluster.workers: cluster.engine=local is one process; for more use ray or torchrun"


_DEFAULTS = dataclasses.asdict(Config())

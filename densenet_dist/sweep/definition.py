"""A sweep file: its settings, each a field of a frozen dataclass as in `densenet_dist.schema`; read and validate it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as settings_dataclass

from densenet_dist import config as run_config
from densenet_dist import custom
from densenet_dist.config import is_stored, load_config, merged, name_of_file
from densenet_dist.custom_options import merge_layer
from densenet_dist.errors import ConfigError
from densenet_dist.run_folder import join_location
from densenet_dist.schema import Config, NonNegativeInt, PathOrUri, PositiveFloat, PositiveInt, Workers
from densenet_dist.settings import STRICT, Settings, join_problems
from densenet_dist.sweep import space as spaces
from densenet_dist.sweep.space import KINDS, Domain, Value, read_domain
from densenet_dist.yaml_settings import find_file, is_override, merge, nest, read_override, read_yaml, to_yaml

DEFAULT_TRIALS: Final = 16
_CHECKED_COMBINATIONS: Final = 200
_LARGEST_GRID: Final = 10_000
_GROUPS: Final = tuple(field.name for field in fields(Config) if field.name not in ("name", "storage"))
"""Keys of a configuration that the base of a sweep may set."""
_REMOVED: Final = ("perturb_epochs", "quantile", "resample_probability")
"""Scheduler settings of earlier versions, which every sweep.yaml written by them contains; they are ignored."""


@settings_dataclass(frozen=True, config=STRICT)
class SchedulerConfig:
    """Which trials are stopped early."""

    name: Literal["fifo", "asha", "median"] = "asha"
    """fifo: none; asha: successive halving (Li et al. 2018, arXiv:1810.05934); median: trials below the median of the
    others."""
    grace_epochs: PositiveInt = 1
    """asha, median: epochs that every trial trains."""
    reduction_factor: Annotated[int, Field(ge=2, le=10**9)] = 3
    """asha: one trial in this many continues after each rung; rungs are this factor apart in epochs."""
    min_trials: PositiveInt = 3
    """median: number of trials that must have reached an epoch before any is stopped there."""


@settings_dataclass(frozen=True, config=STRICT)
class SearchConfig:
    """How the settings of trials are chosen."""

    name: Literal["random", "grid", "optuna"] = "random"
    """random; grid: every combination of a space of choices and steps; optuna: its tree-structured Parzen estimator."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of random and optuna; optuna also depends on the order in which trials end."""
    startup_trials: PositiveInt = 10
    """optuna: number of random trials before the estimator is used."""


@settings_dataclass(frozen=True, config=STRICT)
class SweepConfig:
    """A sweep: runs of one base configuration with different settings."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "sweep"
    """Name of the sweep and of its folder; by default the name of the sweep file."""
    storage: PathOrUri = "runs"
    """Where the sweep's folder is, as for a run; it contains the run folders of the trials."""
    base: str = ""
    """The configuration file that every trial starts from, relative to the sweep file; empty: the defaults."""
    metric: Literal[
        "val/top1",
        "val/top5",
        "val/balanced_accuracy",
        "val/worst_class_accuracy",
        "val/macro_f1",
        "val/loss",
        "train/top1",
        "train/loss",
    ] = "val/top1"
    """Trials are compared by this metric, each at its best epoch; it is also their checkpoint.monitor, unless that
    is set or cannot be this metric (val/top5, train/...)."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether the highest or the lowest value is best; auto: min for a loss, max for an accuracy."""
    trials: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Number of trials; null: 16, or all combinations of a grid."""
    max_hours: PositiveFloat | None = None
    """Limit of each start of the sweep; --resume continues the trials that it interrupts; null: no limit."""
    concurrent: PositiveInt | Literal["auto"] = "auto"
    """Maximum number of trials at a time; auto: as many as the cluster has room for."""
    workers: Workers = 1
    """DDP workers per trial; one trains in the trial's own process, several are started by Ray Train."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """auto: 1 if the cluster has GPUs; a fraction lets trials of one worker share a GPU; 0: train on CPUs."""
    cpus_per_worker: PositiveInt | Literal["auto"] = "auto"
    """CPU cores and torch threads per worker; auto: one."""
    max_failures: NonNegativeInt = 1
    """How often a crashed trial is restarted from its last checkpoint; NaN and wrong settings are not retried."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """Which trials are stopped early."""
    search: SearchConfig = SearchConfig()
    """How the settings of trials are chosen."""

    @property
    def maximize(self) -> bool:
        """Whether the highest value is best."""
        return self.is_accuracy if self.mode == "auto" else self.mode == "max"

    @property
    def is_accuracy(self) -> bool:
        """Whether the metric is an accuracy rather than a loss."""
        return not self.metric.endswith("loss")

    @property
    def unit(self) -> int:
        """Factor of the metric on pages, where accuracies are in per cent."""
        return 100 if self.is_accuracy else 1


def _conflicts(sweep: SweepConfig) -> Iterator[str]:
    """Yield problems of settings that are each valid alone but not together."""
    gpus = sweep.gpus_per_worker
    if gpus != "auto" and gpus not in (0, 1) and (gpus > 1 or sweep.workers > 1):
        yield f"gpus_per_worker: {gpus:g}; a worker uses 0 or 1, and only trials of one worker can share a GPU"


SETTINGS: Final = Settings(SweepConfig, _conflicts)


@dataclass(frozen=True)
class Sweep:
    """A validated sweep: its own settings, the configuration of its trials, and a domain for each searched key."""

    settings: SweepConfig
    base: Mapping[str, Any]
    space: Mapping[str, Domain]

    @property
    def trials(self) -> int:
        """The planned number of trials."""
        if self.settings.trials is not None:
            return self.settings.trials
        return (spaces.size(self.space) or 0) if self.settings.search.name == "grid" else DEFAULT_TRIALS

    @property
    def folder(self) -> str:
        """The sweep's folder, a path or URI, which contains the run folders of its trials."""
        return join_location(self.settings.storage, self.settings.name)

    def config(self, name: str, overrides: Mapping[str, Value], **changed: Any) -> Config:
        """Return the configuration of a trial: `overrides` and other changed settings, by dotted key, over the base.

        Raises:
            ConfigError: these values cannot work together.
        """
        return load_config(self.base, overrides, {"name": name, "storage": self.folder}, changed, trust=False)

    def custom_parts(self) -> Iterator[tuple[str, str]]:
        """Yield the part and the name of each custom part that trials may have."""
        yield from custom.names_in(self.base)
        yield from self.searched_parts()

    def searched_parts(self) -> Iterator[tuple[str, str]]:
        """Yield those of the space alone."""
        for key, domain in self.space.items():
            for end in domain.ends:
                yield from custom.names_in(nest({key: end}))

    def to_yaml(self) -> str:
        """Return the whole sweep as one file for `load_sweep`."""
        space = {key: domain.describe() for key, domain in self.space.items()}
        return to_yaml(SETTINGS.to_dict(self.settings) | {"base": "", "settings": self.base, "space": space})

    def stored_at(self, storage: str, name: str) -> Sweep:
        """Return the sweep with another storage and name: its folder may have been moved since it was written."""
        return replace(self, settings=replace(self.settings, storage=storage, name=name))


def load_sweep(*sources: str | Path, trust: bool | None = None) -> Sweep:
    """Read a sweep.

    Args:
        sources: a sweep file, then ``key=value``: of the sweep's own settings (``trials=8``), of the base configuration
            (``train.epochs=3``), or of the space (``space.train.lr={loguniform: [0.01, 1]}``). Later ones win.
        trust: whether custom parts that they name may be imported, as for `load_config`.

    Raises:
        ConfigError: with all problems of settings, base and space, one per line.
    """
    values: dict[str, Any] = {}
    name: dict[str, str] = {}
    domains: dict[str, Any] = {}
    settings_of_base: dict[str, Any] = {}
    if trust is None and any(is_stored(source) for source in sources if not is_override(source)):
        trust = False
    for source in sources:
        layer = _read(source)
        settings_of_layer = layer.pop("settings", None) or {}
        if not isinstance(settings_of_layer, Mapping):
            raise ConfigError(f"settings: must hold settings of the base configuration, not {settings_of_layer!r}")
        merge_layer(settings_of_base, nest(settings_of_layer))
        space_of_layer = layer.pop("space", None) or {}
        if not isinstance(space_of_layer, Mapping):
            raise ConfigError(f"space: must hold a domain for each key, not {space_of_layer!r}")
        domains |= dict(_leaves(space_of_layer))  # a domain is replaced as a whole, never merged
        merge(values, layer)
        if not is_override(source):
            stem = name_of_file(source)
            name = {"name": stem} if stem else name
    base_file = str(values.get("base") or "")
    problems: list[str] = []
    settings: SweepConfig | None = None
    base: Config | None = None
    with _collected(problems):
        settings = SETTINGS.validate(name | values)
    # Trials test the checkpoint of their best epoch by the sweep's metric, unless a source sets another monitor.
    metric = "" if settings is None else settings.metric
    monitor = {"checkpoint.monitor": metric} if metric.startswith("val/") and metric != "val/top5" else {}
    with _collected(problems):
        base = load_config(monitor, *([base_file] if base_file else []), settings_of_base, trust=trust)
    space = _read_space(domains, problems)
    if settings is not None and base is not None:
        all_values = run_config.to_dict(base)
        sweep = Sweep(settings, {key: all_values[key] for key in _GROUPS}, space)
        if trust is not False:
            custom.allow(name for _, name in sweep.searched_parts())
        custom.require_allowed(sweep.custom_parts())
        problems += _find_problems(sweep)
        if not problems:
            return sweep
    raise ConfigError(join_problems(list(dict.fromkeys(problems))))


def json_schema(sweeps: bool) -> dict[str, Any]:
    """Return the JSON Schema of sweep files, or of configurations, for editors; configs/ contains both."""
    found = (SETTINGS if sweeps else run_config.SETTINGS).adapter.json_schema()
    if sweeps:
        found["properties"] |= {"settings": {"$ref": "schema.json"}, "space": {"type": "object"}}
    return found


def _read(source: str | Path) -> dict[str, Any]:
    if not is_override(source):
        layer = read_yaml(Path(source))
        misplaced = [key for key in _GROUPS if key in layer]
        if misplaced and "space" not in layer:
            raise ConfigError(
                f"{source} is the configuration of a single run; train it with: densenet-dist train {source}\n"
                f"  a sweep file refers to it with base: {Path(source).name}, and lists the keys to search under space"
            )
        if misplaced:
            raise ConfigError(f"{source}: {', '.join(misplaced)} of the base configuration belong under settings")
        if layer.get("base"):
            layer["base"] = str(find_base(Path(source), str(layer["base"])))
        layer.pop("max_gpu_hours", None)  # a limit that earlier versions had and wrote
        if isinstance(scheduler := layer.get("scheduler"), dict):
            layer["scheduler"] = {key: value for key, value in scheduler.items() if key not in _REMOVED}
        return layer
    layer = read_override(str(source))
    groups = {key: layer.pop(key) for key in _GROUPS if key in layer}
    return layer | ({"settings": groups} if groups else {})


def find_base(file: Path, base: str) -> Path:
    """Find the base configuration of a sweep file: in the same folder, or one that comes with the package."""
    path = find_file(file).parent / os.path.expanduser(base)
    return path if path.is_file() or not find_file(base).is_file() else find_file(base)


def stored_space(file: Path) -> dict[str, Domain]:
    """Read what a sweep file searches."""
    return _read_space(dict(_leaves(read_yaml(file)["space"])), [])


def _read_space(domains: Mapping[str, Any], problems: list[str]) -> dict[str, Domain]:
    space: dict[str, Domain] = {}
    if not domains:
        problems.append("space: names no key to search, such as train.lr: {loguniform: [0.01, 1]}")
    for key, value in domains.items():
        unknown = None if _is_option(key) else run_config.SETTINGS.unknown_key(key)
        if unknown is not None:
            problems.append(f"space.{unknown}")
        elif key in ("name", "storage") or key.startswith("cluster."):
            problems.append(
                f"space.{key}: cannot be searched: it is the same for all trials and part of the sweep's own settings"
            )
        else:
            with _collected(problems, f"space.{key}: "):
                space[key] = read_domain(value)
    return space


def _is_option(key: str) -> bool:
    """Return whether a key is that of an option of a custom part, whose name is checked with the base configuration."""
    group, _, rest = key.partition(".")
    return group == "options" and rest.partition(".")[0] in custom.PARTS and "." in rest


def _leaves(space: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys of run settings with their domains."""
    for part, value in space.items():
        key = f"{prefix}{part}"
        group = isinstance(value, Mapping) and run_config.SETTINGS.unknown_key(key) is not None
        if group and not KINDS & set(value):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _find_problems(sweep: Sweep) -> list[str]:
    """Return the problems of settings, base and space together."""
    problems: list[str] = []
    for key, domain in sweep.space.items():
        for end in domain.ends:
            with _collected(problems, "space."):
                run_config.validate(merged(sweep.base, {key: end}, trust=False), combinations=False)
    settings = sweep.settings
    if settings.search.name == "grid":
        for key, domain in sweep.space.items():
            if domain.count is None:
                problems.append(f"space.{key}: search.name=grid needs a choice, or a step")
        count = spaces.size(sweep.space)
        if count is not None and count > _LARGEST_GRID:
            problems.append(f"space: a grid may have {_LARGEST_GRID} combinations at most; set search.name=random")
        elif count is not None and settings.trials not in (None, count):
            problems.append(f"trials: the grid has {count} combinations; leave trials out")
    data = sweep.base["data"]
    if (
        settings.metric.startswith("val/")
        and data["val_fraction"] == 0
        and not (data["name"] == "folder" or custom.is_custom(data["name"]))
    ):
        problems.append(f"metric: {settings.metric} needs validation images, but data.val_fraction is 0")
    return problems or _check_combinations(sweep)


def _check_combinations(sweep: Sweep) -> list[str]:
    from densenet_dist.train.preflight import check_run

    cluster = {"cluster.workers": sweep.settings.workers, "cluster.engine": "ray"}
    rng = random.Random(0)
    problems: list[str] = []
    for _ in range(_CHECKED_COMBINATIONS):
        overrides = spaces.sample(sweep.space, rng)
        with _collected(problems, "  "):
            check_run(sweep.config("trial", overrides, **cluster))
        if problems:
            example = ", ".join(f"{key}={value}" for key, value in overrides.items())
            return [f"space: some combinations cannot work, such as {example}", *problems]
    return []


@contextmanager
def _collected(problems: list[str], prefix: str = "") -> Iterator[None]:
    """Suppress a ConfigError; add each of its problems to `problems`, after `prefix`."""
    try:
        yield
    except ConfigError as error:
        lines = str(error).splitlines()
        several = lines[0].endswith("problems in the configuration:")
        problems += [prefix + line.strip() for line in (lines[1:] if several else lines)]

"""Every setting of a sweep file except the space: a field of a frozen dataclass, as in `densenet_dist.schema`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from densenet_dist.schema import STRICT, Count, Index, PathOrUri, Positive, Workers


@dataclass(frozen=True, config=STRICT)
class SchedulerConfig:
    """Which trials are stopped early."""

    name: Literal["fifo", "asha", "median"] = "asha"
    """fifo: none; asha: successive halving (Li et al. 2018, arXiv:1810.05934); median: trials below the median of the
    others."""
    grace_epochs: Count = 1
    """asha, median: epochs that every trial trains."""
    reduction_factor: Annotated[int, Field(ge=2, le=10**9)] = 3
    """asha: one trial in this many continues after each rung; rungs are this factor apart in epochs."""
    min_trials: Count = 3
    """median: number of trials that must have reached an epoch before any is stopped there."""


@dataclass(frozen=True, config=STRICT)
class SearchConfig:
    """How the settings of trials are chosen."""

    name: Literal["random", "grid", "optuna"] = "random"
    """random; grid: every combination of a space of choices and steps; optuna: its tree-structured Parzen estimator."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of random and optuna; optuna also depends on the order in which trials end."""
    startup_trials: Count = 10
    """optuna: number of random trials before the estimator is used."""


@dataclass(frozen=True, config=STRICT)
class SweepConfig:
    """A sweep: runs of one base configuration with different settings."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "sweep"
    """Name of the sweep and of its folder; by default the name of the sweep file."""
    storage: PathOrUri = "runs"
    """Where the sweep's folder is, as for a run; it contains the run folders of the trials."""
    base: str = ""
    """The configuration file that every trial starts from, relative to the sweep file; empty: the defaults."""
    metric: Literal["val/top1", "val/top5", "val/loss", "train/top1", "train/loss"] = "val/top1"
    """Trials are compared by this metric, each at its best epoch."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether the highest or the lowest value is best; auto: min for a loss, max for an accuracy."""
    trials: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Number of trials; null: 16, or all combinations of a grid."""
    max_hours: Positive | None = None
    """The sweep and its running trials are stopped after this time, resumes included; null: no limit."""
    max_gpu_hours: Positive | None = None
    """The same for GPU hours of all trials together (hours of CPU workers on a cluster without GPUs)."""
    concurrent: Count | Literal["auto"] = "auto"
    """Maximum number of trials at a time; auto: as many as the cluster has room for."""
    workers: Workers = 1
    """DDP workers per trial; one trains in the trial's own process, several are started by Ray Train."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """auto: 1 if the cluster has GPUs; a fraction lets trials of one worker share a GPU; 0: train on CPUs."""
    cpus_per_worker: Count | Literal["auto"] = "auto"
    """CPU cores and torch threads per worker; auto: one."""
    max_failures: Index = 1
    """How often a crashed trial is restarted from its last checkpoint; NaN and wrong settings are not retried."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """Which trials are stopped early."""
    search: SearchConfig = SearchConfig()
    """How the settings of trials are chosen."""

    @property
    def maximise(self) -> bool:
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


def conflicts(sweep: SweepConfig) -> Iterator[str]:
    """Yield problems of settings that are each valid alone but not together."""
    gpus = sweep.gpus_per_worker
    if gpus != "auto" and gpus not in (0, 1) and (gpus > 1 or sweep.workers > 1):
        yield f"gpus_per_worker: {gpus:g}; a worker uses 0 or 1, and only trials of one worker can share a GPU"

"""Every setting of a sweep file but the space: a field of a frozen dataclass, as in `densenet_dist.schema`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from densenet_dist.schema import STRICT, Count, Index, Place, Positive, Workers


@dataclass(frozen=True, config=STRICT)
class SchedulerConfig:
    """Which trials go on."""

    name: Literal["fifo", "asha", "median", "pbt"] = "asha"
    """fifo: all to their end; asha: successive halving (Li et al. 2018, arXiv:1810.05934); median: those above the
    median of the others; pbt: population based training (Jaderberg et al. 2017, arXiv:1711.09846)."""
    grace_epochs: Count = 1
    """asha, median: epochs that every trial gets."""
    reduction_factor: Annotated[int, Field(ge=2, le=10**9)] = 3
    """asha: one of so many goes on from each rung; rungs are this factor apart in epochs."""
    min_trials: Count = 3
    """median: how many must have come as far before any is stopped."""
    perturb_epochs: Count = 2
    """pbt: epochs between two hand-overs."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """pbt: this share of the worst takes over the weights and settings of as many of the best."""
    resample_probability: Annotated[float, Field(ge=0, le=1)] = 0.25
    """pbt: how often a setting is drawn anew rather than changed by a factor of 0.8 or 1.2, or to a neighbour."""


@dataclass(frozen=True, config=STRICT)
class SearchConfig:
    """What is tried next."""

    name: Literal["random", "grid", "optuna"] = "random"
    """random; grid: every combination of a space of choices and steps; optuna: its tree-structured Parzen estimator."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes what random and optuna draw; optuna also learns from trials in the order in which they end."""
    startup_trials: Count = 10
    """optuna: drawn at random before the estimator begins."""


@dataclass(frozen=True, config=STRICT)
class SweepConfig:
    """A sweep: many runs of one base configuration, each with other settings."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "sweep"
    """The sweep's name, and its folder's; by default the sweep file's name."""
    storage: Place = "runs"
    """Where the sweep's folder is, as for a run; its trials' run folders are in it."""
    base: str = ""
    """The configuration file that every trial starts from, relative to the sweep file; empty: the defaults."""
    metric: Literal["val/top1", "val/top5", "val/loss", "train/top1", "train/loss"] = "val/top1"
    """What is best, at a trial's best epoch."""
    mode: Literal["auto", "max", "min"] = "auto"
    """max or min; auto: the lowest loss, the highest accuracy."""
    trials: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """How many; null: 16, or all of a grid."""
    max_hours: Positive | None = None
    """The sweep ends after this time, whatever is running then is stopped; null: no limit."""
    max_gpu_hours: Positive | None = None
    """The same for GPU hours of all trials together (of CPU workers on a cluster without GPUs)."""
    concurrent: Count | Literal["auto"] = "auto"
    """Most trials at a time; auto: as many as the cluster has room for."""
    workers: Workers = 1
    """DDP workers a trial; one trains in the trial's own process, more are started by Ray Train."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """auto: one where the cluster has GPUs; a fraction lets trials of one worker share a GPU; 0: train on CPUs."""
    cpus_per_worker: Count | Literal["auto"] = "auto"
    """CPU cores, and so torch threads, a worker; auto: one."""
    max_failures: Index = 1
    """How often a trial is started again from its last checkpoint after a crash; NaN and wrong settings are final."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """Which trials go on."""
    search: SearchConfig = SearchConfig()
    """What is tried next."""

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
    """Combinations that are each legal alone but cannot work together."""
    gpus = sweep.gpus_per_worker
    if gpus != "auto" and gpus not in (0, 1) and (gpus > 1 or sweep.workers > 1):
        yield f"gpus_per_worker: {gpus:g}; a worker uses 0 or 1, and only trials of one worker can share a GPU"
    if sweep.scheduler.name == "pbt" and sweep.search.name != "random":
        yield f"search.name: {sweep.search.name}; pbt finds its own settings from random ones, set search.name=random"
    if sweep.scheduler.name == "pbt" and sweep.trials is not None and sweep.trials < 2:
        yield "trials: pbt needs a population of at least 2"

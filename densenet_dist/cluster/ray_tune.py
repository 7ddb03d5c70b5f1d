"""Run the trials of a sweep with Ray Tune: their resources and names, the searcher and the scheduler. Imports Ray."""

from __future__ import annotations

import logging
import os
import random
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray import tune
from ray.tune import schedulers
from ray.tune.search.basic_variant import BasicVariantGenerator

from densenet_dist import custom
from densenet_dist.cluster.coordinator import explain_crash, on_this_node
from densenet_dist.cluster.resources import TrialCapacity, plan_trials, shortage
from densenet_dist.cluster.signals import handled_by
from densenet_dist.cluster.sweep import SweepRecord
from densenet_dist.cluster.trial import TrialRunner
from densenet_dist.cluster.tune_hooks import SweepState, TuneHooks
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.lease import Lease
from densenet_dist.run_folder import join_location
from densenet_dist.sweep import space as spaces
from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.results import TRIAL_PREFIX, Trial
from densenet_dist.train.context import Event
from densenet_dist.yaml_settings import merge, nest


def run_trials(sweep: Sweep, record: SweepRecord, lease: Lease, is_private: bool) -> str | None:
    """Run the trials of a sweep that have not ended, and update its record; stop if the lease is lost.

    Interrupted trials are resumed; the scheduler and the searcher are told what was achieved before.

    Args:
        sweep: what is searched, its paths absolute.
        record: its record.
        lease: of its folder.
        is_private: whether the connected cluster is private, and so cannot grow.

    Returns:
        Which limit ended the sweep; None if all trials ended.

    Raises:
        EnvironmentProblem: the cluster lacks the resources of a trial, or failed.
        StorageError: another job has taken the folder over.
        DenseNetDistError: a trial's error that all others would run into as well.
        KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP, once all resources are released.
    """
    capacity = _plan_capacity(sweep, is_private, record.listener)
    state = on_this_node(SweepState).remote()
    hooks = TuneHooks(sweep.settings.max_hours, record, state)
    tuner = _make_tuner(sweep, record.trials, capacity, lease, hooks, state)
    for name in ("ray.tune", "ray.train", "ray._private"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters is in the events
    lease.when_lost(hooks.stop)
    with handled_by(hooks.on_signal):
        try:
            tuner.fit()
        except (tune.TuneError, ray.exceptions.RayError) as error:
            raise EnvironmentProblem(
                f"the cluster failed during the sweep: {explain_crash(error, 'the sweep')}\n"
                "  resume it when the cluster is back: densenet-dist tune --resume "
                f"{shlex.quote(sweep.folder)}{custom.trust_option()}"
            ) from error
        finally:
            lease.when_lost(lambda: None)  # a call to the actor after the end would start a new cluster
            ray.kill(state)  # Tune keeps a reference to it
    lease.check()
    if hooks.fatal is not None:
        raise hooks.fatal
    if hooks.ended_by is None and (hooks.signals or hooks.running):
        raise KeyboardInterrupt(*hooks.signals[:1])
    return hooks.ended_by


def _plan_capacity(sweep: Sweep, is_private: bool, listener: Callable[[Event], None]) -> TrialCapacity:
    """Choose the resources of trials, once the cluster has room for one; report what they wait for."""
    settings, cluster = sweep.settings, sweep.config("base", {}).cluster
    capacity = plan_trials(settings, cluster, sweep.trials, _nodes(), fixed=is_private)
    if capacity.missing:
        listener({"kind": "note", "text": f"waiting up to {cluster.timeout_s:g} s for the cluster: {capacity.missing}"})
        _wait_for_room(capacity, settings.workers, cluster.timeout_s)
        capacity = plan_trials(settings, cluster, sweep.trials, _nodes(), fixed=False)
    if not is_private and (problem := shortage(settings.workers, capacity.per_worker)):
        listener({"kind": "note", "text": f"trials wait until there is room: {problem}"})
    elif isinstance(settings.concurrent, int) and capacity.concurrent < min(settings.concurrent, sweep.trials):
        text = f"at most {capacity.concurrent} trials run at a time: the cluster has room for no more"
        listener({"kind": "note", "text": text})
    return capacity


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _wait_for_room(capacity: TrialCapacity, workers: int, timeout_s: float) -> None:
    """Request the resources of one trial, so that an autoscaler adds nodes, and wait for them."""
    wanted = ray.util.placement_group([dict(capacity.per_worker)] * workers, strategy="PACK")
    try:
        if not wanted.wait(timeout_s):
            raise EnvironmentProblem(
                f"no room for a trial after {timeout_s:g} s: {capacity.missing}\n"
                "  ask for less with workers, gpus_per_worker or cpus_per_worker, or wait longer with cluster.timeout_s"
            )
    finally:
        ray.util.remove_placement_group(wanted)


def _make_tuner(
    sweep: Sweep, recorded: Sequence[Trial], capacity: TrialCapacity, lease: Lease, hooks: TuneHooks, state: Any
) -> tune.Tuner:
    settings = sweep.settings
    ended = sum(trial.status != "interrupted" for trial in recorded)
    base = nest(sweep.base)
    merge(base, nest(capacity.settings))
    parts = custom.export_parts(name for _, name in sweep.custom_parts())
    parameters = {"sweep": replace(sweep, base=base), "state": state, "held": lease.held, "parts": parts}
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(TrialRunner, **parameters), capacity.per_trial),
        # The values come from the points, but Tune requires their keys here; Optuna's searcher has its own space.
        param_space=dict.fromkeys(sweep.space) if settings.search.name != "optuna" else {},
        tune_config=tune.TuneConfig(
            scheduler=make_scheduler(sweep, recorded),
            search_alg=make_searcher(sweep, recorded, capacity.concurrent),
            num_samples=max(sweep.trials, len(recorded)) - ended,
            max_concurrent_trials=capacity.concurrent if settings.search.name == "optuna" else None,
            reuse_actors=True,
            trial_name_creator=_name_trials(recorded),
            trial_dirname_creator=str,
        ),
        run_config=tune.RunConfig(
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=join_location(sweep.folder, "ray"),
            stop=hooks,
            verbose=0,
            callbacks=[hooks],
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
            # Trials save to their run folders; Tune would call `save_checkpoint`, which they do not have.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )


def _name_trials(recorded: Sequence[Trial]) -> Callable[[Any], str]:
    """Return a function that names Tune's trials: first those that are resumed (see `points_to_try`), then new ones."""
    resumed = [trial.name for trial in recorded if trial.status == "interrupted"]
    last = max((int(trial.name.removeprefix(TRIAL_PREFIX)) for trial in recorded), default=-1)

    def name(trial: Any) -> str:
        nonlocal last
        if resumed:
            return resumed.pop(0)
        last += 1
        return f"{TRIAL_PREFIX}{last:03d}"

    return name  # Tune copies its arguments for every trial, but not functions: all trials share one counter


def points_to_try(sweep: Sweep, recorded: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return the settings of the trials to run, as far as they are known beforehand: first those of resumed trials."""
    settings = sweep.settings
    resumed = [trial.overrides for trial in recorded if trial.status == "interrupted"]
    if settings.search.name == "optuna":
        return resumed
    if settings.search.name == "grid":
        drawn = list(spaces.grid(sweep.space))
    else:
        drawn = spaces.samples(sweep.space, random.Random(settings.search.seed), sweep.trials)
    for trial in recorded:
        if trial.overrides in drawn:
            drawn.remove(trial.overrides)
    return resumed + drawn[: max(0, sweep.trials - len(recorded))]


def make_searcher(sweep: Sweep, recorded: Sequence[Trial], concurrent: int) -> Any:
    """Return Tune's search algorithm, which begins with `points_to_try`; Optuna also learns from trials that ended."""
    points = [spaces.encode(point) for point in points_to_try(sweep, recorded)]
    search = sweep.settings.search
    if search.name != "optuna":
        return BasicVariantGenerator(points_to_evaluate=points, max_concurrent=concurrent)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Use another seed than before; otherwise the random trials of a resumed sweep would repeat the first ones.
    seed = (search.seed + len(recorded)) % 2**32
    searcher = OptunaSearch(
        space={key: domain.distribution() for key, domain in sweep.space.items()},
        metric=sweep.settings.metric,
        mode="max" if sweep.settings.maximize else "min",
        points_to_evaluate=points or None,
        sampler=optuna.samplers.TPESampler(n_startup_trials=search.startup_trials, seed=seed),
    )
    for trial in recorded:
        if trial.status != "interrupted" and trial.history:
            searcher.add_evaluated_point(spaces.encode(trial.overrides), trial.history[max(trial.history)])
    return searcher


class _PastTrial(str):
    """Stands in for a Tune trial: the name of a trial that ended before this start of the sweep."""

    @property
    def trial_id(self) -> str:
        """Its key in the records of a scheduler."""
        return str(self)


class _ReplaysHistory(schedulers.FIFOScheduler):  # type: ignore[misc]  # Ray's classes are untyped
    """Replays a trial's recorded values when the trial is added, since a resumed trial is a new one to Tune."""

    past: dict[str, dict[int, float]]  # by name and epoch

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        for epoch, value in self.past.pop(str(trial), {}).items():
            super().on_trial_add(controller, trial)
            # `on_trial_complete` records a value without deciding whether to stop the trial. ASHA then forgets the
            # trial, so it is added again.
            super().on_trial_complete(controller, trial, {"epoch": epoch, self._metric: value})
        super().on_trial_add(controller, trial)


class _Asha(_ReplaysHistory, schedulers.AsyncHyperBandScheduler):  # type: ignore[misc]
    """Successive halving."""


class _Median(_ReplaysHistory, schedulers.MedianStoppingRule):  # type: ignore[misc]
    """Median stopping that never pauses trials, which needs Tune's checkpoints, and ignores trials without an epoch."""

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if self._metric in result:
            super().on_trial_complete(controller, trial, result)

    def _on_insufficient_samples(self, controller: Any, trial: Any, time: float) -> Any:
        return self.CONTINUE


def make_scheduler(sweep: Sweep, recorded: Sequence[Trial]) -> Any:
    """Return Tune's scheduler; ASHA and median stopping know what recorded trials achieved."""
    settings, searched = sweep.settings, sweep.space.get("train.epochs")
    wanted = settings.scheduler
    if wanted.name == "fifo":
        return schedulers.FIFOScheduler()
    measured = {"time_attr": "epoch", "metric": settings.metric, "mode": "max" if settings.maximize else "min"}
    scheduler: _ReplaysHistory
    if wanted.name == "median":
        scheduler = _Median(**measured, grace_period=wanted.grace_epochs, min_samples_required=wanted.min_trials)
    else:
        epochs = int(max(searched.ends)) if searched else int(sweep.base["train"]["epochs"])
        scheduler = _Asha(
            **measured,
            # The last epoch must not be a rung: to stop a trial there would only skip its test.
            max_t=max(epochs, wanted.grace_epochs + 1),
            grace_period=wanted.grace_epochs,
            reduction_factor=wanted.reduction_factor,
        )
    scheduler.past = {trial.name: trial.history for trial in recorded}
    for trial in recorded:
        if trial.status != "interrupted":
            scheduler.on_trial_add(None, _PastTrial(trial.name))
    return scheduler

"""The only door to Ray Tune: a sweep's schedulers, searchers and trials, on a cluster that has room for them."""

from __future__ import annotations

import logging
import os
import random
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from densenet_dist.cluster.connection import connected
from densenet_dist.cluster.failures import explain
from densenet_dist.cluster.resources import TrialRoom, plan_trials, shortage
from densenet_dist.cluster.signals import handled_by
from densenet_dist.config import load_config
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.run_folder import join_location
from densenet_dist.schema import ClusterConfig
from densenet_dist.sweep import space as spaces
from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.results import Trial
from densenet_dist.sweep.space import Choice, Domain
from densenet_dist.train.context import Event

TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials have records of their own
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may fail before its first epoch
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run_trials(sweep: Sweep, recorded: Sequence[Trial], listener: Callable[[Event], None]) -> str | None:
    """Run what is left of a sweep.

    Args:
        sweep: what is searched, its paths absolute.
        recorded: trials of before, by their names; those that did not end go on.
        listener: called with ``trial`` and ``note`` events.

    Returns:
        Why the sweep ended before all its trials had, where a budget did it.

    Raises:
        EnvironmentProblem: where the cluster has not what a trial needs.
        DenseNetDistError: what made a trial fail, where all others would fail as well.
        KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP, once all is given back.
    """
    for key, value in TUNE_ENV.items():
        os.environ.setdefault(key, value)
    cluster = load_config(sweep.base).cluster
    with connected(cluster) as own_cluster:
        room = plan_trials(sweep.settings, cluster, sweep.trials, _nodes(), fixed=own_cluster)
        if room.missing:
            room = _wait_for_room(sweep, cluster, room, listener)
        if not own_cluster and (problem := shortage(sweep.settings.workers, room.per_worker)):
            listener({"kind": "note", "text": f"trials wait until there is room: {problem}"})
        elif isinstance(wanted := sweep.settings.concurrent, int) and room.concurrent < min(wanted, sweep.trials):
            text = f"{room.concurrent} trials run at a time, not {wanted}: the cluster has room for no more"
            listener({"kind": "note", "text": text})
        return _run(sweep, recorded, room, listener)


def _nodes() -> list[dict[str, float]]:
    from ray._private import state

    return list(state.total_resources_per_node().values())


def _wait_for_room(
    sweep: Sweep, cluster: ClusterConfig, room: TrialRoom, listener: Callable[[Event], None]
) -> TrialRoom:
    """Request the room of one trial, so that a cluster that can grow does, and wait for it."""
    import ray

    listener({"kind": "note", "text": f"waiting up to {cluster.timeout_s:g} s for the cluster: {room.missing}"})
    wanted = ray.util.placement_group([dict(room.per_worker)] * sweep.settings.workers, strategy="PACK")
    try:
        if not wanted.wait(cluster.timeout_s):
            raise EnvironmentProblem(
                f"no room for a trial after {cluster.timeout_s:g} s: {room.missing}\n"
                "  ask for less with workers, gpus_per_worker or cpus_per_worker, or wait longer with cluster.timeout_s"
            )
        return plan_trials(sweep.settings, cluster, sweep.trials, _nodes(), fixed=False)
    finally:
        ray.util.remove_placement_group(wanted)


def _run(sweep: Sweep, recorded: Sequence[Trial], room: TrialRoom, listener: Callable[[Event], None]) -> str | None:
    import ray
    from ray import tune

    from densenet_dist.cluster.trial import TrialPlan, TrialRunner
    from densenet_dist.cluster.tune_events import Ending, Names, SweepState, Watcher

    settings = sweep.settings
    state = ray.remote(num_cpus=0, max_restarts=-1)(SweepState).remote()
    plan = TrialPlan(sweep, room.settings, room.threads, settings.scheduler.name != "pbt", state)
    watcher, names = Watcher(settings.metric, listener, state), Names(recorded)
    ending = Ending(settings, room.gpus_per_trial, watcher, state)
    points = _points(sweep, recorded)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(TrialRunner, plan=plan), room.per_trial),
        param_space={} if settings.search.name == "optuna" else _first_values(points),
        tune_config=tune.TuneConfig(
            metric=settings.metric,
            mode="max" if settings.maximise else "min",
            scheduler=_scheduler(sweep),
            search_alg=_searcher(sweep, points, room.concurrent),
            num_samples=max(sweep.trials, len(recorded)),
            max_concurrent_trials=room.concurrent if settings.search.name == "optuna" else None,
            reuse_actors=True,
            trial_name_creator=names,
            trial_dirname_creator=str,
        ),
        run_config=tune.RunConfig(
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=join_location(sweep.folder, "ray"),
            stop=ending,
            verbose=0,
            callbacks=[watcher],
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
            # Tune's default would copy every trial's last checkpoint, and fail on one that had none.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    for name in ("ray.tune", "ray.train", "ray._private"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters is in the events
    with handled_by(ending.hear):
        try:
            tuner.fit()
        except (tune.TuneError, ray.exceptions.RayError) as error:
            raise EnvironmentProblem(
                f"the cluster failed the sweep: {explain(error, 'the sweep')}\n"
                f"  go on with it when the cluster is back: densenet-dist tune --resume {shlex.quote(sweep.folder)}"
            ) from error
        finally:
            ray.kill(state)  # what Tune has kept of the plan holds on to it
    if watcher.fatal is not None:
        raise watcher.fatal
    if ending.spent is None and (ending.signals or watcher.interrupted):
        raise KeyboardInterrupt(*ending.signals[:1])
    return ending.spent


def _points(sweep: Sweep, recorded: Sequence[Trial]) -> list[dict[str, Any]]:
    """What is tried, as far as that is known beforehand: first what was tried before, in its order."""
    settings = sweep.settings
    before = [trial.overrides for trial in recorded if trial.overrides]
    if settings.search.name == "optuna":
        return before
    if settings.search.name == "grid":
        drawn = list(spaces.grid(sweep.space))
    else:
        drawn = spaces.samples(sweep.space, random.Random(settings.search.seed), sweep.trials)
    if settings.scheduler.name == "pbt":  # settings have changed on the way
        return before + drawn[len(before) :]
    for point in before:
        if point in drawn:
            drawn.remove(point)
    return before + drawn[: max(0, sweep.trials - len(before))]


def _first_values(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # Every trial's values come from the points; Tune wants to see the keys.
    from ray import tune

    keys = {key for point in points for key in point}
    return {key: tune.choice([spaces.encode_value(point[key]) for point in points]) for key in sorted(keys)}


def _searcher(sweep: Sweep, points: Sequence[Mapping[str, Any]], concurrent: int) -> Any:
    encoded = [spaces.encode(point) for point in points]
    search = sweep.settings.search
    if search.name != "optuna":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        # A population is alive together; where it has no room, Tune lets its trials take turns.
        together = sweep.settings.scheduler.name == "pbt"
        return BasicVariantGenerator(points_to_evaluate=encoded, max_concurrent=0 if together else concurrent)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(n_startup_trials=search.startup_trials, seed=search.seed)
    return OptunaSearch(
        space={key: domain.distribution() for key, domain in sweep.space.items()},
        metric=sweep.settings.metric,
        mode="max" if sweep.settings.maximise else "min",
        points_to_evaluate=encoded or None,
        sampler=sampler,
    )


def _scheduler(sweep: Sweep) -> Any:
    from ray.tune import schedulers

    wanted, searched = sweep.settings.scheduler, sweep.space.get("train.epochs")
    epochs = int(max(searched.ends)) if searched else int(sweep.base["train"]["epochs"])
    if wanted.name == "asha":
        # The last epoch is never a rung: there is nothing left to save.
        return schedulers.AsyncHyperBandScheduler(
            time_attr="epoch",
            max_t=max(epochs, wanted.grace_epochs + 1),
            grace_period=wanted.grace_epochs,
            reduction_factor=wanted.reduction_factor,
        )
    if wanted.name == "median":
        return schedulers.MedianStoppingRule(
            time_attr="epoch", grace_period=wanted.grace_epochs, min_samples_required=wanted.min_trials
        )
    if wanted.name == "pbt":
        return schedulers.PopulationBasedTraining(
            time_attr="epoch",
            perturbation_interval=wanted.perturb_epochs,
            hyperparam_mutations=_mutations(sweep),
            quantile_fraction=wanted.quantile,
            resample_probability=wanted.resample_probability,
            custom_explore_fn=partial(_into_space, sweep.space),
            log_config=False,
        )
    return schedulers.FIFOScheduler()


def _mutations(sweep: Sweep) -> dict[str, Any]:
    rng = random.Random(sweep.settings.search.seed)
    return {
        key: [spaces.encode_value(value) for value in domain.values]
        if isinstance(domain, Choice)
        else partial(domain.sample, rng)
        for key, domain in sweep.space.items()
    }


def _into_space(space: Mapping[str, Domain], config: dict[str, Any]) -> dict[str, Any]:
    # A factor of 0.8 or 1.2 knows no limits.
    return {
        key: value if isinstance(space[key], Choice) else space[key].clip(value)  # type: ignore[union-attr]
        for key, value in config.items()
    }

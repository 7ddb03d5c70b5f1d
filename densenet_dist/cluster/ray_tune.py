"""Run the trials of a sweep with Ray Tune: its schedulers and searchers, and the resources of a trial."""

from __future__ import annotations

import logging
import os
import random
import shlex
import time
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from densenet_dist.cluster.connection import connected
from densenet_dist.cluster.coordinator import explain_crash, on_this_node
from densenet_dist.cluster.resources import TrialRoom, plan_trials, shortage
from densenet_dist.cluster.signals import handled_by
from densenet_dist.config import load_config
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.lease import Lease
from densenet_dist.run_folder import join_location
from densenet_dist.schema import ClusterConfig
from densenet_dist.sweep import space as spaces
from densenet_dist.sweep.definition import Sweep
from densenet_dist.sweep.results import Trial, Usage
from densenet_dist.train.context import Event

TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials have records of their own
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may fail before its first epoch
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}

_PastTrial = namedtuple("_PastTrial", "trial_id")
"""What schedulers need to know of a trial, as a key of their dictionaries."""


def run_trials(
    sweep: Sweep, recorded: Sequence[Trial], usage: Usage, lease: Lease, listener: Callable[[Event], None]
) -> str | None:
    """Run the trials of a sweep that have not ended.

    Args:
        sweep: what is searched, its paths absolute.
        recorded: trials from before, ordered by name. Interrupted ones are resumed; what the others achieved is passed
            to the scheduler and the searcher.
        usage: time that the sweep has used so far; updated in place.
        lease: of the sweep's folder; the sweep stops if it is lost.
        listener: called with ``trial`` and ``note`` events.

    Returns:
        Which budget ended the sweep; None if all trials ended.

    Raises:
        EnvironmentProblem: the cluster lacks the resources of a trial.
        StorageError: another job has taken the folder over.
        DenseNetDistError: a trial's error that all others would run into as well.
        KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP, once all resources are released.
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
        return _run(sweep, recorded, usage, room, lease, listener)


def _nodes() -> list[dict[str, float]]:
    from ray._private import state

    return list(state.total_resources_per_node().values())


def _wait_for_room(
    sweep: Sweep, cluster: ClusterConfig, room: TrialRoom, listener: Callable[[Event], None]
) -> TrialRoom:
    """Request the resources of one trial, so that an autoscaler adds nodes, and wait for them."""
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


def _run(
    sweep: Sweep,
    recorded: Sequence[Trial],
    usage: Usage,
    room: TrialRoom,
    lease: Lease,
    listener: Callable[[Event], None],
) -> str | None:
    import ray
    from ray import tune

    from densenet_dist.cluster.trial import TrialRunner
    from densenet_dist.cluster.tune_events import SweepState, SweepStopper, TrialEvents, TrialNames

    settings = sweep.settings
    state = on_this_node(SweepState).remote()
    events = TrialEvents(listener, state)
    stopper = SweepStopper(settings, usage, room.gpus_per_trial, events, state)
    points = points_to_try(sweep, recorded)
    ended = [trial for trial in recorded if trial.status != "interrupted"]
    resumed = len(recorded) - len(ended)
    parameters = {"sweep": sweep, "cluster": room.settings, "state": state, "held": lease.held}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(TrialRunner, **parameters), room.per_trial),
        # The values come from the points, but Tune requires their keys here; Optuna's searcher has its own space.
        param_space=dict.fromkeys(sweep.space) if settings.search.name != "optuna" else {},
        tune_config=tune.TuneConfig(
            scheduler=make_scheduler(sweep, ended),
            search_alg=make_searcher(sweep, ended, points, room.concurrent),
            num_samples=resumed + max(0, sweep.trials - len(recorded)),
            max_concurrent_trials=room.concurrent if settings.search.name == "optuna" else None,
            reuse_actors=True,
            trial_name_creator=TrialNames(recorded),
            trial_dirname_creator=str,
        ),
        run_config=tune.RunConfig(
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            storage_path=join_location(sweep.folder, "ray"),
            stop=stopper,
            verbose=0,
            callbacks=[events],
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
            # Trials save to their run folders; Tune would call `save_checkpoint`, which they do not have.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    for name in ("ray.tune", "ray.train", "ray._private"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters is in the events
    lease.when_lost(stopper.stop)
    with handled_by(stopper.on_signal):
        try:
            tuner.fit()
        except (tune.TuneError, ray.exceptions.RayError) as error:
            raise EnvironmentProblem(
                f"the cluster failed during the sweep: {explain_crash(error, 'the sweep')}\n"
                f"  resume it when the cluster is back: densenet-dist tune --resume {shlex.quote(sweep.folder)}"
            ) from error
        finally:
            ray.kill(state)  # Tune keeps a reference to it
    lease.check()
    if events.fatal is not None:
        raise events.fatal
    if stopper.spent is None and (stopper.signals or events.running):
        raise KeyboardInterrupt(*stopper.signals[:1])
    return stopper.spent


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


def make_searcher(sweep: Sweep, ended: Sequence[Trial], points: Sequence[Mapping[str, Any]], concurrent: int) -> Any:
    """Return Tune's search algorithm.

    Args:
        sweep: what is searched.
        ended: trials that Optuna learns from.
        points: settings to try first.
        concurrent: most trials at a time.
    """
    encoded = [spaces.encode(point) for point in points]
    search = sweep.settings.search
    if search.name != "optuna":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(points_to_evaluate=encoded, max_concurrent=concurrent)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Use another seed than before; otherwise the random trials of a resumed sweep would repeat the first ones.
    seed = (search.seed + len(ended) + len(points)) % 2**32
    searcher = OptunaSearch(
        space={key: domain.distribution() for key, domain in sweep.space.items()},
        metric=sweep.settings.metric,
        mode="max" if sweep.settings.maximise else "min",
        points_to_evaluate=encoded or None,
        sampler=optuna.samplers.TPESampler(n_startup_trials=search.startup_trials, seed=seed),
    )
    for trial in ended:
        if trial.history and spaces.contains(sweep.space, trial.overrides):
            searcher.add_evaluated_point(spaces.encode(trial.overrides), trial.history[max(trial.history)])
    return searcher


def make_scheduler(sweep: Sweep, ended: Sequence[Trial]) -> Any:
    """Return Tune's scheduler; ASHA and median stopping compare new trials with those that ended before, too."""
    from ray.tune import schedulers

    settings, searched = sweep.settings, sweep.space.get("train.epochs")
    wanted = settings.scheduler
    measured = {"time_attr": "epoch", "metric": settings.metric, "mode": "max" if settings.maximise else "min"}
    scheduler = schedulers.FIFOScheduler()
    if wanted.name == "asha":
        epochs = int(max(searched.ends)) if searched else int(sweep.base["train"]["epochs"])
        # The last epoch must not be a rung: stopping there would save nothing but the test.
        scheduler = schedulers.AsyncHyperBandScheduler(
            **measured,
            max_t=max(epochs, wanted.grace_epochs + 1),
            grace_period=wanted.grace_epochs,
            reduction_factor=wanted.reduction_factor,
        )
    elif wanted.name == "median":

        class Median(schedulers.MedianStoppingRule):  # type: ignore[misc]
            """Without pauses, which need Tune's checkpoints, and without trials that ended before an epoch."""

            def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
                if settings.metric in result:
                    super().on_trial_complete(controller, trial, result)

            def _on_insufficient_samples(self, controller: Any, trial: Any, time: float) -> Any:
                return self.CONTINUE

        scheduler = Median(**measured, grace_period=wanted.grace_epochs, min_samples_required=wanted.min_trials)
    for trial in ended:
        past = _PastTrial(trial.name)
        for epoch, value in trial.history.items():
            # `on_trial_complete` records the value without deciding whether to stop a trial.
            scheduler.on_trial_add(None, past)
            scheduler.on_trial_complete(None, past, {"epoch": epoch, settings.metric: value})
    return scheduler

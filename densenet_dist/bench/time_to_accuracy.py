"""``densenet-dist bench time-to-accuracy``: seconds of training to a test accuracy, over several seeds.

The clock is that of CIFAR speed records (Coleman et al. 2017, DAWNBench; Jordan 2024, arXiv:2404.00498): it runs from
the first batch's request to the end of each epoch's last step on the device, augmentation included. It stands still
while test images are judged, and before training: loading data into memory, building the net, and a warm-up on a net
that is thrown away, so that kernels are compiled and chosen. Capturing a CUDA graph of the net itself is inside it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from densenet_dist.cluster.launch import prepare_data
from densenet_dist.config import to_dict
from densenet_dist.errors import ConfigError
from densenet_dist.report.groups import interval
from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import Config
from densenet_dist.train.building import build_job
from densenet_dist.train.context import LocalContext, choose_device
from densenet_dist.train.engine import evaluate_model, train_epoch
from densenet_dist.train.environment import describe_environment
from densenet_dist.train.inputs import engine_of, eval_loader
from densenet_dist.train.job import Job
from densenet_dist.train.keeping import decide
from densenet_dist.yaml_settings import flatten

_ELSEWHERE: Final = ("name", "storage", "seed", "cluster.", "fault.", "checkpoint.", "data.root", "data.url")
"""Settings that do not matter here."""
_WARM_UP_STEPS: Final = 6


def time_to_accuracy(
    config: Config,
    *,
    targets: Sequence[float],
    seeds: int,
    before: dict[str, Any] | None = None,
    limit_s: float | None = None,
    listener: Callable[[dict[str, Any], dict[str, Any] | None], None] = lambda found, epoch: None,
) -> dict[str, Any]:
    """Train with seeds ``config.seed``, ``+ 1``, ... on one device, and judge all test images after every epoch.

    Args:
        config: what is trained; ``train.epochs`` is the whole course.
        targets: test top-1, 0 to 1.
        seeds: how many.
        before: an earlier outcome of the same configuration: its seeds are not trained again.
        limit_s: begin no seed that would not end within so many seconds from now, by the time that others took.
        listener: called with the outcome so far and the epoch just judged (None after a seed's last one).

    Returns:
        Plain values: ``runs`` with each seed's epochs (``seconds`` of training so far, ``train/loss``, ``test/loss``,
        ``test/top1``, ``test/top5``), ``summary`` over seeds, configuration and environment.

    Raises:
        ConfigError: where something is configured that a validation decides, or `before` is of something else.
        TrainingError: where a loss is not finite.
    """
    _require_fixed_course(config)
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=None))
    found = _outcome(config, targets) if before is None else _taken_up(before, config, targets)
    left = [config.seed + number for number in range(seeds)]
    left = [seed for seed in left if seed not in {run["seed"] for run in found["runs"]}]
    began, longest = time.perf_counter(), max((run["wall_s"] for run in found["runs"]), default=0.0)
    prepare_data(config)
    for number, seed in enumerate(left):
        spent = time.perf_counter() - began
        if limit_s is not None and longest and spent + 1.1 * longest > limit_s:
            break
        if number == 0:
            found["warm_up_s"] = _warm_up(config)
        started = time.perf_counter()
        run: dict[str, Any] = {"seed": seed, "commit": describe_environment()["git"], "epochs": []}
        for epoch in _epochs(replace(config, seed=seed)):
            run["epochs"].append(epoch)
            listener(found, {"seed": seed, **epoch})
        run["wall_s"] = round(time.perf_counter() - started, 3)
        longest = max(longest, run["wall_s"])
        found["runs"] = sorted([*found["runs"], run], key=lambda each: int(each["seed"]))
        found["summary"] = summary(found["runs"], targets)
        listener(found, None)
    return found


def summary(runs: Sequence[dict[str, Any]], targets: Sequence[float]) -> dict[str, Any]:
    """Means over seeds, each with half of its 95 % confidence interval (None for one seed).

    ``targets``: of each target how many seeds reached it, and ``seconds`` and ``epochs`` until the first epoch that
    did, over those; ``last``: time and test figures of the last epoch.
    """
    reached = []
    for target in targets:
        first = [next((epoch for epoch in run["epochs"] if epoch["test/top1"] >= target), None) for run in runs]
        hits = [epoch for epoch in first if epoch is not None]
        figures = {name: _mean([epoch[key] for epoch in hits]) for name, key in _OF_TARGET.items()} if hits else {}
        reached.append({"top1": target, "seeds": len(hits), "of": len(runs), **figures})
    last = [run["epochs"][-1] for run in runs]
    return {
        "targets": reached,
        "last": {key: _mean([epoch[key] for epoch in last]) for key in ("seconds", "test/top1", "test/top5")},
    }


_OF_TARGET: Final = {"seconds": "seconds", "epochs": "epoch"}


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    return interval(values)._asdict()


def _require_fixed_course(config: Config) -> None:
    for what, asked in (
        ("train.schedule.name=plateau", config.train.schedule.name == "plateau"),
        ("train.early_stopping.enabled=true", config.train.early_stopping.enabled),
    ):
        if asked:
            raise ConfigError(f"{what}: nothing is validated here; choose a course that is fixed beforehand")


def _outcome(config: Config, targets: Sequence[float]) -> dict[str, Any]:
    return {
        "config": _what_matters(config),
        "targets": list(targets),
        "runs": [],
        "summary": None,
        "warm_up_s": None,
        "environment": describe_environment(),
    }


def _what_matters(config: Config) -> dict[str, Any]:
    return {key: value for key, value in flatten(to_dict(config)).items() if not key.startswith(_ELSEWHERE)}


def _taken_up(before: dict[str, Any], config: Config, targets: Sequence[float]) -> dict[str, Any]:
    there, here = before["config"], _plain(_what_matters(config))
    changed = [f"{key}: {there.get(key)} there, {here.get(key)} here" for key in here if there.get(key) != here[key]]
    gpus = before["environment"]["gpus"], describe_environment()["gpus"]
    if gpus[0] != gpus[1]:
        changed.append(f"GPUs: {gpus[0]} there, {gpus[1]} here")
    if changed:
        raise ConfigError(
            "the file holds the outcome of something else:\n  " + "\n  ".join(changed) + "\n  choose another --out FILE"
        )
    return before | {"targets": list(targets), "summary": summary(before["runs"], targets) if before["runs"] else None}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _warm_up(config: Config) -> float:
    """Train and judge a few batches with a net that is thrown away; seconds that took."""
    few = config.train.global_batch_size * _WARM_UP_STEPS
    train = replace(config.train, epochs=1, schedule=replace(config.train.schedule, name="constant", warmup_epochs=0.0))
    limit = few if config.data.limit is None else min(few, config.data.limit)
    started = time.perf_counter()
    for _ in _epochs(replace(config, train=train, data=replace(config.data, limit=limit, val_fraction=0.0))):
        pass
    return round(time.perf_counter() - started, 3)


def _epochs(config: Config) -> Iterator[dict[str, Any]]:
    """Train; the figures of each epoch."""
    with tempfile.TemporaryDirectory() as folder:
        job = build_job(config, LocalContext(RunFolder(folder, "run"), choose_device(config.cluster.device)))
        try:
            seconds = 0.0
            for number in range(1, config.train.epochs + 1):
                started = _now(job)
                trained = train_epoch(job)
                seconds += _now(job) - started
                decide(job)
                job.end_epoch(None)
                judged = _judge(job)
                yield {
                    "epoch": number,
                    "seconds": round(seconds, 4),
                    "train/loss": trained["train/loss"],
                    **{f"test/{name}": judged[name] for name in ("loss", "top1", "top5")},
                }
        finally:
            job.close()


def _now(job: Job) -> float:
    if job.context.device.type == "cuda":
        torch.cuda.synchronize(job.context.device)
    return time.perf_counter()


def _judge(job: Job) -> dict[str, float]:
    test = job.dataset.test
    engine = engine_of(job.config, job.context.device, job.dataset, test, job.loader)
    batches = eval_loader(job.config, job.context, test, engine)
    return evaluate_model(job.eval_model, batches, job.context.device, job.config.train.precision)

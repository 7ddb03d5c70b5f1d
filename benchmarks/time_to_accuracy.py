"""Seconds of training to a test accuracy, over several seeds, on one device.

    python benchmarks/time_to_accuracy.py configs/cifar10_fast.yaml --targets 92.66 94 --seeds 5 --out fast.json \\
        --plot fast.png

The file is written after every seed; the same command again trains those that are missing there.

The clock is that of CIFAR speed records (Coleman et al. 2017, DAWNBench; Jordan 2024, arXiv:2404.00498): it runs from
the first batch's request to the end of each epoch's last step on the device, augmentation included. It stands still
while test images are evaluated, and before training: loading data into memory, building the net, and a warm-up on a net
that is thrown away, so that kernels are compiled and chosen. Capturing a CUDA graph of the net itself is inside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from measuring import print_table, write_json

from densenet_dist.cluster.launch import prepare_data
from densenet_dist.config import load_config, to_dict
from densenet_dist.data.datasets import train_size
from densenet_dist.environment import describe_environment
from densenet_dist.errors import ConfigError
from densenet_dist.report.comparison import interval
from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import Config
from densenet_dist.train.context import RunContext, choose_device
from densenet_dist.train.evaluation import evaluate_model
from densenet_dist.train.initial_weights import write_initial_weights
from densenet_dist.train.inputs import engine_of, eval_loader
from densenet_dist.train.loop import sync_requests, train_epoch
from densenet_dist.train.trainer import Trainer
from densenet_dist.yaml_settings import flatten

ELSEWHERE: Final = ("name", "storage", "seed", "cluster.", "fault.", "checkpoint.", "data.root", "data.url")
"""Settings that do not matter here."""
WARM_UP_STEPS: Final = 6


def time_to_accuracy(
    config: Config,
    *,
    targets: Sequence[float],
    seeds: int,
    before: dict[str, Any] | None = None,
    limit_s: float | None = None,
    listener: Callable[[dict[str, Any], dict[str, Any] | None], None] = lambda found, epoch: None,
) -> dict[str, Any]:
    """Train with seeds ``config.seed``, ``+ 1``, ... on one device, and evaluate the test images after every epoch.

    Args:
        config: what is trained; ``train.epochs`` is the whole schedule.
        targets: test top-1, 0 to 1.
        seeds: how many.
        before: an earlier outcome of the same configuration: its seeds are not trained again.
        limit_s: begin no seed that would not end within so many seconds from now, by the time that others took.
        listener: called with the outcome so far and the epoch just evaluated (None after a seed's last one).

    Returns:
        Plain values: ``runs`` with each seed's epochs (``seconds`` of training so far, ``train/loss``, ``test/loss``,
        ``test/top1``, ``test/top5``), ``summary`` over seeds, configuration and environment.

    Raises:
        ConfigError: where something is configured that a validation decides, or `before` is of something else.
        TrainingError: where a loss is not finite.
    """
    _require_fixed_schedule(config)
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
        figures = {name: _mean([epoch[key] for epoch in hits]) for name, key in OF_TARGET.items()} if hits else {}
        reached.append({"top1": target, "seeds": len(hits), "of": len(runs), **figures})
    last = [run["epochs"][-1] for run in runs]
    return {
        "targets": reached,
        "last": {key: _mean([epoch[key] for epoch in last]) for key in ("seconds", "test/top1", "test/top5")},
    }


OF_TARGET: Final = {"seconds": "seconds", "epochs": "epoch"}


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    return interval(values)._asdict()


def _require_fixed_schedule(config: Config) -> None:
    for what, asked in (
        ("train.schedule.name=plateau", config.train.schedule.name == "plateau"),
        ("train.early_stopping.enabled=true", config.train.early_stopping.enabled),
    ):
        if asked:
            raise ConfigError(f"{what}: nothing is validated here; choose a schedule that is fixed beforehand")


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
    return {key: value for key, value in flatten(to_dict(config)).items() if not key.startswith(ELSEWHERE)}


def _taken_up(before: dict[str, Any], config: Config, targets: Sequence[float]) -> dict[str, Any]:
    there, here = before["config"], _plain(_what_matters(config))
    there = _plain(_what_matters(load_config())) | there  # settings that an older version did not have
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
    """Train and evaluate a few batches with a net that is thrown away; seconds that took."""
    size, images = config.train.global_batch_size, train_size(config.data.name, config.data.limit) or 0
    few = size * WARM_UP_STEPS + (images - round(config.data.val_fraction * images)) % size  # an epoch's last batch too
    train = replace(config.train, epochs=1, schedule=replace(config.train.schedule, name="constant", warmup_epochs=0.0))
    limit = few if config.data.limit is None else min(few, config.data.limit)
    started = time.perf_counter()
    data = replace(config.data, limit=limit, test_limit=limit, val_fraction=0.0)
    for _ in _epochs(replace(config, train=train, data=data)):
        pass
    return round(time.perf_counter() - started, 3)


def _epochs(config: Config) -> Iterator[dict[str, Any]]:
    """Train; the figures of each epoch."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder, "run")
        if config.model.pretrained or config.model.weights:
            write_initial_weights(run, config)
        trainer = Trainer(config, RunContext(run, choose_device(config.cluster.device)))
        try:
            seconds = 0.0
            for number in range(1, config.train.epochs + 1):
                started = _now(trainer)
                trained = train_epoch(trainer)
                seconds += _now(trainer) - started
                sync_requests(trainer)
                trainer.end_epoch(None)
                tested = evaluate_test(trainer)
                yield {
                    "epoch": number,
                    "seconds": round(seconds, 4),
                    "train/loss": trained["train/loss"],
                    **{f"test/{name}": tested[name] for name in ("loss", "top1", "top5")},
                }
        finally:
            trainer.store.close()


def _now(trainer: Trainer) -> float:
    if trainer.context.device.type == "cuda":
        torch.cuda.synchronize(trainer.context.device)
    return time.perf_counter()


def evaluate_test(trainer: Trainer) -> dict[str, float]:
    test = trainer.dataset.test
    engine = engine_of(trainer.config, trainer.context.device, trainer.dataset, test, trainer.loader_name)
    batches = eval_loader(trainer.config, trainer.context, engine)
    return evaluate_model(trainer.eval_model, batches, trainer.context, trainer.config.train.precision)


def print_outcome(found: dict[str, Any]) -> None:
    """Print what `time_to_accuracy` found."""
    runs, environment = found["runs"], found["environment"]
    where = ", ".join(environment["gpus"]) or environment["cpu"]
    last = found["summary"]["last"]
    rows = []
    for target in found["summary"]["targets"]:
        figures = [spread(target[key]) if key in target else "-" for key in ("seconds", "epochs")]
        rows.append([f"{target['top1']:.2%}", f"{target['seeds']} of {target['of']}", *figures])
    config = found["config"]
    title = f"{config['model.variant']} on {config['data.name']}, {config['train.epochs']} epochs, {len(runs)} seeds"
    print_table(
        f"{title}; {where}",
        ["test top-1", "reached by", "seconds of training", "epochs"],
        rows,
        [
            f"at the end: {spread(last['test/top1'], 100)} % top-1, {spread(last['test/top5'], 100)} % top-5 after "
            f"{spread(last['seconds'])} s",
            "the clock stands still while test images are evaluated; +- is a 95 % confidence interval",
        ],
    )


def spread(value: dict[str, float | None], scale: float = 1.0) -> str:
    mean, half = value["mean"], value["half"]
    assert mean is not None
    return f"{mean * scale:.2f}" + ("" if half is None else f" +- {half * scale:.2f}")


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw each seed's test top-1 over seconds of training, and the targets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for run in found["runs"]:
        seconds, top1 = zip(*((epoch["seconds"], 100 * epoch["test/top1"]) for epoch in run["epochs"]), strict=True)
        axes.plot(seconds, top1, marker=".", linewidth=1, label=f"seed {run['seed']}")
    for target in found["targets"]:
        axes.axhline(100 * target, color="tab:gray", linestyle="--", linewidth=1)
        axes.annotate(
            f"{target:.2%}", (1, 100 * target), xycoords=("axes fraction", "data"), ha="right", va="bottom", size=8
        )
    axes.set(xlabel="seconds of training", ylabel="test top-1 (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="CONFIG | key=value")
    parser.add_argument("--targets", nargs="+", type=float, default=[92.66, 94.0], help="test top-1 in percent")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from the configured one on")
    parser.add_argument("--minutes", type=float, help="begin no seed that would not end within so many minutes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_intermixed_args(arguments)

    def show(found: dict[str, Any], epoch: dict[str, Any] | None) -> None:
        if epoch is None:
            write_json(found, args.out)
        else:
            print(f"seed {epoch['seed']}, epoch {epoch['epoch']}: {epoch['test/top1']:.2%}", flush=True)

    found = time_to_accuracy(
        load_config(*args.sources),
        targets=[target / 100 for target in sorted(args.targets)],
        seeds=args.seeds,
        before=json.loads(args.out.read_text()) if args.out and args.out.exists() else None,
        limit_s=None if args.minutes is None else 60 * args.minutes,
        listener=show,
    )
    write_json(found, args.out)
    if found["runs"]:
        print_outcome(found)
        if args.plot:
            draw(found, args.plot)
    if len(found["runs"]) < args.seeds:
        print(f"{len(found['runs'])} of {args.seeds} seeds; the same command goes on with the others")


if __name__ == "__main__":
    main()

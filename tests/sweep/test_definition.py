"""Sweep files: what they may say, what is said of wrong ones, and what is drawn from their space."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from densenet_dist.cluster.ray_tune import points_to_try
from densenet_dist.errors import ConfigError
from densenet_dist.sweep import space as spaces
from densenet_dist.sweep.definition import DEFAULT_TRIALS, Sweep, load_sweep
from densenet_dist.sweep.results import Trial
from densenet_dist.sweep.space import Range, read_domain

LR = "space: {train.lr: {loguniform: [0.01, 1]}}\n"


@pytest.fixture
def load(tmp_path: Path):
    def load(text: str, *more: str) -> Sweep:
        (tmp_path / "mine.yaml").write_text(text)
        return load_sweep(tmp_path / "mine.yaml", *more)

    return load


@pytest.fixture
def problems(load):
    def problems(text: str, *more: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, *more)
        lines = str(caught.value).splitlines()
        return [line.removeprefix("  ") for line in (lines[1:] if "problems in the" in lines[0] else lines)]

    return problems


def test_every_problem_is_named_at_once(problems):
    text = """
trials: 0
wrokers: 2
storage: ~no-such-user/runs
settings: {train: {lr: fast}}
space:
  train.lrr: [1]
  name: [a]
  train.ema_decay: {uniform: [0.5]}
  train.epochs: {integer: [1, 5], step: 7}
  train.optimizer.name: sgd
  model.growth_rate: {loginteger: [0, 3]}
  data.mixup: {integer: [0, 0.5]}
  seed: [1, 1]
"""
    found = problems(text)
    forms = "{choice: [a, b]}, or {uniform: [low, high]}, or likewise loguniform, integer or loginteger"
    expected = [
        "trials: Input should be greater than or equal to 1; got 0 (int)",
        "wrokers: unknown key; did you mean workers?",
        "storage: there is no such home folder; give an absolute path; got '~no-such-user/runs' (str)",
        "train.lr: Input should be a valid number; got 'fast' (str)",
        "space.train.lrr: unknown key; did you mean train.lr?",
        "space.name: cannot be searched: it is the same for all trials and part of the sweep's own settings",
        "space.train.ema_decay: uniform needs [low, high] in numbers, not [0.5]",
        "space.train.epochs: a step (uniform, integer) must be above 0 and fit into [1, 5], not 7",
        f"space.train.optimizer.name: must be {forms}; uniform and integer also accept a step; got 'sgd'",
        "space.model.growth_rate: loginteger needs a low end above 0, not 0",
        "space.data.mixup: integer needs [low, high] in whole numbers, not [0, 0.5]",
        "space.seed: the choice 1 is given twice",
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trials: 3", "space: names no key to search, such as train.lr: {loguniform: [0.01, 1]}"),
        ("space: {train.lr: [-1, 0.1]}", "space.train.lr: Input should be greater than 0; got -1 (int)"),
        (LR + "search.name: grid", "space.train.lr: search.name=grid needs a choice, or a step"),
        (
            "space: {train.lr: [0.1, 0.2], seed: [1, 2]}\nsearch.name: grid\ntrials: 3",
            "trials: the grid has 4 combinations; leave trials out",
        ),
        (LR + "scheduler.name: pbt", "scheduler.name: Input should be 'fifo', 'asha' or 'median'; got 'pbt' (str)"),
        (LR + "trials: 1000000000", "trials: Input should be less than or equal to 10000; got 1000000000 (int)"),
        ("space: {seed: [010, 1:30]}", "space.seed: Input should be a valid integer; got '1:30' (str)"),
        ("space: {train.lr: [1, 1.0]}", "space.train.lr: the choice 1.0 is given twice"),
        (LR + "settings: {data.val_fraction: 0}", "metric: val/top1 needs validation images, but data.val_fraction"),
        (LR + "gpus_per_worker: 0.5\nworkers: 2", "gpus_per_worker: 0.5; a worker uses 0 or 1, and only trials of"),
    ],
)
def test_what_cannot_work(problems, text, expected):
    found = problems(text)
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_combinations_that_cannot_work(problems):
    found = problems("space: {model.num_layers: [[1, 1], [1, 1, 1, 1, 1, 1, 1]]}\nsettings.model.variant: densenet_bc")
    assert found[0] == "space: some combinations cannot work, such as model.num_layers=[1, 1, 1, 1, 1, 1, 1]"
    assert found[1].startswith("  model.num_layers: images of 32x32 are too small for 7 blocks")
    found = problems("space: {model.growth_rate: {integer: [4, 100000]}}")
    assert found[1].startswith("  model.num_layers, model.growth_rate: ")
    found = problems("workers: 3\nspace: {train.global_batch_size: [2, 64]}")
    assert "cluster.workers: 3 workers cannot share train.global_batch_size=2" in found[1]
    model = "settings: {data.name: cifar10, model.variant: densenet121}"
    found = problems(f"workers: 8\nspace: {{train.global_batch_size: [64, 65]}}\n{model}")
    assert found[0] == "space: some combinations cannot work, such as train.global_batch_size=64"
    assert "45,000 training images in batches of 64 leave a batch of 8, too few for world size 8 and" in found[1]


def test_settings_go_where_they_belong(load):
    more = ("trials=8", "scheduler.name=median", "train.epochs=3", "data={limit: 500}", "seed=5")
    sweep = load(LR + "settings: {train: {epochs: 2, lr: 0.3}}", *more, "space.train.lr={uniform: [0.1, 0.2]}")
    assert (sweep.settings.trials, sweep.settings.scheduler.name, sweep.settings.name) == (8, "median", "mine")
    assert (sweep.base["train"]["epochs"], sweep.base["train"]["lr"], sweep.base["seed"]) == (3, 0.3, 5)
    assert sweep.base["data"]["limit"] == 500
    assert sweep.space == {"train.lr": Range(0.1, 0.2)}
    stepped = "space: {train: {lr: {uniform: [0.1, 0.5], step: 0.1}}}"
    replaced = load(stepped, "space.train.lr={loguniform: [0.01, 1]}")
    assert replaced.space == {"train.lr": Range(0.01, 1.0, log=True)}, "a domain is replaced as a whole"
    assert load(LR, "log.mlflow.enabled=true", "fault.grace_s=9").base["log"]["mlflow"]["enabled"] is True
    assert load(LR, "name=other").settings.name == "other"
    assert not load(LR, "metric=val/loss").settings.maximize
    for given, monitor in (
        (("metric=val/macro_f1",), "val/macro_f1"),
        (("metric=train/loss",), "val/top1"),
        (("metric=val/loss", "checkpoint.monitor=val/top1"), "val/top1"),
    ):
        assert load(LR, *given).config("trial-000", {}).checkpoint.monitor == monitor
    assert not load(LR, "metric=val/top1", "mode=min").settings.maximize


def test_the_base_is_relative_to_the_sweep_file(load, tmp_path, monkeypatch):
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases" / "base.yaml").write_text("train: {epochs: 7, lr: 0.2}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sweep = load(LR + "base: bases/base.yaml\nsettings: {train.lr: 0.4}")
    assert (sweep.base["train"]["epochs"], sweep.base["train"]["lr"]) == (7, 0.4)


def test_a_sweep_is_read_back_as_it_was_written(load):
    text = """
trials: 5
storage: s3://bucket/sweeps?region=eu-1
metric: train/loss
scheduler: {name: asha, reduction_factor: 2}
settings: {train: {epochs: 2, schedule: {name: multistep, milestones: [1]}}}
space:
  train.lr: {loguniform: [1e-5, 1]}
  train.label_smoothing: {uniform: [0, 0.3], step: 0.1}
  train.epochs: {integer: [1, 9], step: 2}
  model.growth_rate: {loginteger: [4, 32]}
  model.num_layers: [[1, 1], [2, 2]]
  data.augment: ["none", crop_flip]
"""
    sweep = load(text)
    again = load(sweep.to_yaml())
    assert again == sweep
    assert list(again.space) == list(sweep.space)
    assert sweep.folder == "s3://bucket/sweeps/mine?region=eu-1"
    config = sweep.config("trial-007", {"train.lr": 0.5, "model.num_layers": [2, 2]})
    assert (config.train.lr, config.model.num_layers) == (0.5, (2, 2))
    assert (config.name, config.storage) == ("trial-007", sweep.folder)


def test_trials_of_a_grid(load):
    text = "search.name: grid\nspace: {train.lr: [0.1, 0.2], train.label_smoothing: {uniform: [0, 0.2], step: 0.1}}"
    sweep = load(text)
    assert sweep.trials == spaces.size(sweep.space) == 6
    points = [tuple(point.values()) for point in spaces.grid(sweep.space)]
    assert points == [(lr, smoothing) for lr in (0.1, 0.2) for smoothing in (0, 0.1, 0.2)]
    assert load(text, "trials=6").trials == 6
    assert load(LR).trials == DEFAULT_TRIALS
    assert spaces.size(load(LR).space) is None


@pytest.mark.parametrize(
    ("said", "values"),
    [
        ({"integer": [1, 9], "step": 3}, [1, 4, 7]),
        ({"uniform": [0, 1], "step": 0.6}, [0, 0.6]),
        ({"uniform": [0.1, 0.3], "step": 0.1}, [0.1, 0.2, 0.3]),
    ],
)
def test_ranges(said, values):
    domain, rng = read_domain(said), random.Random(0)
    assert isinstance(domain, Range)
    assert domain.describe() == said
    assert [domain.at(number) for number in range(domain.count)] == values
    assert {domain.sample(rng) for _ in range(300)} == set(values)
    assert domain.ends == (values[0], values[-1])


def test_random_search_repeats_nothing_while_there_is_something_new():
    said = {"a": [1, [2], "x"], "b": {"loginteger": [1, 4]}, "c": {"uniform": [0, 0.3], "step": 0.3}}
    space = {key: read_domain(value) for key, value in said.items()}
    drawn = spaces.samples(space, random.Random(0), 30)
    assert sorted(map(str, drawn[:24])) == sorted(map(str, spaces.grid(space)))
    assert drawn == spaces.samples(space, random.Random(0), 30)
    assert [spaces.decode(spaces.encode(point)) for point in drawn] == drawn
    with_numbers = spaces.samples(space | {"d": read_domain({"uniform": [0, 1]})}, random.Random(0), 200)
    assert len({str(point) for point in with_numbers}) == 200


@pytest.mark.parametrize(("search", "trials"), [("random", 9), ("random", 15), ("grid", 12)])
def test_a_resumed_search_tries_what_is_left(load, search, trials):
    text = "space: {seed: [1, 2, 3], data.cutout: {integer: [0, 3]}}"
    sweep = load(text, f"search.name={search}", f"trials={trials}")
    points = points_to_try(sweep, [])
    assert len(points) == trials
    assert len({str(point) for point in points}) == min(trials, 12)
    for begun in (points[:5], points[3:6], points):
        recorded = [Trial(f"trial-{number}", point, "interrupted") for number, point in enumerate(begun)]
        resumed = points_to_try(sweep, recorded)
        assert resumed[: len(begun)] == begun
        assert sorted(map(str, resumed)) == sorted(map(str, points))
        recorded[0].status = "finished"
        assert points_to_try(sweep, recorded) == resumed[1:]

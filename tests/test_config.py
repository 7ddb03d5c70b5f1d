"""Merging, validating and writing configurations."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from densenet_dist.config import load_config, load_run_config, to_dict, to_yaml
from densenet_dist.errors import ConfigError
from densenet_dist.schema import Config, WorkerRange
from densenet_dist.sweep.definition import json_schema
from densenet_dist.yaml_settings import flatten, read_yaml

CONFIGS = Path(__file__).parents[1] / "configs"


def message(*sources: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*sources)
    assert caught.value.exit_code == 2
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_later_sources_win_and_leave_the_rest_alone(tmp_path):
    base = write(tmp_path / "base.yaml", "train: {lr: 0.5, epochs: 7, optimizer: {name: adam, eps: 1e-7}}\nseed: 3\n")
    more = write(tmp_path / "more.yaml", "train: {epochs: 8, optimizer: {eps: 1e-6}}\n")
    config = load_config(base, str(more), "train.lr=0.25", {"train": {"optimizer": {"betas": [0.8, 0.9]}}, "seed": 4})
    assert (config.train.lr, config.train.epochs, config.seed) == (0.25, 8, 4)
    assert (config.train.optimizer.name, config.train.optimizer.eps) == ("adam", 1e-6)
    assert config.train.optimizer.betas == (0.8, 0.9)  # a list is replaced, not extended
    assert config.train.optimizer.momentum == Config().train.optimizer.momentum


def test_keys_may_be_nested_or_dotted(tmp_path):
    path = write(tmp_path / "c.yaml", "train.lr: 1e-3\ntrain: {epochs: 2, optimizer.name: adam}\n")
    mapping = {"train.lr": 0.001, "train": {"epochs": 2, "optimizer.name": "adam"}}
    for source in (path, mapping):
        config = load_config(source, "train.optimizer.nesterov=false")
        assert (config.train.lr, config.train.epochs, config.train.optimizer.name) == (0.001, 2, "adam")
        assert config.train.optimizer.nesterov is False
    assert mapping["train"] == {"epochs": 2, "optimizer.name": "adam"}  # sources are not changed


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.lr=1e-3", "train.lr", 0.001),
        ("train.epochs = 3", "train.epochs", 3),
        ("train.compile=true", "train.compile", True),
        ("train.ema_decay=", "train.ema_decay", None),
        ("model.num_layers=[2, 3]", "model.num_layers", (2, 3)),
        ("cluster.workers={min: 1, max: 4}", "cluster.workers", WorkerRange(1, 4)),
        ("data.root=/a=b", "data.root", "/a=b"),
        ("seed=010", "seed", 10),
        ("data.root=2026-01-01T10:00:00Z", "data.root", "2026-01-01T10:00:00Z"),
        ("data.root=~/a", "data.root", f"{Path.home()}/a"),
    ],
)
def test_values_are_read_as_yaml_and_keep_their_types(text, key, value):
    found: Any = load_config(text)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_the_name_is_the_one_given_or_the_last_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "my run.yaml", "seed: 1")
    write(tmp_path / "lr=3.yaml", "{name: mine, train: {lr: 3}}")  # a file, for all its sign
    assert load_config("my run.yaml").name == "my-run"
    assert load_config("lr=3.yaml", "my run.yaml").name == "mine"
    assert load_config("lr=3.yaml", "name=said").name == "said"
    assert load_config().name == "run"


@pytest.mark.parametrize(
    "sources",
    [
        [],
        ["train.lr=1", "train.optimizer.eps=1e-12", "model.num_layers=[2,3]", "checkpoint.every_steps=5"],
        ["name=1-e5", "data.root='null'", "storage='1e-3'"],
        ["name='09'", "data.root='1:30'", "storage='2026-01-01'"],
    ],
)
def test_the_yaml_reads_back_to_an_equal_configuration(tmp_path, sources):
    config = load_config(*sources)
    text = to_yaml(config)
    again = load_config(write(tmp_path / "x.yaml", text))
    assert again == config
    assert to_yaml(again) == text
    assert yaml.safe_load(text) == to_dict(config), "other programs read it, too"
    assert load_config(to_dict(config)) == config
    assert load_config(flatten(to_dict(config))) == config


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("train.lr=fast", "train.lr: Input should be a valid number; got 'fast' (str)"),
        ("train.lr=0", "train.lr: Input should be greater than 0; got 0 (int)"),
        ("train.lr=.nan", "train.lr: Input should be a finite number; got nan (float)"),
        ("train.bucket_mb=-1", "train.bucket_mb: Input should be greater than 0; got -1 (int)"),
        ("train.epochs=1:30", "train.epochs: Input should be a valid integer; got '1:30' (str)"),
        ("name=7", 'name: Input should be a valid string; got 7 (int); put text in quotes: name: "..." in a file, '),
        ("data.root=no", "data.root: Input should be a valid string; got False (bool); put text in quotes"),
        ("train={optimizer.name: sgd, optimizer: {name: adam}}", "the key 'train.optimizer.name' is given twice"),
        ("train.epochs=2.0", "train.epochs: Input should be a valid integer; got 2.0 (float)"),
        (
            "data.name=mnist",
            "data.name: Input should be 'shapes', 'cifar10', 'cifar100' or 'folder' or package.module:function",
        ),
        ("cluster.workers=two", "cluster.workers: Input should be a valid integer or an object or 'auto'; got 'two'"),
        ("model.num_layers=[2, 0]", "model.num_layers[1]: Input should be greater than or equal to 1; got 0 (int)"),
        ("name=../up", "name: String should match pattern"),
        ("data.root=~no-such-user/x", "data.root: there is no such home folder; give an absolute path"),
        ("train.optimizer=adam", "train.optimizer: holds 'adam' (str), but is a group of settings: name, momentum"),
        ("train.epoch=3", "train.epoch: unknown key; did you mean train.epochs?"),
        ("lr=3", "lr: unknown key; did you mean train.lr?"),
        ("train.batch_size=3", "train.batch_size: unknown key; use train.global_batch_size, the number of images"),
        ("zzz=1", "zzz: unknown key; known here: name, storage, seed, model,"),
        ("=1", "'=1' has no key before its ="),
    ],
)
def test_what_is_wrong_is_one_line_with_its_key_and_a_suggestion(setting, problem):
    said = message(setting)
    assert said.startswith(problem)
    assert "\n" not in said


@pytest.mark.parametrize(
    "case",
    [
        (
            "data.val_fraction: there are no validation images",
            "data.val_fraction=0",
            "train.early_stopping.enabled=true",
        ),
        ("train.schedule.warmup_epochs: 3 must be less", "train.epochs=3", "train.schedule.warmup_epochs=3"),
        ("train.schedule.final_lr: 1 is above train.lr", "train.schedule.final_lr=1"),
        ("train.cuda_graph: fp16 decides on the CPU", "train.cuda_graph=true", "train.precision=fp16"),
        ("train.cuda_graph: PyTorch's Muon", "train.cuda_graph=true", "train.optimizer.name=muon"),
        ("train.bucket_mb: must be at least 1 with train.compile", "train.bucket_mb=0.5", "train.compile=true"),
        ("train.optimizer.nesterov: needs momentum > 0", "train.optimizer.momentum=0"),
        ("train.freeze[1]: Input should be 'stem' or greater than or equal to 1; got 0", "train.freeze=[stem, 0]"),
        ("data.flip: alternating needs every image once", "data.sampler=balanced", "data.flip=alternating"),
        ("train.class_weights: balanced, as", "data.sampler=balanced", "train.class_weights=balanced"),
        ("train.class_weights: at least one must be above 0", "train.class_weights=[0, 0]"),
        ("cluster.workers: min=3 is above max=2", "cluster.workers={min: 3,max: 2}"),
        ("cluster.workers: 9 workers cannot share", "cluster.workers=9", "train.global_batch_size=8"),
        ("cluster.env: WANDB_API_KEY may be a credential", 'cluster.env=["WANDB_API_KEY=abc"]'),
        ("cluster.resources_per_worker: GPU is requested with", 'cluster.resources_per_worker=["GPU=1"]'),
        ("cluster.workers: cluster.engine=local is one", "cluster.workers=2", "cluster.engine=local"),
    ],
    ids=lambda case: case[0],
)
def test_a_combination_that_cannot_work_is_refused(case):
    problem, *settings = case
    assert message(*settings).startswith(problem)


def test_settings_that_are_not_used_are_not_held_against_others():
    load_config("train.optimizer.name=adam", "train.optimizer.momentum=0", "train.schedule.milestones=[3, 2]")
    load_config("data.val_fraction=0", "train.schedule.name=constant", "train.schedule.min_lr=1")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train: {lr: 1, lr: 2}", "the key 'lr' is given twice"),
        ("train.lr: 0.1\ntrain: {lr: 0.2}", "the key 'train.lr' is given twice"),
        ("train: {lr: 0.1}\ntrain.lr: 0.2", "the key 'train.lr' is given twice"),
        ("train.lr: 0.1\ntrain: ", "the key 'train' is given twice"),
        ("data: {root: !!binary aGk=}", "the tag !!binary cannot be used; put text in quotes"),
        ("data: {root: !!set {a, b}}", "the tag !!set cannot be used"),
        ("? [a, b]\n: 1", "a key must be a single word"),
        ("- train", "holds a list; it must hold keys and values"),
        ("name: !!python/object/apply:os.system ['touch ran']", "is not valid YAML"),
        ("a: 1\n---\na: 2", "is not valid YAML"),
        ("train: &again {lr: *again}", "cannot be understood"),
    ],
)
def test_a_file_that_is_not_plain_yaml_is_refused(tmp_path, monkeypatch, text, problem):
    monkeypatch.chdir(tmp_path)
    said = message(write(tmp_path / "c.yaml", text))
    assert problem in said
    assert not Path("ran").exists()
    assert str(tmp_path / "c.yaml") in said


def test_the_json_schemas_are_those_of_the_settings_and_accept_the_configurations():
    schemas = {name: json.loads((CONFIGS / name).read_text()) for name in ("schema.json", "sweep-schema.json")}
    assert list(schemas.values()) == [json_schema(sweeps=False), json_schema(sweeps=True)]
    run = Draft202012Validator(schemas["schema.json"])
    for path in CONFIGS.glob("*.yaml"):
        schema = path.read_text().splitlines()[0].partition("$schema=")[2]
        content = read_yaml(path)
        run.validate(content.pop("settings", {}))
        Draft202012Validator(schemas[schema]).validate(content)
    assert not run.is_valid({"train": {"epoch": 3}})


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path):
    write(tmp_path / "quickstart.yaml", "seed: 1")
    said = message(tmp_path / "quikstart.yaml")
    assert said == f"there is no config file {tmp_path}/quikstart.yaml; did you mean {tmp_path}/quickstart.yaml?"


def test_what_cannot_be_read_is_no_config(tmp_path):
    assert "cannot be read" in message(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00name")
    assert "cannot be read" in message(tmp_path / "c.yaml")
    assert message("train.epochs=[1, 2").startswith("the value in 'train.epochs=[1, 2' is not valid YAML")


def test_runs_of_versions_that_limited_both_splits_are_tested_on_the_same_images(tmp_path):
    path = tmp_path / "config.yaml"
    cases = {"limit: 75": (75, 75), "limit: null": (None, None), "limit: 7, test_limit: null": (7, None)}
    for text, limits in cases.items():
        path.write_text(f"data: {{{text}}}")
        data = load_run_config(path, "train.epochs=2").data
        assert (data.limit, data.test_limit) == limits
    assert load_config(path).data.test_limit is None

"""Merging, validating and writing configurations."""

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from densenet_dist.config import SETTINGS, load_config, to_dict, to_yaml
from densenet_dist.errors import ConfigError
from densenet_dist.schema import Config, WorkerRange
from densenet_dist.sweep.definition import load_sweep
from densenet_dist.yaml_settings import flatten, read_yaml

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def message(*sources: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*sources)
    assert caught.value.exit_code == 2
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def fields(kind: type) -> Iterator[tuple[str, Any]]:
    for name, field in kind.__pydantic_fields__.items():
        yield f"{kind.__name__}.{name}", field
        if dataclasses.is_dataclass(field.annotation):
            yield from fields(field.annotation)


# Merging


def test_later_sources_win_and_leave_the_rest_alone(tmp_path):
    base = write(tmp_path / "base.yaml", "train: {lr: 0.5, epochs: 7, optimizer: {name: adam, eps: 1e-7}}\nseed: 3\n")
    more = write(tmp_path / "more.yaml", "train: {epochs: 8, optimizer: {eps: 1e-6}}\n")
    config = load_config(base, str(more), "train.lr=0.25", {"train": {"optimizer": {"betas": [0.8, 0.9]}}, "seed": 4})
    assert (config.train.lr, config.train.epochs, config.seed) == (0.25, 8, 4)
    assert (config.train.optimizer.name, config.train.optimizer.eps) == ("adam", 1e-6)
    assert config.train.optimizer.betas == (0.8, 0.9)
    assert config.train.optimizer.momentum == Config().train.optimizer.momentum


def test_without_sources_the_defaults_stand():
    assert load_config() == Config()


def test_an_empty_file_changes_nothing_but_the_name(tmp_path):
    assert load_config(write(tmp_path / "empty.yaml", "# nothing yet\n")) == dataclasses.replace(Config(), name="empty")


def test_a_list_is_replaced_not_extended():
    config = load_config("train.schedule.milestones=[1, 2, 3]", "train.schedule.milestones=[9]")
    assert config.train.schedule.milestones == (9.0,)


@pytest.mark.parametrize(
    "mapping",
    [
        {"train.optimizer.name": "adam", "train.lr": 0.5},
        {"train": {"optimizer": {"name": "adam"}, "lr": 0.5}},
        {"train": {"optimizer.name": "adam"}, "train.lr": 0.5},
    ],
)
def test_mappings_may_be_nested_or_dotted(mapping):
    config = load_config("train.optimizer.nesterov=false", mapping)
    assert (config.train.optimizer.name, config.train.lr) == ("adam", 0.5)
    assert config.train.optimizer.nesterov is False


def test_dotted_keys_work_in_files_too(tmp_path):
    path = write(tmp_path / "c.yaml", "train.lr: 0.5\ntrain: {epochs: 2, optimizer.name: adam}\n")
    config = load_config(path, "train.optimizer.eps=1e-3")
    assert (config.train.lr, config.train.epochs, config.train.optimizer.name) == (0.5, 2, "adam")


def test_sources_are_not_changed():
    override = {"train": {"lr": 0.5}}
    load_config(override, "train.epochs=2")
    assert override == {"train": {"lr": 0.5}}


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.lr=1e-3", "train.lr", 0.001),
        ("train.lr=1E3", "train.lr", 1000.0),
        ("train.lr=.5e-1", "train.lr", 0.05),
        ("train.lr=.5e1", "train.lr", 5.0),
        ("train.lr=1", "train.lr", 1.0),
        ("train.epochs = 3", "train.epochs", 3),
        ("train.compile=true", "train.compile", True),
        ("train.ema_decay=null", "train.ema_decay", None),
        ("train.ema_decay=", "train.ema_decay", None),
        ("model.num_layers=[2, 3]", "model.num_layers", (2, 3)),
        ("model.num_layers=4", "model.num_layers", 4),
        ("cluster.workers=auto", "cluster.workers", "auto"),
        ("cluster.workers=2", "cluster.workers", 2),
        ("cluster.workers={min: 1, max: 4}", "cluster.workers", WorkerRange(1, 4)),
        ("data.root=/a=b", "data.root", "/a=b"),
        ("data.root=1e-3x", "data.root", "1e-3x"),
        (f"data.root={'x' * 300}", "data.root", "x" * 300),
        ("seed=9223372036854775807", "seed", 2**63 - 1),
    ],
)
def test_values_are_read_as_yaml_and_keep_their_types(text, key, value):
    found: Any = load_config(text)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_a_number_such_as_1e_3_is_one_in_files_too(tmp_path):
    assert load_config(write(tmp_path / "c.yaml", "train: {lr: 1e-3}")).train.lr == 0.001


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        (["my run.yaml"], "my-run"),
        (["first.yaml", "second.yaml"], "second"),
        (["named.yaml"], "mine"),
        (["named.yaml", "second.yaml"], "mine"),
        (["name=said", "second.yaml"], "said"),
        (["second.yaml", "name=said"], "said"),
        ([".hidden.yaml"], "hidden"),
        ([], "run"),
    ],
)
def test_the_name_is_the_one_given_or_the_last_files(tmp_path, monkeypatch, sources, name):
    monkeypatch.chdir(tmp_path)
    for source in sources:
        if source.endswith("yaml"):
            write(tmp_path / source, "name: mine" if source == "named.yaml" else "seed: 1")
    assert load_config(*sources).name == name


# Writing


@pytest.mark.parametrize(
    "sources",
    [
        [],
        ["train.lr=1", "train.optimizer.eps=1e-12", "model.num_layers=[2,3]", "checkpoint.every_steps=5"],
        ["cluster.workers=3", "data.url=http://127.0.0.1:80/x?a=b", "train.schedule.milestones=[]"],
        ["name=1-e5", "data.root='null'", "storage='1e-3'"],
    ],
)
def test_the_yaml_reads_back_to_an_equal_configuration(tmp_path, sources):
    config = load_config(*sources)
    text = to_yaml(config)
    again = load_config(write(tmp_path / "x.yaml", text))
    assert again == config
    assert to_yaml(again) == text
    assert load_config(to_dict(config)) == config
    assert load_config(flatten(to_dict(config))) == config


def test_the_yaml_holds_plain_values_only():
    assert yaml.safe_load(to_yaml(Config())) == to_dict(Config())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_of_the_repository_are_valid(path):
    if path.name.startswith("sweep_"):
        assert load_sweep(path).settings.name == path.stem
    else:
        assert load_config(path).name == path.stem


# Descriptions


def test_every_field_is_described():
    missing = [name for name, field in fields(Config) if not (field.description or "").endswith((".", ")"))]
    assert not missing
    assert len(dict(fields(Config))) > 60  # the walk went down


# What is refused: values


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("train.lr=fast", "train.lr: must be a number > 0, not 'fast' (str)"),
        ("train.lr=0", "train.lr: must be a number > 0, not 0 (int)"),
        ("train.lr=.nan", "train.lr: must be a number > 0, not nan (float)"),
        ("train.lr=.inf", "train.lr: must be a number > 0, not inf (float)"),
        ("train.lr=1e999", "train.lr: must be a number > 0, not inf (float)"),
        ("train.lr=true", "train.lr: must be a number > 0, not True (bool)"),
        ("train.lr='0.1'", "train.lr: must be a number > 0, not '0.1' (str)"),
        ("train.epochs=true", "train.epochs: must be an integer >= 1, not True (bool)"),
        ("train.epochs=2.0", "train.epochs: must be an integer >= 1, not 2.0 (float)"),
        ("train.epochs=null", "train.epochs: must be an integer >= 1, not null"),
        ("train.compile=1", "train.compile: must be true or false, not 1 (int)"),
        ("data.root=3", "data.root: must be text, not 3 (int)"),
        ("data.root=null", "data.root: must be text, not null"),
        ("data.name=mnist", "data.name: must be 'shapes' or 'cifar10' or 'cifar100' or 'folder', not 'mnist' (str)"),
        ("data.val_fraction=1", "data.val_fraction: must be a number >= 0 and < 1, not 1 (int)"),
        (
            "cluster.workers=two",
            "cluster.workers: must be an integer >= 1 or 'auto' or a mapping with min (an integer >= 1) and max",
        ),
        (
            "cluster.workers=0",
            "cluster.workers: must be an integer >= 1 or 'auto' or a mapping with min (an integer >= 1) and max",
        ),
        (
            "cluster.workers=1.5",
            "cluster.workers: must be an integer >= 1 or 'auto' or a mapping with min (an integer >= 1) and max",
        ),
        ("train.ema_decay=1.0", "train.ema_decay: must be a number >= 0 and < 1 or null, not 1.0 (float)"),
        (
            "model.num_layers=x",
            "model.num_layers: must be an integer >= 1 or null or a list of values, each an integer >= 1, not 'x'",
        ),
        ("model.num_layers=[2, 0]", "model.num_layers[1]: must be an integer >= 1, not 0 (int)"),
        ("train.schedule.milestones=[1, b]", "train.schedule.milestones[1]: must be a number > 0, not 'b' (str)"),
        ("train.optimizer.betas=[0.9, 1]", "train.optimizer.betas[1]: must be a number >= 0 and < 1, not 1 (int)"),
        (
            "train.optimizer.betas=[0.9]",
            "train.optimizer.betas: must be a list of 2 values, each a number >= 0 and < 1, not [0.9] (list)",
        ),
        (
            "train.optimizer.betas=[0, 0, 0]",
            "train.optimizer.betas: must be a list of 2 values, each a number >= 0 and < 1, not [0, 0, 0] (list)",
        ),
        ("model.growth_rate.x=1", "model.growth_rate: must be an integer >= 1 or null, not {'x': 1} (dict)"),
        ("seed=-1", "seed: must be an integer >= 0 and < 9223372036854775808, not -1 (int)"),
        ("seed=9223372036854775808", "seed: must be an integer >= 0 and < 9223372036854775808, not 922337203685477"),
        ("name=../up", "name: must be text that matches"),
        ("name=", "name: must be text that matches"),
        ("checkpoint=3", "checkpoint: holds 3 (int), but is a group of settings: every_epochs, every_steps, keep"),
        ("train.optimizer=adam", "train.optimizer: holds 'adam' (str), but is a group of settings: name, momentum"),
        ("train=null", "train: holds null, but is a group of settings: epochs,"),
    ],
)
def test_a_wrong_value_is_one_line_with_its_key_what_it_may_be_and_what_it_is(setting, problem):
    said = message(setting)
    assert said.startswith(problem)
    assert "\n" not in said


def test_a_long_value_is_shown_in_part():
    said = message(f"train.epochs={'x' * 1000}")
    assert "'xxxxxxxx" in said
    assert len(said) < 120


# What is refused: keys


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("train.epoch=3", "train.epoch: unknown key; did you mean train.epochs?"),
        ("trian.epochs=3", "trian: unknown key; did you mean train?"),
        ("lr=3", "lr: unknown key; did you mean train.lr?"),
        ("model.lr=3", "model.lr: unknown key; did you mean train.lr?"),
        ("epoch=3", "epoch: unknown key; did you mean train.epochs?"),
        ("optimizer.name=adam", "optimizer: unknown key; did you mean train.optimizer?"),
        ("train.optimiser.name=adam", "train.optimiser: unknown key; did you mean train.optimizer?"),
        ("data.zzz=1", "data.zzz: unknown key; known here: name, root, download,"),
        ("zzz=1", "zzz: unknown key; known here: name, storage, seed, model,"),
        ("=1", "'=1' has no key before its ="),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(setting, problem):
    assert message(setting).startswith(problem)


def test_all_problems_are_listed_at_once():
    said = message("train.lr=fast", "train.epoch=1", {"data": {"augment": 1}}, "cluster.workers=-1").splitlines()
    assert said[0] == "4 problems in the configuration:"
    assert sorted(line.strip().split(":")[0] for line in said[1:]) == [
        "cluster.workers",
        "data.augment",
        "train.epoch",
        "train.lr",
    ]


# What is refused: combinations


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["data.val_fraction=0", "train.early_stopping.enabled=true"], "data.val_fraction: 0 leaves nothing"),
        (["data.val_fraction=0", "train.schedule.name=plateau"], "data.val_fraction: 0 leaves nothing"),
        (["train.schedule.name=multistep", "train.schedule.milestones=[3, 2]"], "train.schedule.milestones: must rise"),
        (["train.schedule.name=multistep", "train.schedule.milestones=[2, 2]"], "train.schedule.milestones: must rise"),
        (["train.epochs=3", "train.schedule.warmup_epochs=3"], "train.schedule.warmup_epochs: 3 is the whole run"),
        (
            ["train.schedule.name=one_cycle", "train.schedule.warmup_epochs=1"],
            "train.schedule.warmup_epochs: one_cycle",
        ),
        (["train.cuda_graph=true", "train.precision=fp16"], "train.cuda_graph: fp16 decides on the CPU"),
        (["train.cuda_graph=true", "train.grad_accum_steps=2"], "train.cuda_graph: a captured step has one part"),
        (["train.optimizer.momentum=0"], "train.optimizer.nesterov: needs momentum > 0"),
        (["cluster.workers=9", "train.global_batch_size=8"], "cluster.workers: 9 workers cannot share"),
        (["cluster.workers={min: 3, max: 2}"], "cluster.workers: min=3 is above max=2"),
        (["cluster.workers={min: 1, max: 9}", "train.global_batch_size=8"], "cluster.workers: 9 workers cannot share"),
        (["cluster.workers={min: 1, max: 2}", "cluster.engine=local"], "cluster.workers: cluster.engine=local is one"),
        (["cluster.workers=2", "cluster.engine=local"], "cluster.workers: cluster.engine=local is one process"),
        (["train.schedule.name=plateau", "train.schedule.min_lr=1"], "train.schedule.min_lr: 1 is above train.lr=0.1"),
        (["train.schedule.final_lr=1"], "train.schedule.final_lr: 1 is above train.lr=0.1"),
    ],
)
def test_a_combination_that_cannot_work_is_refused(settings, problem):
    assert message(*settings).startswith(problem)


def test_settings_that_are_not_used_are_not_held_against_others():
    load_config("train.optimizer.name=adam", "train.optimizer.momentum=0", "train.schedule.milestones=[3, 2]")
    load_config("data.val_fraction=0", "train.schedule.name=constant", "train.schedule.min_lr=1")


# What is refused: files


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train: {lr: 1, lr: 2}", "'lr' stands here a second time"),
        ("seed: 1\nname: a\nseed: 1", "'seed' stands here a second time"),
        ("1: a\n'1': b", "'1' stands here a second time"),
        ("? [a, b]\n: 1", "a key must be a single word"),
        ("train: {lr: 1", "is not valid YAML"),
        ("a: b: c", "is not valid YAML"),
        ("- train", "holds a list; it must hold keys and values"),
        ("just words", "holds a str; it must hold keys and values"),
        ("name: !!python/object/apply:os.system ['touch ran']", "is not valid YAML"),
        ("name: !!python/name:os.system", "is not valid YAML"),
        ("name: !custom x", "is not valid YAML"),
        ("a: 1\n---\na: 2", "is not valid YAML"),
        ("name: 2026-13-01", "cannot be understood"),
        ("train: &again {lr: *again}", "cannot be understood"),
        ("train: {schedule: {milestones: &again [*again]}}", "cannot be written down"),
    ],
)
def test_a_file_that_is_not_plain_yaml_is_refused(tmp_path, monkeypatch, text, problem):
    monkeypatch.chdir(tmp_path)
    said = message(write(tmp_path / "c.yaml", text))
    assert problem in said
    assert not Path("ran").exists()
    if "written down" not in problem:
        assert str(tmp_path / "c.yaml") in said


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path):
    write(tmp_path / "quickstart.yaml", "seed: 1")
    said = message(tmp_path / "quikstart.yaml")
    assert said == f"there is no config file {tmp_path}/quikstart.yaml; did you mean {tmp_path}/quickstart.yaml?"
    assert message(tmp_path / "no" / "x.yaml") == f"there is no config file {tmp_path}/no/x.yaml"


def test_a_folder_or_bytes_are_no_config(tmp_path):
    assert "cannot be read" in message(tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00name")
    assert "cannot be read" in message(tmp_path / "c.yaml")


@pytest.mark.parametrize("value", ["[1, 2", "{a: 1, a: 2}", "!!python/name:os.system", "a: b: c"])
def test_a_value_that_is_not_yaml_is_refused(value):
    said = message(f"train.epochs={value}")
    assert "is not valid YAML" in said
    assert "train.epochs" in said


def test_a_file_whose_name_holds_an_equals_sign_is_a_file(tmp_path):
    assert load_config(str(write(tmp_path / "lr=3.yaml", "train: {lr: 3}"))).train.lr == 3.0


def test_read_yaml_gives_nested_values(tmp_path):
    assert read_yaml(write(tmp_path / "c.yaml", "a.b: 1\na: {c: 2}")) == {"a": {"b": 1, "c": 2}}


def test_the_configuration_is_frozen_and_hashable():
    config = load_config("train.schedule.milestones=[1, 2]")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    assert {config: 1}[load_config("train.schedule.milestones=[1, 2]")] == 1


def test_every_setting_is_described():
    described = {setting.key: setting for setting in SETTINGS.described()}
    leaves = {key: setting.default for key, setting in described.items() if not setting.is_group}
    assert leaves == flatten(to_dict(Config()))
    assert all(setting.meaning for setting in described.values())
    assert described["train.epochs"].wanted == "an integer >= 1"
    assert described["data.name"].wanted == "'shapes' or 'cifar10' or 'cifar100' or 'folder'"
    assert described["train.schedule"].is_group
    keys = list(described)
    # Each group is whole before the next one begins.
    assert keys.index("train") < keys.index("train.lr") < keys.index("train.schedule.name") < keys.index("checkpoint")


def test_importing_the_package_and_its_config_is_light():
    code = "import sys, densenet_dist, densenet_dist.config; print([m for m in ('torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

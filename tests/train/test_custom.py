"""Custom parts: options, wrong functions, functions from Python, and names from folders of others."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import custom_parts
import numpy as np
import pytest
import torch
from custom_parts import CUSTOM, MODEL
from runs import run_of, tiny, train, trainer_of, weights_of
from safetensors.torch import load_file

from densenet_dist import Callback, custom, export, fit, load_classifier, load_config, load_run, load_sweep
from densenet_dist.cluster.launch import write_run
from densenet_dist.cluster.sweep import open_sweep
from densenet_dist.config import is_stored, to_yaml
from densenet_dist.errors import ConfigError, DataError, TrainingError
from densenet_dist.object_store import fetch_file

FOCAL = "train.loss=custom_parts:focal"


def quiet(event: object) -> None:
    pass


def test_options_are_settings_of_their_part(tmp_path):
    config = load_config("options.loss.gamma=1", FOCAL, "callbacks=[custom_parts:Best]")
    assert (config.options.loss, config.options.callbacks) == ({"gamma": 1.0}, {"Best": {"by": 0.0}})
    (tmp_path / "mine.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "mine.yaml") == config
    assert load_config(config, "train.loss=cross_entropy", "callbacks=[]") == load_config()
    given = {"train.loss": partial(custom_parts.focal, gamma=np.float64(1)), "callbacks": [custom_parts.Best]}
    assert load_config(given) == config
    with pytest.raises(ConfigError, match="callbacks: give the class Best, not an object"):
        load_config({"callbacks": [custom_parts.Best()]})
    with pytest.raises(ConfigError, match="arguments without keywords; give name=value"):
        load_config({"train.loss": partial(custom_parts.focal, 1)})


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (f"{FOCAL} options.loss.gamma=-1", "options.loss.gamma: Input should be greater than or equal to 0; got -1"),
        (f"{FOCAL} options.loss.gama=1", "options.loss.gama: unknown key; did you mean options.loss.gamma?"),
        ("options.los.gamma=1", "options.los: unknown key; did you mean options.loss?"),
        ("options.loss.gamma=1", "options.loss: train.loss=cross_entropy has no options; remove them"),
        ("callbacks=[custom_parts:Best] options.callbacks.Bst.by=1", "did you mean options.callbacks.Best?"),
        ("train.loss=custom_parts:fokal", "custom_parts has no function fokal; did you mean focal?"),
        ("train.loss=no_such_parts:focal", "there is no module no_such_parts on "),
        ("train.loss=os:system", "must take (logits, targets, *, option: type = default, ...)"),
        ("train.loss=focal", "Input should be 'cross_entropy' or package.module:function"),
        (f"{FOCAL} train.label_smoothing=0.1", "train.label_smoothing: needs train.loss=cross_entropy"),
        ("train.loss=custom_parts:größe", "Input should be 'cross_entropy' or package.module:function"),
        (f"{MODEL[0]} model.depth=40", "model.depth: is a setting of DenseNets"),
        (f"{MODEL[0]} train.head_lr=1", "train.head_lr: needs a DenseNet"),
        (f"{FOCAL} train.cuda_graph=true", "train.cuda_graph: custom_parts:focal may not work in a CUDA graph"),
    ],
)
def test_wrong_options_and_names_are_refused(settings, problem):
    with pytest.raises(ConfigError) as caught:
        load_config(*settings.split(" "))
    assert problem in str(caught.value)


LINEAR = "import torch\ndef f(num_classes, image_size):\n net = torch.nn.Linear(3 * 32 * 32, num_classes"
FLAT = " return torch.nn.Sequential(torch.nn.Flatten(), net)"
NET = "import torch\nclass N(torch.nn.Linear):\n def forward(s, x): return super().forward({})\n {}\n"
NET += "def f(num_classes, image_size): return torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), N(3072, num_classes))"
STRIPES = "import custom_parts as c, dataclasses as d\ndef f(root, seed): return d.replace(c.stripes(root, seed), {})"
LBFGS = "import torch\ndef f(g, lr): return torch.optim.LBFGS"
CALLBACK = "import collections, densenet_dist\nclass f(densenet_dist.Callback):\n "
BACKWARD = "def f(logits, targets):\n loss = logits.sum(1)\n loss.register_hook(lambda _: 1 / 0)\n return loss"
WRONG = [
    ("train.loss", "def f(logits, targets, *, power: int): pass", "options.loss.power: has no default; set it"),
    ("train.loss", "def f(logits, targets, *, power=2): pass", r"the option power of wrong\d+:f has no type"),
    ("train.loss", "def f(logits, targets, *, kind: type = int): pass", "a type that a file cannot hold"),
    ("train.loss", "def f(logits, targets): return logits.mean()", r"one loss per image, \(4,\), not \(\)"),
    ("train.loss", BACKWARD, "train.loss: wrong.*f failed: ZeroDivisionError"),
    ("model.variant", "def f(num_classes, image_size): raise KeyError(1)", r"KeyError: 1 \(wrong\d+.py, line 1\)"),
    ("model.variant", f"{LINEAR} + 1)\n{FLAT}", r"logits \(2, 10\)"),
    ("model.variant", NET.format("x.view(len(x), -1)", ""), r"Use \.reshape"),
    ("model.variant", NET.format("s.nothing if s.training else x.flatten(1)", ""), "f failed: AttributeError"),
    ("model.variant", NET.format("x.flatten(1)", "get_extra_state = lambda s: {}"), "1._extra_state is a dict, not"),
    ("data.name", "def f(root, seed): raise RuntimeError(1)", r"RuntimeError: 1 \(wrong\d+.py, line 1\)"),
    ("data.name", STRIPES.format("val=[5, 5]"), "has a val other than indices"),
    ("data.name", "def f(root, seed): return 1", "returned a int; it must return a Dataset"),
    ("data.augment", "def f(draws): return draws, draws", r"a finite matrix \(5, 2, 2\) and offset \(5, 2\)"),
    ("train.optimizer.name", "import torch\ndef f(g, lr): return torch.optim.SGD(g[:1], lr)", "exactly the parameters"),
    ("train.optimizer.name", f"{LBFGS}(g[0]['params'] + g[1]['params'])", "f failed: TypeError: LBFGS.step"),
    ("train.schedule.name", "def f(state): return -1", "learning rate -1.0 at step 0"),
    ("callbacks", "class f: pass", "not a subclass of densenet_dist.Callback"),
    ("callbacks", CALLBACK + "state_dict = lambda s: {0: {1}}", "has a set"),
    ("callbacks", CALLBACK + "state_dict = lambda s: collections.defaultdict(int)", "has a defaultdict"),
    ("callbacks", CALLBACK + "def on_step(s, t): raise RuntimeError(1)", "f.on_step failed: RuntimeError: 1"),
]


@pytest.mark.parametrize(("key", "code", "problem"), WRONG)
def test_wrong_functions_are_refused_before_anything_is_written(tmp_path, monkeypatch, key, code, problem):
    name = f"wrong{WRONG.index((key, code, problem))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((ConfigError, DataError, TrainingError), match=problem):
        train(tiny(tmp_path, f"{key}=[{name}:f]" if key == "callbacks" else f"{key}={name}:f"))
    assert not [*tmp_path.glob("tiny/checkpoints/step-*")]


def test_a_model_without_buffers_trains(tmp_path):
    def flat(num_classes, image_size):
        first, last = torch.nn.Conv2d(3, 8, image_size), torch.nn.Linear(8, num_classes)
        return torch.nn.Sequential(first, torch.nn.GroupNorm(2, 8), torch.nn.Flatten(), last)

    plain = tiny(tmp_path, "train.epochs=1")
    assert fit(plain, model=flat, listener=quiet).summary["status"] == "finished"


class Wrapped(torch.nn.Module):
    """Keeps what it computed, has tensors of other types, begins with a BatchNorm, and ends with one of one pixel."""

    def __init__(self, num_classes, image_size):
        super().__init__()
        layers = torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 2, 8, 8), torch.nn.Flatten(), torch.nn.BatchNorm1d(32)
        self.model = torch.nn.Sequential(*layers, torch.nn.Linear(32, num_classes))
        self.model.register_buffer("offsets", torch.arange(-1, 2, dtype=torch.int32))

    def forward(self, images):
        self.kept = self.model(images)
        return self.kept


class Failing(Callback):
    def on_end(self, trainer, summary):
        raise RuntimeError("too late")

    def load_state_dict(self, state):
        raise KeyError("not mine")


def test_a_model_with_all_that_is_unusual(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain, notes = tiny(tmp_path, "train.epochs=1", "train.ema_decay=0.9"), []
    run = fit(plain, model=Wrapped, callbacks=[Failing], listener=lambda event: notes.append(event.get("text"))).run
    assert "callbacks: Failing.on_end failed: RuntimeError: too late (test_custom.py" in "".join(filter(None, notes))
    with torch.inference_mode():
        assert len(load_classifier(run, trust=True).predict(np.zeros((32, 32, 3), np.uint8), top=1)) == 1
    assert export(run, trust=True).check.agreeing == 1
    fit(load_config(plain, "name=next", {"model.weights": run}), model=Wrapped, listener=quiet)
    (Path(run) / "summary.json").unlink()
    with pytest.raises(TrainingError, match=r"Failing\.load_state_dict failed: KeyError"):
        fit(plain, model=Wrapped, callbacks=[Failing], resume=True, listener=quiet)


def test_functions_given_in_python_do_the_same_as_their_names(tmp_path):
    def heavy(logits, targets, *, factor: float = 2.0):
        return factor * custom_parts.focal(logits, targets)

    named, given = (tiny(tmp_path / name, "train.epochs=1") for name in ("named", "given"))
    parts = {"model": custom_parts.small_net, "schedule": custom_parts.linear, "callbacks": [custom_parts.Best]}
    result = fit(given, loss=partial(heavy, factor=1.0), **parts, listener=quiet)
    assert result.config.train.loss.endswith("test_custom:heavy")
    assert fit(given, loss=partial(heavy, factor=1.0), **parts, resume=True, listener=quiet) == result
    settings = [*MODEL, FOCAL, "train.schedule.name=custom_parts:linear", "callbacks=[custom_parts:Best]"]
    train(load_config(named, *settings))
    assert weights_of(named) == weights_of(given)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of custom parts."""
    return Path(fit(tiny(tmp_path_factory.mktemp("custom"), *CUSTOM, "train.epochs=1"), listener=quiet).run)


def test_names_from_a_folder_are_imported_only_if_they_are_trusted(finished, tmp_path, monkeypatch, command):
    """A stranger's run, export and sweep, whose module would leave a trace."""
    (tmp_path / "strange_code.py").write_text("from custom_parts import *\nopen('trace', 'w').close()\n")
    theirs, exported, sweep = tmp_path / "runs" / "theirs", tmp_path / "theirs.safetensors", tmp_path / "sweep.yaml"
    assert command("export", finished, "--trust", "--out", exported)[0] == 0  # compared with the run
    shutil.copytree(finished, theirs)
    (theirs / "summary.json").unlink()
    sweep.write_text(SWEEP)
    for file in (theirs / "config.yaml", exported, sweep):
        file.write_bytes(file.read_bytes().replace(b"custom_parts:", b"strange_code:"))
    assert is_stored(fetch_file(f"file://{sweep}"))
    monkeypatch.setattr(custom, "_allowed", {})
    (tmp_path / "sweep.json").touch()
    commands = ["evaluate theirs", "predict theirs x.png", "export theirs", "predict theirs.safetensors x.png"]
    commands += ["train runs/theirs/config.yaml", "config runs/theirs/config.yaml", "tune sweep.yaml"]
    for line in (*commands, "train --resume theirs", "train --from theirs name=next", f"tune --resume {tmp_path}"):
        code, _, said = command(*line.split())
        assert (code, "strange_code:" in said, "add --trust" in said) == (2, True, True), said
    assert load_run("theirs").config.train.loss == "strange_code:focal"
    assert command("report", "theirs")[0] == 0
    assert "strange_code:small_net was not imported" in (theirs / "report.html").read_text()
    assert not (tmp_path / "trace").exists()
    assert command("evaluate", "theirs", "--trust")[0] == 0
    assert (tmp_path / "trace").exists()
    pixels = torch.rand(2, 3, 32, 32) * 255
    one, other = (load_classifier(path, trust=True).logits(pixels) for path in (exported, finished))
    torch.testing.assert_close(one, other)


def test_a_model_starts_from_the_weights_of_another_run_but_for_its_classifier(finished, tmp_path):
    config = tiny(tmp_path, *MODEL, f"model.weights={finished}")  # ten classes, not two
    run_of(config).create()
    write_run(run_of(config), config, resume=False)
    found, first = (
        trainer_of(config).model.state_dict(),
        load_file(next(finished.glob("checkpoints/*/model.safetensors"))),
    )
    assert [name for name in first if found[name].shape != first[name].shape] == ["6.bias", "6.weight"]
    assert torch.equal(found["0.weight"], first["0.weight"])


SWEEP = """
settings: {train: {loss: custom_parts:focal}}
space:
  options.loss.gamma: {uniform: [0, 3]}
  train.schedule.name: [cosine, custom_parts:linear]
"""


def test_a_sweep_over_options_and_names(tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    sweep = load_sweep(tmp_path / "sweep.yaml")
    trial = sweep.config("trial", {"options.loss.gamma": 1.5, "train.schedule.name": "custom_parts:linear"})
    assert (trial.options.loss, trial.options.schedule) == ({"gamma": 1.5}, {"final_lr": 0.0})
    old = "train.schedule.name=custom_parts:linear", "options.schedule.final_lr=0.1", "data.val_fraction=0"
    changed = load_sweep(tmp_path / "sweep.yaml", *old, "train.schedule.name=cosine", "data.name=custom_parts:stripes")
    assert changed.base["options"]["schedule"] == {}
    for change, problem in (
        ("space.options.loss.gamma={uniform: [-1, 3]}", r"space.options.loss.gamma: Input should be greater"),
        ("space.options.loss.gama=[1, 2]", r"space.options.loss.gama: unknown key; did you mean options.loss.gamma\?"),
        ("space.train.loss=[custom_parts:nothing]", "custom_parts has no function nothing"),
    ):
        with pytest.raises(ConfigError, match=problem):
            load_sweep(tmp_path / "sweep.yaml", change)
    (tmp_path / "sweep.yaml").write_text(sweep.to_yaml())
    assert open_sweep(tmp_path, trust=True).space == sweep.space

"""What Python gets: names, examples in docstrings, and what a result tells."""

from __future__ import annotations

import doctest
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
from runs import records, run_of, tiny, weights_of

from densenet_dist import Result, evaluate, fit, load_config, load_run, summary
from densenet_dist.cluster.resuming import check_changes, resume_config
from densenet_dist.errors import ConfigError, StorageError
from densenet_dist.run_folder import open_run


def test_importing_it_costs_nothing():
    code = "import sys, densenet_dist; print(*{'torch', 'ray', 'numpy', 'matplotlib', 'pydantic'} & set(sys.modules))"
    code += "\nimport densenet_dist.config; from densenet_dist.cli import main"
    code += "\nfor words in (['config', 'quickstart'], ['--help']):"
    code += "\n try: main(words)\n except SystemExit: print(*{'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("\n")
    assert done.stdout.endswith("\n\n")


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Result:
    config = tiny(tmp_path_factory.mktemp("api") / "runs", "train.epochs=2", "name=quickstart")
    return fit(config, listener=lambda event: None)


def test_examples_in_docstrings(result, monkeypatch):
    monkeypatch.chdir(Path(result.run).parents[1])
    for name in ("config", "cluster.launch", "cluster.result", "report.summary"):
        found = doctest.testmod(import_module(f"densenet_dist.{name}"), optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
        assert found.attempted > 0
        assert found.failed == 0


def test_result(result):
    assert [record["epoch"] for record in result.history] == [1, 2]
    assert {"train/loss", "val/top1", "lr", "seconds"} <= set(result.history[0])
    assert evaluate(result.run)["top1"] == result.summary["test/top1"]
    with pytest.raises(ConfigError, match="choose test, val or train"):
        evaluate(result.run, split="valid")
    assert Path(result.page).exists()
    assert result.config.train.epochs == 2
    assert f"top-1 {result.summary['test/top1']:.2%}" in repr(result)
    assert f"<td>top-1 {result.summary['test/top1']:.2%}" in result._repr_html_()


def test_resume_begins_goes_on_and_leaves_alone(tmp_path):
    config, events = tiny(tmp_path, "train.epochs=1"), []
    first = fit(config, resume=True, listener=events.append)
    assert [event["kind"] for event in events if event["kind"] in ("start", "end")] == ["start", "end"]
    events.clear()
    assert fit(config, resume=True, listener=events.append) == first
    assert [event["text"] for event in events] == ["the run tiny is finished already"]
    with pytest.raises(StorageError, match=r"exists already\n.*--resume .*fit\(config, resume=True\)"):
        fit(config, listener=events.append)


def test_an_extended_run_equals_one_that_was_as_long_from_the_start(tmp_path):
    settings = ("train.schedule.name=multistep", "train.schedule.milestones=[1, 3]")
    whole, short = (tiny(tmp_path, *settings, f"name={name}") for name in ("whole", "short"))
    fit(replace(whole, train=replace(whole.train, epochs=4)), listener=lambda event: None)
    fit(replace(short, train=replace(short.train, epochs=2)), listener=lambda event: None)
    for epochs in (4, 4):
        longer = resume_config(run_of(short), [f"train.epochs={epochs}"])
        extended = fit(longer, resume=True, listener=lambda event: None)
        assert extended.summary["epochs"] == extended.config.train.epochs == 4
    assert weights_of(short) == weights_of(whole)
    assert records(short) == records(whole)
    for setting, message in (("train.epochs=3", r"train.epochs: 4 -> 3\n.*name=NEW"), ("train.lr=9.0", "-> 9.0\n")):
        with pytest.raises(ConfigError, match=message):
            fit(load_config(longer, setting), resume=True, listener=list)
    assert fit(longer, resume=True, listener=list) == extended, "its results are still there"
    for setting, message in (
        ("train.schedule.name=cosine", "only runs with schedule constant, multistep, plateau"),
        ("train.early_stopping={enabled: true, patience: 1, min_delta: 9.0}", "stopped early"),
    ):
        run = fit(tiny(tmp_path, f"name=run-{len(message)}", *settings, setting), listener=lambda event: None).run
        with pytest.raises(ConfigError, match=message):
            check_changes(open_run(run), resume_config(open_run(run), ["train.epochs=9"]))
    for settings in (["name=other"], [f"storage={tmp_path}/other"]):
        with pytest.raises(ConfigError, match="a resumed run stays in its folder"):
            resume_config(run_of(short), settings)
    assert resume_config(run_of(short), [f"storage={tmp_path}/", "name=short"]) == extended.config


def test_a_run_is_loaded_again_finished_or_not(tmp_path, result):
    assert load_run(result.run) == result
    with pytest.raises(StorageError, match="there is no run at"):
        load_run(tmp_path / "none")
    run = tmp_path / "begun"
    run.mkdir()
    (run / "config.yaml").write_text((Path(result.run) / "config.yaml").read_text())
    begun = load_run(run)
    assert begun.history == []
    with pytest.raises(StorageError, match="no complete epoch to plot"):
        begun.plot()
    (run / "summary.json").write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        load_run(run)


def test_summary_counts_what_is_documented():
    table = summary(load_config("cifar10_notebook"))
    assert table.parameters.trainable == 3_532_210
    assert sum(layer.parameters for layer in table.layers if layer.is_leaf) == table.parameters.total
    assert "\ntrainable parameters: 3,532,210\n" in str(table)
    config = load_config("folder")
    assert summary(config, num_classes=7).layers[-1].shape == (7,)
    with pytest.raises(ConfigError, match="num_classes"):
        summary(config)

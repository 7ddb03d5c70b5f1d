"""The record of a sweep: its trials' figures, its files, and what the console says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import ray
from optuna.trial import TrialState

from densenet_dist import custom
from densenet_dist.cluster.ray_tune import _PastTrial, make_scheduler, make_searcher, points_to_try
from densenet_dist.cluster.sweep import SweepRecord, open_sweep, tune
from densenet_dist.cluster.tune_hooks import TuneHooks
from densenet_dist.config import load_config
from densenet_dist.errors import ConfigError, StorageError
from densenet_dist.run_folder import RunFolder
from densenet_dist.sweep.definition import Sweep, load_sweep
from densenet_dist.sweep.display import SweepConsole, SweepJsonLines
from densenet_dist.sweep.results import (
    BEST_FILE,
    RESULTS_FILE,
    SweepResult,
    Trial,
    TrialFile,
    add_epoch,
    best_trial,
    format_results,
    ranked,
    trials_on_record,
)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "mine.yaml").write_text(
        "settings: {train: {epochs: 3}}\nspace: {train.lr: {loguniform: [0.01, 1]}, model.num_layers: [[1, 1], [2, 2]]}"
    )
    return load_sweep(tmp_path / "mine.yaml", f"storage={tmp_path}/what?")


@pytest.fixture
def folder(sweep: Sweep) -> RunFolder:
    folder = RunFolder(sweep.settings.storage, sweep.settings.name)
    folder.create()
    return folder


def trial(name: str, *values: float, status: str = "finished", lr: float = 0.1, layers: int = 1) -> Trial:
    made = Trial(f"trial-{name}", {"train.lr": lr, "model.num_layers": [layers, layers]}, status)  # type: ignore[arg-type]
    for epoch, value in enumerate(values, 1):
        add_epoch(made, {"epoch": epoch, "seconds": 1.5, "val/top1": value, "val/loss": 1 - value}, "val/top1", True)
    return made


def write_results(folder: RunFolder, sweep: Sweep, trials: list[Trial]) -> None:
    for name, text in format_results(sweep, trials).items():
        folder.write(name, text)


def leave(sweep: Sweep, name: str, *values: float, **note: object) -> Path:
    """Make the folder of a trial that had these values."""
    run = RunFolder(sweep.folder, name)
    run.write("trial.json", json.dumps({"overrides": {"train.lr": 0.1}} | note))
    run.write("config.yaml", "train: {lr: 0.2}\n")
    for epoch, value in enumerate(values, 1):
        line = {f"{split}/{key}": value for split in ("train", "val") for key in ("loss", "top1", "top5")}
        run.append("metrics.jsonl", json.dumps({"epoch": epoch, "global_step": epoch, **line}) + "\n")
    return run.path


def test_the_best_epoch_counts():
    found = trial("000", 0.2, 0.5, 0.5, 0.4)
    assert (found.metric, found.best_epoch, found.epochs, found.seconds) == (0.5, 2, 4, 6.0)
    assert found.metrics == {"val/top1": 0.5, "val/loss": 0.5}
    assert found.history == {1: 0.2, 2: 0.5, 3: 0.5, 4: 0.4}
    low = Trial("trial-001", {})
    for epoch, value in enumerate((0.5, 0.2, 0.4), 1):
        add_epoch(low, {"epoch": epoch, "val/loss": value}, "val/loss", maximize=False)
    assert (low.metric, low.best_epoch) == (0.2, 2)
    found = trial("000", math.nan, 0.1, math.inf)
    assert (found.metric, found.best_epoch, found.epochs, found.history) == (0.1, 2, 3, {2: 0.1})


def test_ranks():
    trials = [trial("000", 0.1), trial("001"), trial("002", 0.3), trial("003", 0.9, status="failed"), trial("004", 0.3)]
    names = ["trial-002", "trial-004", "trial-000", "trial-001", "trial-003"]
    assert [one.name for one in ranked(trials, maximize=True)] == names
    assert best_trial(trials, maximize=True) is trials[2]
    assert best_trial(trials, maximize=False) is trials[0]
    assert best_trial([trials[1], trials[3]], maximize=True) is None


def test_files(sweep, folder):
    write_results(folder, sweep, [trial("000"), trial("001", 0.5, status="failed")])
    assert json.loads((folder.path / RESULTS_FILE).read_text())["best"] is None
    assert not (folder.path / BEST_FILE).exists()
    failed = trial("001", status="failed", lr=0.7)
    failed.error = "the loss is NaN"
    write_results(folder, sweep, [trial("000", -0.1), failed, trial("002", 0.2, 0.4, lr=0.3, layers=2)])
    content = json.loads((folder.path / RESULTS_FILE).read_text())
    trials = content.pop("trials")
    assert content == {"sweep": "mine", "metric": "val/top1", "mode": "max", "best": "trial-002"}
    assert [entry["name"] for entry in trials] == ["trial-000", "trial-001", "trial-002"]
    assert (trials[1]["error"], trials[2]["history"]) == (failed.error, {"1": 0.2, "2": 0.4})


def test_best_yaml_is_a_configuration(sweep, folder):
    best = trial("002", 0.2, 0.4, lr=0.3, layers=2)
    best.overrides["data.root"] = "two\nlines \u2028\ufffe"
    write_results(folder, sweep, [best, trial("000", 0.1)])
    config = load_config(folder.path / BEST_FILE)
    assert config == sweep.config("mine-best", best.overrides, storage=sweep.settings.storage)
    assert (config.train.lr, config.model.num_layers, config.train.epochs) == (0.3, (2, 2), 3)
    head = "# The best of mine: trial-002, val/top1 0.4000, epoch 2.\n#   train.lr: 0.3\n"
    assert (folder.path / BEST_FILE).read_text().startswith(head)


def test_trials_on_record(sweep, folder):
    finished = leave(sweep, "trial-002", 0.1, 0.3, parameters=77)
    test = {"test/loss": 2.0, "test/top1": 0.25, "test/top5": 0.9}
    summary = {"status": "finished", "epochs": 2, "global_step": 2, "train_seconds": 3, "best": {"epoch": 2}, **test}
    (finished / "summary.json").write_text(json.dumps(summary))
    with open(finished / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 2, "global_step": 2, **test}) + "\n")
    leave(sweep, "trial-000", 0.2, status="stopped")
    leave(sweep, "trial-001", status="failed", cause="NaN")  # of an older version, as in trial-003
    broken = leave(sweep, "trial-003", 0.1, 0.2, taken=["trial-002", "step-00000005", {}])
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "tra')
    (leave(sweep, "trial-004", 0.1) / "trial.json").write_text('{"overri')
    (leave(sweep, "trial-006", 0.1) / "metrics.jsonl").write_text("[1]\n[2]\n")
    (leave(sweep, "trial-007", 0.1) / "summary.json").write_text("[]")
    (leave(sweep, "trial-008", 0.1) / "trial.json").unlink()
    (folder.path / "ray").mkdir()
    leave(sweep, "other", 0.9)
    (folder.path / "trial-005").mkdir()  # killed before its first line

    found = {one.name: one for one in trials_on_record(folder, sweep)}
    assert list(found) == [f"trial-00{number}" for number in (0, 1, 2, 3, 4, 6, 7, 8)]
    status = ["stopped", "failed", "finished", "interrupted", "failed", "failed", "failed", "failed"]
    assert [one.status for one in found.values()] == status
    for number, file in ((4, "trial.json"), (6, "metrics.jsonl"), (7, "summary.json"), (8, "trial.json")):
        assert f"trial-00{number}/{file}" in found[f"trial-00{number}"].error
    assert (found["trial-000"].overrides, found["trial-001"].error) == ({"train.lr": 0.1}, "NaN")
    assert (found["trial-002"].metric, found["trial-002"].parameters) == (0.3, 77)
    assert found["trial-002"].metrics.items() >= {"train/loss": 0.3, "val/top1": 0.3, "test/top1": 0.25}.items()
    assert (found["trial-003"].history, found["trial-003"].overrides) == ({1: 0.1, 2: 0.2}, {"train.lr": 0.1})


@pytest.mark.parametrize("name", ["asha", "median"])
def test_schedulers_compare_with_earlier_trials(sweep, name):
    scheduler = f"scheduler={{name: {name}, reduction_factor: 2, min_trials: 2}}"
    asked = load_sweep(Path(sweep.settings.storage).parent / "mine.yaml", scheduler)
    ended = [trial("000", 0.5, 0.6), trial("001", 0.6, 0.7, status="stopped"), trial("002", status="failed")]
    resumed = [trial("003", 0.5, 0.6, status="interrupted"), trial("004", 0.6, 0.7, status="interrupted")]
    decisions = []
    for past in (ended, resumed, []):
        scheduler, new = make_scheduler(asked, past), Mock(trial_id="new")
        for added in [*(_PastTrial(one.name) for one in past if one.status == "interrupted"), new]:
            scheduler.on_trial_add(None, added)
        result = {"epoch": 1, "val/top1": 0.1}
        decisions.append(scheduler.on_trial_result(Mock(get_live_trials=list), new, result))
    assert decisions == ["STOP", "STOP", "CONTINUE"]


def test_optuna_learns_the_last_values_of_trials_that_ended_before(sweep):
    asked = load_sweep(Path(sweep.settings.storage).parent / "mine.yaml", "search.name=optuna")
    ended = [trial("000", 0.6, 0.5), trial("001", 0.2, status="failed"), trial("002")]
    searcher = make_searcher(asked, [*ended, trial("004", 0.3, status="interrupted", lr=0.07)], 2)
    assert [one.value for one in searcher._ot_study.get_trials(states=(TrialState.COMPLETE,))] == [0.5, 0.2]
    assert searcher.suggest("resumed")["train.lr"] == 0.07


def test_resuming_and_extending_a_sweep(sweep, folder, monkeypatch):
    ended = [trial("000", 0.5, 0.6), trial("001", 0.6, lr=0.2)]
    for one in ended:
        leave(sweep, one.name, *one.history.values(), overrides=one.overrides, status="stopped")
    folder.write("sweep.yaml", load_sweep(Path(sweep.settings.storage).parent / "mine.yaml", "trials=2").to_yaml())
    result = tune(open_sweep(folder.location), resume=True, listener=list)
    assert [(one.status, one.history) for one in result.trials] == [("stopped", one.history) for one in ended]
    assert not ray.is_initialized(), "all trials have ended: no cluster is needed"
    assert (folder.path / "sweep.html").exists()

    other = load_sweep(folder.path / "sweep.yaml", "space.train.lr=[0.5, 0.7]")
    with pytest.raises(ConfigError, match=r"space: .* which a resumed sweep cannot change"):
        tune(other, resume=True, listener=list)
    for setting, problem in (("trials=1", "can only be extended"), ("train.epochs=5", "only trials and max_hours can")):
        with pytest.raises(ConfigError, match=problem):
            open_sweep(folder.location, setting)
    extended = open_sweep(folder.location, "trials=3", "max_hours=1")
    [point] = points_to_try(extended, result.trials)
    assert point not in [one.overrides for one in ended]
    folder.write("sweep.yaml", extended.to_yaml())
    with SweepRecord(folder, extended, list) as record, monkeypatch.context() as full:
        full.setattr(TrialFile, "write", Mock(side_effect=StorageError("the disk is full")))
        record.update("trial-000", {}, "failed", {}, "NaN")
    assert [one.status for one in trials_on_record(folder, extended)] == ["failed", "stopped"], "it is written later"
    assert open_sweep(folder.location).trials == 3


def test_a_time_limit_interrupts_what_runs(sweep, folder):
    state = Mock()
    with SweepRecord(folder, sweep, list) as record:
        record.update("trial-000", {}, "running", {})
        hooks = TuneHooks(1.0, record, state)
        assert not hooks.stop_all()
        hooks._started -= 3601
        assert hooks.stop_all()
    assert hooks.ended_by == "limit of 1 hour reached"
    assert [one.status for one in record.trials] == ["interrupted"], "--resume continues it"
    state.stop.remote.assert_called_once_with()
    result = SweepResult(sweep, folder.uri, record.trials, None, hooks.ended_by)
    assert result.figures()["trials"] == "1, 1 interrupted"
    assert result.commands()["resume"].startswith("densenet-dist tune --resume ")


def test_what_the_console_says(sweep, capsys, monkeypatch):
    monkeypatch.setattr(custom, "_allowed", {})  # by other tests of this process
    first, failed = trial("000", 0.25, 0.5, status="stopped"), trial("001", status="failed", lr=0.7)
    failed.error = "loss [is] NaN"
    last = trial("002", 0.75, lr=0.0123456, layers=2)
    everyone = [first, failed, last]
    with SweepConsole() as console:
        console({"kind": "sweep", "sweep": sweep, "trials": [first, trial("009", status="interrupted")], "folder": "F"})
        told = [("epoch", first, first), ("stopped", first, first), ("failed", failed, first), ("finished", last, last)]
        for state, one, best in told:
            console({"kind": "trial", "state": state, "trial": one, "best": best, "all": everyone})
        console({"kind": "note", "text": "a [note]"})
        console.finish(SweepResult(sweep, "F" * 200, everyone, last, None))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[:9] == [
        "16 trials, random search, asha, highest val/top1; folder F",
        "  train.lr: loguniform [0.01, 1]",
        "  model.num_layers: choice [[1, 1], [2, 2]]",
        "resumed: 1 trial ended, 1 to resume",
        "trial-000  stopped after 2 epochs    val/top1 0.5000  lr=0.1  num_layers=[1, 1]  *",
        "trial-001  failed                    val/top1 -  lr=0.7  num_layers=[1, 1]",
        "  loss [is] NaN",
        "trial-002  finished 1 epoch          val/top1 0.7500  lr=0.01235  num_layers=[2, 2]  *",
        "a [note]",
    ]
    assert [line.split()[0] for line in lines[10:14]] == ["trial", "trial-002", "trial-000", "trial-001"]
    assert lines[-2].split() == ["train", "it", "again", "densenet-dist", "train", f"{'F' * 200}/best.yaml"]


def test_json_for_a_program(sweep, capsys):
    first, failed = trial("000", 0.25, 0.5, status="stopped"), trial("001", status="failed", lr=math.inf)
    failed.error = "loss is NaN"
    with pytest.raises(ConfigError), SweepJsonLines() as lines:  # noqa: PT012
        print("what a library says")
        lines({"kind": "trial", "state": "epoch", "trial": first, "best": first, "all": [first]})
        lines({"kind": "note", "text": "a note"})
        lines.finish(SweepResult(sweep, "F", [first, failed], first, None))
        raise ConfigError("wrong")
    out, err = capsys.readouterr()
    assert err == "what a library says\n"
    note, end, error = map(json.loads, out.splitlines())
    assert (note["event"], note["level"], note["text"]) == ("note", "info", "a note")
    assert (end["event"], end["status"], end["folder"], end["best"]) == ("end", "finished", "F", "trial-000")
    assert end["trials"][0]["history"] == {"1": 0.25, "2": 0.5}
    assert (end["trials"][1]["overrides"]["train.lr"], end["trials"][1]["error"]) == (None, "loss is NaN")
    assert (error["event"], error["type"], error["exit_code"]) == ("error", "ConfigError", 2)
    known = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    assert all(f"`{key}`" in known for line in (note, end, error, end["trials"][0]) for key in line)

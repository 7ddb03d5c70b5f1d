"""The command line as a user meets it: help, errors with their exit codes, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import densenet_dist
from densenet_dist import load_config
from densenet_dist.cluster.launch import is_writer
from densenet_dist.lease import Holder

ROOT = Path(__file__).parent.parent
LIMITS = ("data.limit=128", "data.test_limit=128")
QUICK = ("model.num_layers=[1,1]", "model.growth_rate=4", *LIMITS, "train.epochs=1", "cluster.engine=local")


def test_help_of_every_command(command):
    names = ["train", "evaluate", "report", "predict", "export", "tune", "config", "doctor", "submit"]
    for name in ["", *names, "data prepare"]:
        code, out, _ = command(*name.split(), "--help")
        assert code == 0
        assert f"densenet-dist {name}".rstrip() in out.partition("Usage")[2].partition("\n")[2]  # an example
        assert "None" not in out
    assert command("train", "-h") == command("train", "--help")


def test_version(command):
    assert command("--version") == (0, f"densenet-dist {densenet_dist.__version__}\n", "")


def test_configurations_that_come_along(command, tmp_path):
    code, out, _ = command("config", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == sorted(path.stem for path in ROOT.glob("configs/*.yaml"))
    assert "The first thing to run" in out
    whole = command("config", str(ROOT / "configs" / "quickstart.yaml"))
    for name in ("quickstart", "configs/quickstart.yaml"):  # from a folder without any
        assert command("config", name) == whole
    (tmp_path / "quickstart.yaml").write_text("train: {epochs: 77}")  # a file of one's own comes first
    (tmp_path / "quickstart").mkdir()  # a run's folder, say
    assert "epochs: 77" in command("config", "quickstart.yaml")[1]
    assert command("config", "quickstart")[1] == whole[1]


def test_every_config_resolves_and_opens_with_its_command(command):
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        code, out, err = command("config", str(path))
        assert code == 0, err
        assert yaml.safe_load(out)["name"] == path.stem
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        verb = "tune" if path.name.startswith("sweep_") else "train"
        assert any(f"densenet-dist {verb} configs/{path.name}" in line for line in head)


@pytest.mark.parametrize(
    "case",
    [
        (2, "train"),
        (2, "evaluate quickstart more.yaml", "more.yaml: the run has its own config.yaml; only key=value settings"),
        (2, "predict k24.onnx photo.jpg --checkpoint last", "an exported file with one checkpoint"),
        (2, "train quickstart --epochs 3", "Settings are given without dashes: train.epochs=3"),
        (2, "train cifar10_notebok", "error: there is no config file cifar10_notebok; did you mean cifar10_notebook?"),
        (2, "train nonsense", "densenet-dist config --list"),
        (2, "train elsewhere/quickstart.yaml"),
        (2, "train sweep_quickstart", "is a sweep file", "densenet-dist tune"),
        (2, "tune configs/quickstart.yaml", "densenet-dist train", "base: quickstart.yaml"),
        (2, "train quickstart train.epochs=many x=1", "error: 2 problems in the configuration:\n", "'many'"),
        (2, "train quickstart lr=1 data.name=cifar11", "lr: unknown key; did you mean train.lr?", "data.name: "),
        (2, "train quickstart model.num_layers=[2,2,2,2,2,2,2]", "images of 32x32 are too small for 7 blocks"),
        (2, "data prepare imagenet", "known: shapes, cifar10, cifar100"),
        (2, "data prepare cifar10 --root=~no-such-user/x"),
        (5, "train --resume elsewhere", "there is no run at"),
        (1, f"train quickstart {' '.join(QUICK)} train.lr=1e30", "the loss is NaN or infinite at step"),
    ],
    ids=lambda case: case[1],
)
def test_mistakes_end_with_a_message_and_an_exit_code(command, case):
    code, line, *texts = case
    found, _, err = command(*line.split())
    assert found == code
    assert [text for text in texts if text not in err] == []
    assert "Traceback" not in err


def test_errors_are_json_or_a_traceback_if_asked_for(command):
    code, out, err = command("train", "quickstart", "train.epochs=many", "--json")
    (line,) = map(json.loads, out.splitlines())
    assert (code, line["event"], line["type"], line["exit_code"]) == (2, "error", "ConfigError", 2)
    assert err == f"error: {line['message']}\n"
    assert "Traceback" in command("train", "nothing", "--debug")[2]
    for source in ("x" * 400, "x" * 400 + ".yaml", f"name={'[' * 400}", "a\0b.yaml"):  # what can be no file
        code, _, err = command("config", source)
        assert (code, "this is a bug" in err) == (2, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(command):
    code, _, err = command("train", "quickstart", *QUICK, "cluster.device=cuda")
    assert code == 3
    assert "cluster.device=cuda, but torch sees no GPU" in err
    assert "cluster.device=cpu" in err


@pytest.mark.parametrize(
    "said",
    [
        {"RANK": "0"},
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
        {"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    ],
)
def test_an_environment_that_torchrun_does_not_make(command, monkeypatch, said):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    code, _, err = command("train", "quickstart", *QUICK)
    assert (code, "start them with torchrun" in err, Path("runs").exists()) == (3, True, False)
    assert is_writer(load_config("quickstart")), "Ray has ranks of its own"


def test_what_failed_before_its_first_step_can_be_started_again(command):
    storage, quick = "what? runs", (*QUICK, "storage=what? runs")
    code, _, err = command("train", "quickstart", *quick, "data.name=cifar10", "data.download=false")
    assert code == 4
    assert "cifar-10-binary.tar.gz" in err
    assert "data prepare cifar10" in err
    assert command("train", "quickstart", *quick)[0] == 0
    assert yaml.safe_load(Path(storage, "quickstart/config.yaml").read_text())["data"]["name"] == "shapes"
    code, _, err = command("train", "quickstart", *quick)
    assert code == 5
    assert f"exists already\n  resume it: densenet-dist train --resume '{Path(storage).absolute()}/quick" in err


def test_relative_storage_in_a_submitted_job(command, tmp_path, monkeypatch):
    # Where Ray unpacks what `ray job submit --working-dir` sends, and deletes it after the job.
    folder = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    code, _, err = command("train", "quickstart", *QUICK)
    assert code == 2
    assert "storage: runs is relative" in err
    assert command("train", "quickstart", *QUICK, f"storage={tmp_path / 'runs'}")[0] == 0


def test_train_evaluate_resume(command):
    code, out, err = command("train", "quickstart", *QUICK, "train.epochs=2")
    assert (code, err) == (0, "")
    folder = Path("runs/quickstart").absolute()
    summary = json.loads((folder / "summary.json").read_text())
    assert re.search(rf"test top-1 +{summary['test/top1']:.2%}", out)
    assert f"tensorboard --logdir {folder.parent}" in out

    code, out, _ = command("evaluate", "quickstart")
    assert code == 0
    assert f"top-1 {summary['test/top1']:.2%}" in out
    code, out, _ = command("evaluate", str(folder), "--split", "val", "--json")
    assert json.loads(out)["top1"] == summary["best"]["val/top1"]

    # As a process leaves it that is killed after summary.json was written.
    (folder / "report.html").unlink()
    (folder / "lease.json").write_text(replace(Holder.here(), start_time="1").to_json())
    code, out, _ = command("train", "--resume", "quickstart")
    assert code == 0
    assert "finished already" in out
    assert "Confusion matrix" in (folder / "report.html").read_text()
    assert not (folder / "lease.json").exists()
    code, _, err = command("train", "--resume", "quickstart", "train.lr=0.5", "cluster.max_failures=1")
    assert code == 2
    assert "a resumed run cannot change:\n  train.lr: 0.05 -> 0.5\n" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_output_on_a_full_disk_ends_a_command_with_5_but_no_training(command, monkeypatch):
    train = ("train", "quickstart", *QUICK)
    for wanted, *arguments in ((5, "config", "--list"), (2, "x"), (0, *train), (0, *train, "--json", "name=json")):
        with open("/dev/full", "w") as out, open("/dev/full", "w") as err:
            monkeypatch.setattr("sys.stdout", out)
            monkeypatch.setattr("sys.stderr", err)
            assert command(*arguments)[0] == wanted


@pytest.mark.slow
def test_torchrun_trains_together_and_speaks_once(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line = [*launcher, "-m", "densenet_dist", "train", "quickstart", *QUICK, f"storage={tmp_path}"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 x CPU") == 1
    assert done.stdout.count("test top-1") == 1
    assert json.loads((tmp_path / "quickstart" / "summary.json").read_text())["status"] == "finished"


def test_events_as_json(command):
    code, out, err = command("train", "quickstart", *QUICK, "--json")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    events = [line["event"] for line in lines if line["event"] not in ("progress", "note")]
    assert events == ["run", "start", "epoch", "end"]
    end = lines[-1]
    summary = json.loads(Path("runs/quickstart/summary.json").read_text())
    assert {key: end[key] for key in summary} == summary
    assert end["images_per_s"] > 0
    assert 0 < end["goodput"] <= 1
    assert all(Path(path).exists() and Path(path).is_absolute() for path in end["files"].values())
    known = (ROOT / "docs" / "commands.md").read_text()
    assert {key for line in lines for key in line if f"`{key}`" not in known and "goodput/" not in key} == set()


def test_home_folder(command, tmp_path, monkeypatch):
    """The shell expands ``~`` only where an argument begins with it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.yaml").write_text("train: {epochs: 77}")
    assert "epochs: 77" in command("config", "~/mine.yaml")[1]
    for arguments, code in (
        (["data", "prepare", "cifar10", "--no-download", "--root=~/x"], 4),
        (["train", "quickstart", *QUICK, "data.name=cifar10", "data.download=false", "data.root=~/x"], 4),
        (["evaluate", "~/x"], 5),
        (["predict", "~/x.onnx", "a.png"], 6),
    ):
        found, _, err = command(*arguments)
        assert (found, f"{tmp_path}/home/x" in err) == (code, True), err
    assert not Path("~").exists()


def test_doctor(command, monkeypatch):
    code, out, err = command("doctor", "cluster.engine=local")
    assert code == 0, out + err
    for text in ("torch 2.", "Ray", "DALI", "C++ kernels", "storage", "shapes is generated", "ready"):
        assert text in out
    assert list(Path("runs").iterdir()) == [], "a check leaves nothing behind"
    Path("file").write_text("in the way")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    wrong = ("storage=file/runs", "data.name=cifar10", "data.download=false", "log.mlflow.enabled=true")
    code, out, _ = command("doctor", "cluster.engine=local", *wrong)
    assert (code, "not ready: storage, data, loggers" in " ".join(out.split())) == (3, True), out

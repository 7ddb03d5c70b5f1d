"""What is started twice goes on: launch/start.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

TINY = """
model: {variant: densenet_bc, growth_rate: 4, num_layers: [1, 1]}
data: {name: shapes, limit: 75, loader: torch}
train: {epochs: 1, global_batch_size: 16, lr: 0.05}
cluster: {engine: local, device: cpu, cpus_per_worker: 1}
"""


def given(folder):
    return [f"storage={folder}", "name=first", "train.epochs=3"]


@pytest.mark.parametrize("command", ["train", "tune"])
def test_what_is_not_there_is_started(starter, tmp_path, command):
    told = starter.arguments(command, "some.yaml", *given(tmp_path))
    assert told == [command, "some.yaml", *given(tmp_path)]


def test_a_run_goes_on_with_the_same_settings(starter, tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.yaml").touch()
    told = starter.arguments("train", "some.yaml", *given(tmp_path))
    assert told == ["train", "--resume", f"{tmp_path}/first", *given(tmp_path)]
    assert starter.arguments("tune", "some.yaml", *given(tmp_path))[:2] == ["tune", "some.yaml"]


def test_a_sweep_goes_on_with_its_own_settings(starter, tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "sweep.yaml").touch()
    assert starter.arguments("tune", "some.yaml", *given(tmp_path)) == ["tune", "--resume", f"{tmp_path}/first"]
    assert starter.arguments("train", "some.yaml", *given(tmp_path))[:2] == ["train", "some.yaml"]


def test_on_an_object_store(starter, s3):
    from densenet_dist.run_folder import RunFolder

    place = s3 % "/launch"
    settings = [f"storage={place}", "name=first"]
    assert starter.arguments("train", "some.yaml", *settings) == ["train", "some.yaml", *settings]
    RunFolder(place, "first").write("config.yaml", "")
    base, _, query = place.partition("?")
    assert starter.arguments("train", "some.yaml", *settings)[:3] == ["train", "--resume", f"{base}/first?{query}"]
    assert not starter.finished(*settings)
    RunFolder(place, "first").write("summary.json", "{}")
    assert starter.finished(*settings)


@pytest.mark.parametrize("missing", [["storage=/tmp"], ["name=first"]])
def test_place_and_name_must_be_given(starter, missing):
    with pytest.raises(SystemExit, match="must be given"):
        starter.arguments("train", "some.yaml", *missing)


@pytest.mark.slow
def test_a_run_started_twice(root, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    settings = [f"storage={tmp_path}", "name=first"]

    def run(*arguments):
        command = [sys.executable, root / "launch" / "start.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    assert run("finished", *settings).returncode == 1
    first = run("train", "tiny.yaml", *settings)
    assert first.returncode == 0, first.stderr
    assert run("finished", *settings).returncode == 0
    again = run("train", "tiny.yaml", *settings)
    assert again.returncode == 0, again.stderr
    assert "finished already" in again.stdout
    other = run("train", "tiny.yaml", *settings, "train.lr=0.1")
    assert other.returncode == 2
    assert "a resumed run cannot change" in other.stderr
    assert run("evaluate").returncode == 1

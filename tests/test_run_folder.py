"""A run's folder on a disk and on an object store (a real server that speaks S3)."""

import json
import os
import uuid
from pathlib import Path

import pytest
import torch
from runs import save

from densenet_dist.config import load_config
from densenet_dist.errors import StorageError
from densenet_dist.lease import hold
from densenet_dist.run_folder import RunFolder
from densenet_dist.sweep.results import TrialFile
from densenet_dist.trackers import links
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.inputs import read_metadata
from densenet_dist.train.results import read_test_results
from densenet_dist.train.snapshot import Position, Snapshot

DAMAGED = {"empty": b"\n\n", "torn": b'{"a":\n1', "list": b"[]\n[]", "bytes": b"\xff\n\xff", "deep": b"[\n" * 10**5}
DAMAGED["pipe"] = None


@pytest.fixture(params=["disk", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "not" / "there" / "yet")
    uri: str = request.getfixturevalue("s3")
    return uri % f"/{uuid.uuid4().hex}/runs"


def snapshot(step: int, top1: float) -> Snapshot:
    weights = {"weight": torch.full((3, 4), float(step))}
    return Snapshot(weights, weights, {"lr": 0.1}, Position(0, step, step), {"val/top1": top1})


def test_what_one_process_writes_another_reads(storage):
    run = RunFolder(storage, "run")
    run.create()
    run.create()
    assert not run.exists()  # no run has started: there is no configuration
    assert not list(run.path.iterdir())
    run.write("config.yaml", "a long first text")
    run.write("config.yaml", "name: größe\n")
    other = RunFolder(storage, "run")
    assert other.exists()
    assert not other.exists("nothing.yaml")
    assert other.fetch("config.yaml").read_text(encoding="utf-8") == "name: größe\n"
    assert os.listdir(run.path) == ["config.yaml"]
    assert not RunFolder(storage, "other").exists()


def test_folders_are_published_fetched_and_removed_whole(storage):
    run = RunFolder(storage, "run")
    run.create()
    for name in ("tb/events.1", "tb/deeper/events.2", "single"):
        path = run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 1000)
    run.publish("tb", "single", "not there")
    other = RunFolder(storage, "run")
    assert other.names("tb") == {"events.1", "deeper"}
    assert other.names("not there") == set()
    folder = other.fetch("tb")
    assert (folder / "events.1").read_bytes() == b"tb/events.1" * 1000
    assert (folder / "deeper" / "events.2").read_bytes() == b"tb/deeper/events.2" * 1000
    other.remove("tb")
    other.remove("tb")  # no error
    assert not other.exists("tb")
    assert not (other.path / "tb").exists()
    assert RunFolder(storage, "run").exists("single")


def test_without_a_list_only_a_checkpoint_that_was_uploaded_completely_counts(s3, monkeypatch):
    storage, publish = s3 % f"/{uuid.uuid4().hex}", RunFolder.publish
    for cut, listed in (("state.pt", []), ("manifest.json", ["step-00000001"])):

        def die(self: RunFolder, *relative: str, cut: str = cut) -> None:
            for name in relative:
                if name.endswith(cut):
                    raise KeyboardInterrupt
                publish(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "publish", die)
            with pytest.raises(KeyboardInterrupt):
                save(CheckpointStore(RunFolder(storage, "run")), snapshot(1, 0.5))
        assert [entry.name for entry in CheckpointStore(RunFolder(storage, "run")).entries] == listed


def test_a_folder_that_cannot_be_made_is_an_error_with_a_way_out(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"(?s)file/run cannot be written: .*storage=PATH_OR_URI") as caught:
        RunFolder(str(tmp_path / "file"), "run").create()
    assert caught.value.exit_code == 5
    with pytest.raises(StorageError, match="cannot be written"):
        RunFolder(str(tmp_path / "file"), "run").write("config.yaml", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_leaves_the_old_text(tmp_path):
    run = RunFolder(str(tmp_path), "run")
    run.write("config.yaml", "old")
    (tmp_path / "run" / f".config.yaml.{os.uname().nodename}.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left on device"):
        run.write("config.yaml", "new")
    assert run.fetch("config.yaml").read_text() == "old"
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"run/metrics.jsonl cannot be written: No space left on device"):
        run.append("metrics.jsonl", "{}\n")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_and_a_pipe_is_not_waited_for(tmp_path, content):
    run = RunFolder(str(tmp_path), "run")
    readers = {
        "env.json": lambda: run.read_json("env.json"),
        "summary.json": run.read_summary,
        "metrics.jsonl": run.read_records,
        "classes.json": lambda: read_metadata(run, load_config()),
        "test_results.json": lambda: read_test_results(run),
        "trial.json": lambda: run.read("trial.json", TrialFile),
    }
    for name in (*readers, "lease.json", "trackers/wandb.json"):
        path = run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path) if content is None else path.write_bytes(content)
    for name, read in readers.items():
        with pytest.raises(StorageError, match=rf"run/{name}\S* .*is (damaged: |not a regular file)") as caught:
            read()
        assert caught.value.exit_code == 5
    assert links(run) == {}
    with hold(run, lambda text: None):
        pass


def test_a_line_of_other_types_is_left_out(tmp_path):
    run = RunFolder(str(tmp_path), "run")
    whole = {"epoch": 1, "global_step": 5, "lr": 0.1, "train/loss": 2, "train/top1": 0.5, "train/top5": 0.9}
    changes = ({"epoch": None}, {"global_step": "many"}, {"lr": [1]}, {"lr": 10**400}, {"val/loss": 1.0})
    lines = [json.dumps(whole | change) for change in changes]
    run.write("metrics.jsonl", "\n".join([*lines, json.dumps(whole), "[1]", '{"epoch": 2, "glo']))
    assert run.read_records() == [whole]
    run.write("metrics.jsonl", "\n".join(lines))
    with pytest.raises(StorageError, match=r"metrics.jsonl is damaged: no line is a record"):
        run.read_records()


def test_what_is_not_there_is_an_error(s3):
    assert RunFolder(s3 % "/runs", "a").uri == "s3://bucket/runs/a"  # without the address' query
    with pytest.raises(StorageError, match=r"s3://nowhere/runs/a cannot be written") as caught:
        RunFolder((s3 % "/runs").replace("s3://bucket", "s3://nowhere"), "a").create()
    assert caught.value.exit_code == 5
    with pytest.raises(StorageError, match="cannot be read"):
        RunFolder(s3 % "/runs", "missing").fetch("config.yaml")
    for storage in ("s4://bucket/runs", "s3://bucket/runs?no_such_option=1", "://x"):
        with pytest.raises(StorageError, match="cannot be opened"):
            RunFolder(storage, "run")

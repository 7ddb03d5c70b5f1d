"""Checkpoints of another run, and `--resume` with other settings."""

import shutil

import pytest
from chaos_lab import LOCAL, Lab, cases, write_pictures


@pytest.mark.parametrize(
    ("setting", "before", "after"),
    cases(
        "exit 6 with the difference, before any step",
        ("model", "the checkpoint has another: model", "model.growth_rate", 4, 6),
        ("split", "the checkpoint has another: split", "data.val_fraction", 0.1, 0.2),
        ("batch-size", "the checkpoint has another: batch size", "train.global_batch_size", 64, 32),
        ("seed", "the checkpoint has another: seed", "seed", 0, 1),
    ),
)
def test_edited_configuration(lab: Lab, setting: str, before: float, after: float) -> None:
    run = lab.begin_and_kill(13)
    config = run.folder / "config.yaml"
    content = config.read_text()
    key = setting.rpartition(".")[2]
    assert f"{key}: {before}\n" in content
    config.write_text(content.replace(f"{key}: {before}\n", f"{key}: {after}\n"))
    lab.begin(resume=run.folder).fail(6, f"{setting}: {before} there, {after}")
    config.write_text(content)
    lab.begin(resume=run.folder).finish_like(lab.undisturbed(*LOCAL))
    lab.observe("exit 6; equal with its own config.yaml")


@pytest.mark.fault(
    "the checkpoint has two classes, the image folder three",
    "exit 6 with the difference, before any step",
)
def test_another_data_set(lab: Lab) -> None:
    settings = write_pictures(lab.folder / "pictures", "one", "two")
    run = lab.begin_and_kill(8, *settings, "train.global_batch_size=16")
    write_pictures(lab.folder / "pictures", "three")
    lab.begin(resume=run.folder).fail(6, "['one', 'two', '-']", "['one', 'three', 'two']")
    lab.observe("exit 6")


@pytest.mark.fault(
    "--resume with another learning rate and number of workers",
    "exit 2, naming the setting that may change",
)
def test_settings_refused(lab: Lab) -> None:
    run = lab.begin_and_kill(13)
    words = ("a resumed run cannot change:", "train.lr: 0.05 -> 0.1", "it may change:", "cluster.cpus_per_worker")
    lab.begin("train.lr=0.1", "cluster.cpus_per_worker=1", resume=run.folder).fail(2, *words)
    lab.observe("exit 2, both lists shown")


@pytest.mark.fault("--resume with settings that may change", "they are shown; equal")
def test_settings_allowed(lab: Lab) -> None:
    run = lab.begin_and_kill(13)
    again = lab.begin("checkpoint.every_steps=5", "data.prefetch=3", resume=run.folder)
    again.finish_like(lab.undisturbed(*LOCAL), "checkpoint.every_steps: 1 -> 5", "data.prefetch: 1 -> 3")
    lab.observe("shown; equal")


@pytest.mark.fault("a run folder is copied, renamed and resumed", "resumes; equal")
def test_folder_moved(lab: Lab) -> None:
    run = lab.begin_and_kill(13)
    there = lab.folder / "elsewhere" / "moved"
    there.parent.mkdir()
    shutil.copytree(run.folder, there)
    again = lab.begin(resume=there)
    again.folder = there
    again.finish_like(lab.undisturbed(*LOCAL))
    lab.observe("equal")

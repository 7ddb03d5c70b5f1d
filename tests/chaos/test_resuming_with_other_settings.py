"""Checkpoints of another run, and `--resume` with other settings."""

import shutil

import pytest
from chaos_lab import LOCAL, Lab, write_pictures


@pytest.mark.fault(
    "the checkpoint is of pictures of two classes, the folder has three by now",
    "refused with exit 6, the difference shown, before any step",
)
def test_another_data_set(lab: Lab) -> None:
    settings = write_pictures(lab.folder / "pictures", "one", "two")
    run = lab.begin_and_kill(8, *settings, "train.global_batch_size=16")
    write_pictures(lab.folder / "pictures", "three")
    lab.begin(resume=run.folder).fail(6, "classes: 2 there, 3 here")
    lab.observe("exit 6")


@pytest.mark.fault("--resume with settings that it may change", "they are shown; equal bit for bit")
def test_settings_allowed(lab: Lab) -> None:
    run = lab.begin_and_kill(13)
    again = lab.begin("checkpoint.every_steps=5", "data.prefetch=3", resume=run.folder)
    again.finish_like(lab.undisturbed(*LOCAL), "checkpoint.every_steps: 1 -> 5", "data.prefetch: 1 -> 3")
    lab.observe("shown; equal")


@pytest.mark.fault(
    "a run's folder is copied elsewhere under another name, and resumed there", "goes on there; equal bit for bit"
)
def test_folder_moved(lab: Lab) -> None:
    run = lab.begin_and_kill(13)
    there = lab.folder / "elsewhere" / "moved"
    there.parent.mkdir()
    shutil.copytree(run.folder, there)
    again = lab.begin(resume=there)
    again.folder = there
    again.finish_like(lab.undisturbed(*LOCAL))
    lab.observe("equal")

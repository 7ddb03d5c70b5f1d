"""`--resume` with other settings and in another place."""

import shutil

import pytest
from chaos_lab import LOCAL, Lab


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

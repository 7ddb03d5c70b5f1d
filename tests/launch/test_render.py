"""No launcher drifts from values.yaml, and no value is unused."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest


def test_committed_files_are_what_is_rendered(root, renderer, values):
    launch = root / "launch"
    rendered = renderer.render(values)
    assert [path for path, text in rendered.items() if (launch / path).read_text() != text] == []
    folders = ("kuberay", "ray_up", "slurm")  # with rendered files only
    files = {path.relative_to(launch).as_posix() for folder in folders for path in (launch / folder).iterdir()}
    assert files == set(rendered) - {"local.sh"}
    assert (launch / "local.sh").stat().st_mode & 0o111


def test_values_that_cannot_work_are_refused_all_at_once(renderer, values):
    wrong = [
        ({"name": "n" * 41, "image_tag": "latest"}, ["name: .*DNS label", "image_tag: name a version"]),
        ({"settings": ["train.epoch=3"], "sweep": "configs/sweep.yaml"}, ["train.epoch: .*epochs", "sweep.yaml"]),
        ({"image_digest": "0123"}, ["64 hexadecimal digits"]),
        ({"workers": {"count": 2, "gpus": 0, "cpus": 6, "memory_gib": 24, "disk_gib": 9}}, ["at least one GPU"]),
        (
            {"workers": {"count": 3, "gpus": 1, "cpus": 1, "memory_gib": 24, "disk_gib": 9}},
            ["too few", "2 hosts, but workers.count"],
        ),
        ({"storage": "/home/me/runs", "data_root": "s3://bucket/data"}, ["storage: .*not below", "data_root: .*not"]),
    ]
    for changes, messages in wrong:
        with pytest.raises(ValueError, match="(?s)" + ".*".join(messages)):
            renderer.render(values | changes)


def test_check_writes_nothing_and_names_what_differs(root, tmp_path):
    launch = shutil.copytree(root / "launch", tmp_path / "launch")
    (tmp_path / "configs").symlink_to(root / "configs")
    text = (launch / "values.yaml").read_text()
    job = launch / "slurm" / "train.sbatch"
    (launch / "values.yaml").write_text(text.replace('turn: "04:00:00"', 'turn: "08:00:00"'))

    def run(*arguments):
        return subprocess.run([sys.executable, launch / "render.py", *arguments], capture_output=True, text=True)

    checked = run("--check")
    assert (checked.returncode, checked.stdout) == (1, "differs: launch/slurm/train.sbatch\n")
    assert run().stdout == "wrote: launch/slurm/train.sbatch\n"
    assert "--time=08:00:00" in job.read_text()
    (launch / "values.yaml").write_text(text.replace('image_tag: "0.1.0"', "image_tag: latest"))
    refused = run()
    assert refused.returncode == 1
    assert "error: values.yaml: image_tag" in refused.stderr

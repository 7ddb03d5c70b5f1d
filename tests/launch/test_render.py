"""No launcher drifts from values.yaml, no value is unused, and nothing listens on all addresses."""

from __future__ import annotations

import re
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
    values, job = launch / "values.yaml", launch / "slurm" / "train.sbatch"
    for arguments, old, new, code, said in (
        (["--check"], 'turn: "04:00:00"', 'turn: "08:00:00"', 1, "differs: launch/slurm/train.sbatch\n"),
        ([], "", "", 0, "wrote: launch/slurm/train.sbatch\n"),
        ([], 'image_tag: "0.1.0"', "image_tag: latest", 1, "error: values.yaml: image_tag"),
    ):
        values.write_text(values.read_text().replace(old, new))
        before, command = job.read_text(), [sys.executable, launch / "render.py", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, said in done.stdout + done.stderr) == (code, True)
        assert (job.read_text() == before) is (code == 1)
    assert "--time=08:00:00" in job.read_text()


def test_nothing_listens_on_all_addresses(rendered):
    wide = [path for path, text in rendered.files.items() if re.search(r"\b0\.0\.0\.0|\[::\]|bind_all", text)]
    assert wide == ["kuberay/tensorboard.yaml"]  # guarded by the network policy
    for path in ("local.sh", "ray_up/aws.yaml", "ray_up/gcp.yaml", "ray_up/local.yaml"):
        (host,) = re.findall(r"--dashboard-host=(\S+)", rendered.files[path])
        assert host in {"127.0.0.1", "localhost"}, path
    assert "--node-ip-address=127.0.0.1 " in rendered.files["local.sh"]  # and so all the rest of Ray's ports
    assert not re.search("NodePort|LoadBalancer|kind: Ingress", "".join(rendered.files.values()))

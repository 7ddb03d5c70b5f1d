"""No launcher drifts from values.yaml, and no value is without use."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys

import pytest

FREE = {"README.md", "values.yaml", "render.py", "start.py"}
FREE |= {"monitoring/grafana-dashboard.json", "monitoring/prometheus.yml"}
FREE |= {"build_without_engine.sh", "cpu_lock.py", "try_image.sh"}


def leaves(values, path=()):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def changed(values, path):
    """The same values, with another one in one place."""
    values = copy.deepcopy(values)
    holder = values
    for key in path[:-1]:
        holder = holder[key]
    old = holder[path[-1]]
    other = {"image_digest": "sha256:" + "0" * 64, "mount": "/mnt", "data_root": "/mnt/densenet/elsewhere"}
    if path[-1] in other:
        holder[path[-1]] = other[path[-1]]
    elif isinstance(old, list):
        holder[path[-1]] = ["other.example.com"] * len(old) or ["train.epochs=1"]
    else:
        holder[path[-1]] = old + 1 if isinstance(old, int) else f"{old}-other"
    if path == ("workers", "count"):
        values["on_prem"]["workers"].append("192.0.2.99")
    return values


def test_committed_files_are_what_is_rendered(root, renderer, values):
    rendered = renderer.render(values)
    differ = [path for path, text in rendered.items() if (root / "launch" / path).read_text() != text]
    assert differ == [], "run: python launch/render.py"
    assert (root / "launch" / "local.sh").stat().st_mode & 0o111


def test_nothing_lies_in_launch_that_is_not_rendered(root, renderer):
    skipped = ("templates", "__pycache__")
    files = [path.relative_to(root / "launch") for path in (root / "launch").rglob("*") if path.is_file()]
    assert {str(path) for path in files if path.parts[0] not in skipped} == set(renderer.FILES) | FREE


def test_every_value_is_used(renderer, values, on_s3):
    before = [renderer.render(values), renderer.render(on_s3)]
    unused = []
    for path in leaves(values):
        after = [renderer.render(changed(each, path)) for each in (values, on_s3)]
        if after == before:
            unused.append(path)
    assert unused == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("name",), "Big_Cluster", "DNS label"),
        (("name",), "n" * 41, "DNS label"),
        (("image_tag",), "latest", "name a version"),
        (("image_digest",), "0123", "64 hexadecimal digits"),
        (("workers", "gpus"), 0, "at least one GPU"),
        (("workers", "cpus"), 1, "too few"),
        (("workers", "count"), 3, "2 hosts, but workers.count is 3"),
        (("storage",), "/home/me/runs", "not below mount"),
        (("data_root",), "s3://bucket/data", "not below mount"),
    ],
)
def test_what_cannot_work_is_refused(renderer, values, path, value, said):
    holder = values
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    with pytest.raises(ValueError, match=said):
        renderer.render(values)


def test_all_that_is_wrong_is_said_at_once(renderer, values):
    values["name"], values["image_tag"] = "Big", ""
    with pytest.raises(ValueError, match=r"(?s)name: .*image_tag: "):
        renderer.render(values)


def test_check_writes_nothing_and_names_what_differs(root, tmp_path):
    launch = shutil.copytree(root / "launch", tmp_path / "launch")
    text = (launch / "values.yaml").read_text()
    (launch / "values.yaml").write_text(
        text.replace("time limit", "limit").replace('turn: "04:00:00"', 'turn: "08:00:00"')
    )

    def run(*arguments):
        return subprocess.run([sys.executable, launch / "render.py", *arguments], capture_output=True, text=True)

    checked = run("--check")
    assert (checked.returncode, checked.stdout) == (1, "differs: launch/slurm/train.sbatch\n")
    assert "--time=04:00:00" in (launch / "slurm" / "train.sbatch").read_text()
    assert run().stdout == "wrote: launch/slurm/train.sbatch\n"
    assert "--time=08:00:00" in (launch / "slurm" / "train.sbatch").read_text()
    assert run("--check").returncode == 0
    (launch / "values.yaml").write_text(text.replace('image_tag: "0.1.0"', "image_tag: latest"))
    refused = run()
    assert refused.returncode == 1
    assert "error: values.yaml: image_tag" in refused.stderr

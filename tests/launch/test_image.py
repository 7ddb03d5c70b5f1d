"""The image, as far as it can be checked without building it: its Dockerfile and its locks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def steps(root):
    """The Dockerfile's instructions in order, each in one line without comments."""
    lines = [line for line in (root / "Dockerfile").read_text().splitlines() if line.strip() and line[0] != "#"]
    return re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()


def test_linters_find_nothing(root):
    scripts = ["slurm/train.sbatch", "local.sh", "build_without_engine.sh", "try_image.sh"]
    for command in (["hadolint", root / "Dockerfile"], ["shellcheck", *(root / "launch" / name for name in scripts)]):
        tool = shutil.which(command[0], path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if tool is None:
            pytest.skip(f"{command[0]} is not installed")
        done = subprocess.run([tool, *command[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_base_and_the_dependencies_are_pinned(steps):
    assert re.fullmatch(r"ARG PYTHON_IMAGE=[\w./]+/python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", steps[0])
    assert {step.split()[1] for step in steps if step.startswith("FROM ")} == {"${PYTHON_IMAGE}"}
    locked, package = [step for step in steps if "pip install" in step]
    assert {"--require-hashes", "--only-binary", "requirements-runtime.lock"} <= set(locked.split())
    assert {"--no-deps", "--no-build-isolation"} <= set(package.split())


def test_the_image_is_unprivileged_and_has_what_jobs_start(steps, root, values):
    last_stage = steps[max(i for i, step in enumerate(steps) if step.startswith("FROM ")) :]
    user = last_stage.index("USER 1000:1000")
    assert not [step for step in last_stage[user:] if step.startswith(("RUN", "COPY", "USER root"))]
    assert {'ENTRYPOINT ["tini", "-g", "--"]', "WORKDIR /app"} <= set(last_stage)
    assert {"COPY configs configs", "COPY launch/start.py launch/start.py"} <= set(last_stage)
    for file in (values["config"], values["sweep"]):
        assert file.startswith("configs/")
        assert (root / file).is_file()


def parse_lock(text):
    """Requirement -> hashes, of every entry."""
    lines = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line and line[0] != "#"]
    return {
        Requirement(requirement): set(hashes) for requirement, *hashes in (re.split(r"\s*--hash=", e) for e in lines)
    }


def test_the_images_lock_is_the_part_of_the_full_one_that_the_package_needs(root):
    full, runtime = (parse_lock((root / f"requirements{part}.lock").read_text()) for part in ("", "-runtime"))
    assert all(runtime.values())
    pins, pinned = ({(each.name, str(each.specifier)): lock[each] for each in lock} for lock in (full, runtime))
    assert pinned.items() <= pins.items()
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["s3"], "hatchling"]
    in_image = {canonicalize_name(each.name) for each in runtime}
    assert {canonicalize_name(Requirement(text).name) for text in needed} <= in_image
    assert not {"pytest", "moto", "ruff", "gradio"} & in_image


def test_the_lock_for_cpus_is_the_same_without_cuda(root, tmp_path):
    lock, torch = shutil.copy(root / "requirements-runtime.lock", tmp_path / "lock"), tmp_path / "torch.txt"
    runtime = parse_lock(lock.read_text())
    subprocess.run([sys.executable, root / "launch" / "cpu_lock.py", lock, torch], check=True)
    kept = parse_lock(lock.read_text())
    assert kept == {each: runtime[each] for each in kept}
    gone = {each.name for each in runtime if each not in kept}
    assert {"torch", "torchvision", "triton", "nvidia-dali-cuda130", "nvidia-cudnn-cu13"} <= gone
    assert all(re.match("nvidia-|cuda-|triton$|torch$|torchvision$", name) for name in gone)
    assert parse_lock(torch.read_text()) == {each: set() for each in runtime if each.name in ("torch", "torchvision")}

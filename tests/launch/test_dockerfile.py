"""The image, as far as it can be judged without building it."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from densenet_dist import __version__

KEPT_OUT = {".git", ".venv", "data", "runs", "tests", "docs", "benchmarks"}


@pytest.fixture(scope="module")
def text(root):
    return (root / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def steps(text):
    """The instructions in order, each in one line without comments."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()


@pytest.fixture(scope="module")
def last_stage(steps):
    return steps[max(i for i, step in enumerate(steps) if step.startswith("FROM ")) :]


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def argument(steps, word):
    (step,) = [step for step in steps if step.startswith(f"{word} ")]
    return step.removeprefix(f"{word} ")


def test_hadolint_has_nothing_to_say(root):
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, root / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_stage_has_the_one_pinned_base(steps):
    stages = [step.split()[1] for step in steps if step.startswith("FROM ")]
    assert stages == ["${PYTHON_IMAGE}", "${PYTHON_IMAGE}"]
    pinned = re.fullmatch(r"ARG PYTHON_IMAGE=[\w./]+/python:(3\.\d+)\.\d+-slim-\w+@sha256:[0-9a-f]{64}", steps[0])
    assert pinned
    # Packages are installed for that Python, and it looks for them there.
    assert any(f"PYTHONPATH=/install/lib/python{pinned[1]}/site-packages" in step for step in steps)


def test_dependencies_are_the_locked_ones(steps):
    installs = [step for step in steps if "pip install" in step]
    locked, package = installs
    assert {"--require-hashes", "--only-binary", "requirements-runtime.lock"} <= set(locked.split())
    assert {"--no-deps", "--no-build-isolation"} <= set(package.split())
    assert all("--mount=type=cache,target=/root/.cache/pip" in step for step in installs)
    # The lock is copied before the code: a change of the code installs nothing again.
    copies = ("COPY requirements-runtime.lock launch/cpu_lock.py ./", "COPY densenet_dist densenet_dist")
    assert steps.index(copies[0]) < steps.index(locked) < steps.index(copies[1])


def installed(steps, folder, torch_index):
    """What the step, run for real, tells pip and cpu_lock.py; both are programs that only repeat it."""
    (step,) = [step for step in steps if "cpu_lock.py" in step and step.startswith("RUN ")]
    for name in ("pip", "python"):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (folder / name).chmod(0o755)
    command = re.sub(r"^RUN --mount=\S+ +", "", step)
    done = subprocess.run(
        ["/bin/sh", "-euc", command],
        env={"PATH": str(folder), "TORCH_INDEX": torch_index},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_an_image_for_cpus_is_made_only_when_asked_for(steps, tmp_path):
    assert "ARG TORCH_INDEX" in steps  # no default
    (usual,) = installed(steps, tmp_path, "")
    assert usual.endswith("--require-hashes -r requirements-runtime.lock")
    lock, hashed, torch = installed(steps, tmp_path, "https://wheels.example.com/cpu")
    assert lock == "python cpu_lock.py requirements-runtime.lock torch.txt"
    assert hashed == usual
    assert torch.endswith("--only-binary :all: --no-deps --index-url https://wheels.example.com/cpu -r torch.txt")


def test_the_image_itself_installs_nothing_from_python_registries(last_stage, root):
    lock = (root / "requirements-runtime.lock").read_text()
    assert [step for step in last_stage if "pip install" in step] == []
    copied = last_stage.index("COPY --from=build /install /usr/local")
    # What the base has of the lock's packages goes first.
    (removal,) = [step for step in last_stage if "pip uninstall" in step]
    assert last_stage.index(removal) < copied
    removed = removal.split("pip uninstall ")[1].split(" && ")[0].split()
    assert {name for name in removed if name[0] != "-"} == {"setuptools", "wheel"}
    assert all(re.search(rf"^{name}==", lock, re.MULTILINE) for name in ("setuptools", "wheel"))


def test_nobody_is_root(last_stage, values):
    user = argument(last_stage, "USER")
    assert user == "1000:1000"
    assert last_stage.index(f"USER {user}") > max(
        i for i, step in enumerate(last_stage) if step.startswith(("RUN", "COPY"))
    )
    assert any("useradd --create-home --uid 1000" in step for step in last_stage)
    assert "HOME=/home/ray" in argument(last_stage, "ENV")


def test_tini_is_first_and_nothing_checks_health(last_stage, text):
    assert argument(last_stage, "ENTRYPOINT") == '["tini", "-g", "--"]'
    assert "\nHEALTHCHECK" not in text
    (install,) = [step for step in last_stage if "apt-get install" in step]
    assert "--no-install-recommends" in install
    packages = install.split("--no-install-recommends ")[1].split(" && ")[0].split()
    assert set(packages) == {"g++", "openssh-client", "rsync", "tini"}


def test_labels_tell_the_version(last_stage, project, values):
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]+)"', argument(last_stage, "LABEL")))
    assert labels["version"] == __version__ == values["image_tag"]
    assert labels["title"] == project["name"]
    assert labels["licenses"] == project["license"]


def test_what_jobs_start_is_where_they_look_for_it(last_stage, root, values):
    assert argument(last_stage, "WORKDIR") == "/app"
    for step in ("COPY configs configs", "COPY launch/start.py launch/start.py"):
        assert step in last_stage
    assert (root / values["config"]).is_file()
    assert (root / values["sweep"]).is_file()
    assert {values[key].split("/")[0] for key in ("config", "sweep")} == {"configs"}


def in_context(root, path):
    """Whether .dockerignore lets a file through: the last rule that fits it or a folder above it decides."""
    parts = Path(path).parts
    above = {"/".join(parts[: i + 1]) for i in range(len(parts))}
    inside = True
    for line in (root / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        names = {name for each in above for name in ([each, Path(each).name] if pattern.startswith("**/") else [each])}
        if any(fnmatch.fnmatchcase(name, pattern.removeprefix("**/")) for name in names):
            inside = line.startswith("!")
    return inside


def test_the_context_is_what_is_copied_and_small(root, steps):
    sources = [
        source for step in steps if step.startswith("COPY ") and "--from" not in step for source in step.split()[1:-1]
    ]
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in (".git", ".venv")]
        files += [(Path(folder) / name).relative_to(root).as_posix() for name in names]
    context = [file for file in files if in_context(root, file)]
    assert all(any(file == source or file.startswith(f"{source}/") for file in context) for source in sources)
    assert [file for file in context if not any(file == each or file.startswith(f"{each}/") for each in sources)] == []
    assert sum((root / file).stat().st_size for file in context) < 2_000_000
    assert not any(in_context(root, f"{name}/x") for name in KEPT_OUT)
    assert not in_context(root, "densenet_dist/__pycache__/cli.cpython-311.pyc")

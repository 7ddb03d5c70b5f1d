"""What somebody gets who installs the package: the source distribution, the wheel made of it, and its command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.utils import parse_sdist_filename, parse_wheel_filename

import densenet_dist

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution, and the wheel built from it, as `make dist` makes them; in a folder of its own."""
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--directory", str(out), "--target"]
    subprocess.run([*build, "sdist"], cwd=ROOT, check=True, capture_output=True)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(out / "unpacked", filter="data")
    (source,) = (out / "unpacked").iterdir()
    subprocess.run([*build, "wheel"], cwd=source, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def in_tree(*folders: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_source_is_a_whole_checkout(built):
    version = parse_sdist_filename(built[0].name)[1]
    with tarfile.open(built[0]) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        assert {member.uid for member in tar.getmembers()} == {0}  # nobody's account is in it
    assert str(version) == densenet_dist.__version__
    assert in_tree("densenet_dist", "configs", "tests", "docs", "launch") <= names
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith(("runs/", "data/", ".git/", ".venv/"))]


def test_the_wheel_has_everything_that_is_no_python_too(built):
    _, version, _, tags = parse_wheel_filename(built[1].name)
    assert str(version) == densenet_dist.__version__
    assert [str(tag) for tag in tags] == ["py3-none-any"]
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "densenet-dist = densenet_dist.cli:main" in archive.read(entry_points).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert names == in_tree("densenet_dist") | {f"densenet_dist/{name}" for name in in_tree("configs")}
    assert "densenet_dist/py.typed" in names
    assert any(name.endswith("native.cpp") for name in names)


def test_an_installed_package_has_its_configurations(built, tmp_path):
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", str(built[1])], check=True)
    # What it depends on comes from here, which saves gigabytes; the package itself does not.
    env = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "NO_COLOR": "1"}
    command = [python.parent / "densenet-dist", "config", "quickstart", "train.epochs=3"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["train"]["epochs"] == 3


def test_there_is_one_version():
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", densenet_dist.__version__)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == densenet_dist.__version__
    assert citation["license"] == PROJECT["license"]
    image = (ROOT / "Dockerfile").read_text()
    assert f'image.version="{densenet_dist.__version__}"' in image
    assert f"densenet-dist:{densenet_dist.__version__} ." in image
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()

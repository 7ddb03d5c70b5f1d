"""The locks of the image: the versions of requirements.lock, without what only developers need, or without CUDA."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BUILDER = "hatchling"
"""What builds the package in the image."""


def parse(text):
    """Requirement -> hashes, of every entry; packaging's own parser reads the requirements."""
    entries = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line and not line.startswith("#"):
            requirement, *hashes = re.split(r"\s*--hash=", line)
            entries[Requirement(requirement)] = {digest.strip() for digest in hashes}
    return entries


def here(entries):
    """The entries that count on this machine: name -> (version, hashes)."""
    return {
        canonicalize_name(requirement.name): (str(requirement.specifier), hashes)
        for requirement, hashes in entries.items()
        if requirement.marker is None or requirement.marker.evaluate()
    }


def needed(requirements):
    """The names of all packages that `requirements` bring, by what the installed ones say of themselves."""
    seen, waiting = {}, [Requirement(requirement) for requirement in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = seen.get(name, {""}) | requirement.extras
        if extras == seen.get(name):
            continue
        seen[name] = extras
        waiting += [
            each
            for each in map(Requirement, metadata.requires(name) or [])
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    return set(seen)


@pytest.fixture(scope="module")
def full(root):
    return parse((root / "requirements.lock").read_text())


@pytest.fixture(scope="module")
def runtime_text(root):
    return (root / "requirements-runtime.lock").read_text()


@pytest.fixture(scope="module")
def runtime(runtime_text):
    return parse(runtime_text)


def test_the_images_versions_are_those_of_the_full_lock(full, runtime):
    assert all(runtime.values())
    pins = {(each.name, str(each.specifier)): hashes for each, hashes in full.items()}
    assert {(each.name, str(each.specifier)): hashes for each, hashes in runtime.items()}.items() <= pins.items()
    everything = here(full)
    assert here(runtime) == {name: everything[name] for name in here(runtime)}


def test_the_image_has_what_the_package_needs_and_no_more(root, runtime):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    named = [line for line in (root / "requirements.in").read_text().splitlines() if line and line[0] != "#"]
    extras = project["optional-dependencies"]
    assert set(here(runtime)) == needed([*project["dependencies"], *extras["s3"], *named, BUILDER])
    for_developers = {canonicalize_name(Requirement(each).name) for each in extras["dev"]}
    assert {"pytest", "moto"} <= for_developers - set(here(runtime))


def test_for_cpus_everything_but_cuda_stays_as_it_was(cpu_lock, runtime, runtime_text):
    kept_text, moved_text = cpu_lock.split(runtime_text)
    kept, moved = parse(kept_text), parse(moved_text)
    assert kept == {each: runtime[each] for each in kept}
    gone = {each for each in runtime if each not in kept}
    assert {"torch", "torchvision", "triton", "nvidia-dali-cuda130", "nvidia-cudnn-cu13"} <= {
        each.name for each in gone
    }
    assert all(re.match("nvidia-|cuda-|triton$|torch$|torchvision$", each.name) for each in gone)
    assert moved == {each: set() for each in runtime if each.name in ("torch", "torchvision")}
    # What torch itself needs beside CUDA is still there.
    torch = {
        canonicalize_name(Requirement(each).name) for each in metadata.requires("torch") or [] if "extra" not in each
    }
    assert {name for name in torch if not re.match("nvidia-|cuda-|triton$", name)} <= set(here(kept))


def test_the_script_changes_the_lock_once(root, cpu_lock, runtime_text, tmp_path):
    lock, torch = tmp_path / "lock", tmp_path / "torch.txt"
    lock.write_text(runtime_text)
    command = [sys.executable, root / "launch" / "cpu_lock.py", lock, torch]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (lock.read_text(), torch.read_text()) == cpu_lock.split(runtime_text)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.startswith(f"error: {lock}: torch and torchvision not pinned")

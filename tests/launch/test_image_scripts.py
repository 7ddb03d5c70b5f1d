"""What tries the image: the parts that can be tried without one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli

from densenet_dist.config import load_config

JOB = re.compile(r"train /app/(\S+)")


@pytest.fixture(scope="module")
def text(root):
    return (root / "launch" / "try_image.sh").read_text()


@pytest.fixture(scope="module")
def commands(text):
    """Every simple command that Ray or we are asked for, as words; the script's variables filled in."""
    text = re.sub(r"\\\n\s*", "", text).replace('"${small[@]}"', re.search(r"^small=\((.*)\)$", text, re.MULTILINE)[1])
    text = text.replace("$runs", "/tmp/runs")
    lines = [re.split(r" (?:\||\|\||&|>\S+.*)(?: |$)", line)[0] for line in text.splitlines()]
    return [shlex.split(line) for line in lines if re.match(r"(ray|densenet-dist|python /app/\S+) ", line)]


def options(words):
    return dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)


def test_ray_is_started_as_kuberay_starts_it(root, values, commands, text):
    head, worker = [words for words in commands if words[:2] == ["ray", "start"]]
    cluster = yaml.safe_load((root / "launch" / "kuberay" / "raycluster.yaml").read_text())["spec"]
    assert options(head).items() >= cluster["headGroupSpec"]["rayStartParams"].items()
    ports = {port["name"]: str(port["containerPort"]) for port in _container(cluster["headGroupSpec"])["ports"]}
    assert options(head)["metrics-export-port"] == ports["metrics"]
    assert options(worker)["address"].endswith(f":{ports['gcs-server']}")
    assert f"http://127.0.0.1:{ports['dashboard']}/api/gcs_healthz" in text
    for words in (head, worker):
        assert "--block" in words
        assert f"http://127.0.0.1:{options(words)['dashboard-agent-listen-port']}/api/healthz" in text
    for words in [words for words in commands if words[0] == "ray"]:
        command, rest = ray_cli.commands[words[1]], words[2:]
        if words[1] == "job":
            command, rest = command.commands[words[2]], words[3:]
        command.make_context(words[1], rest)  # raises on an option that it has not
    environment = dict(pair.split("=") for pair in re.findall(r"\b(?:RAY|OMP)_\w+=\w+", text))
    assert environment == values["env"] | {"RAY_AUTH_MODE": cluster["authOptions"]["mode"]}


def _container(group):
    (container,) = group["template"]["spec"]["containers"]
    return container


def test_what_is_trained_is_in_the_image_and_accepted(root, commands, values):
    trained = [words for words in commands if "train" in words]
    assert len(trained) == 2
    for words in trained:
        config = load_config(
            str(root / JOB.search(" ".join(words))[1]), *[word for word in words if re.match(r"[\w.]+=", word)]
        )
        assert config.train.epochs == 1
        assert config.storage == "/tmp/runs"
    submitted = trained[-1]
    assert submitted[submitted.index("--") + 1 :][:3] == ["python", "/app/launch/start.py", "train"]


def test_the_builder_says_what_it_wants(root, tmp_path):
    script = root / "launch" / "build_without_engine.sh"
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert "build_without_engine.sh FOLDER" in done.stderr
    for tool in ("bash", "dirname", "id"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(
        ["bash", script, tmp_path / "image"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 3
    wanted = "only root may" if os.geteuid() else "buildah is missing: apt install buildah"
    assert done.stderr.startswith(f"error: {wanted}")
    assert not (tmp_path / "image").exists()


def test_the_builder_stands_in_for_the_pinned_base(root, text):
    dockerfile = (root / "Dockerfile").read_text()
    script = (root / "launch" / "build_without_engine.sh").read_text()
    _, python, debian = re.search(r"/python:((3\.\d+)\.\d+)-slim-(\w+)@", dockerfile).groups()
    assert f"base=localhost/python:{python}-slim-{debian}\n" in script
    assert f"--variant=minbase {debian} " in script
    assert f"python=${{PYTHON:-python{python}}}" in script
    assert f"Python {python}" in script

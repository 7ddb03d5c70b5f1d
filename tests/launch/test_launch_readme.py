"""launch/README.md cannot drift: its files, commands, options and figures are tried."""

from __future__ import annotations

import re
import shlex

import pytest
from ray.scripts.scripts import cli as ray_cli

from densenet_dist.cli import app
from densenet_dist.config import load_config

# What others' tools are asked for; whether they know it cannot be tried here.
FOREIGN = {
    "kubectl": {"get", "apply", "create", "wait", "exec", "cp", "port-forward", "logs", "delete", "label"},
    "helm": {"repo", "install"},
    "docker": {"build", "push", "run"},
    "aws": {"ssm", "ec2"},
    "gcloud": {"compute"},
    "ssh": None,
    "tensorboard": None,
    "prometheus": None,
    "sbatch": None,
    "squeue": None,
    "scancel": None,
    "make": {"setup"},
    "pip": {"install"},
    "bash": None,
    "python": None,
    "export": None,
    "ray": None,
}


@pytest.fixture(scope="module")
def text(root):
    return (root / "launch" / "README.md").read_text()


@pytest.fixture(scope="module")
def commands(text):
    """Every command, as words."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line.removesuffix(" &"), comments=True) for line in lines]


def test_links_and_files_exist(root, text):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert len(links) >= 10
    assert [link for link in links if not (root / "launch" / link).exists()] == []
    files = re.findall(r"(?<![\w/.-])((?:configs|launch|tests)/[\w./-]+)", text)
    assert [file for file in files if not (root / file).exists()] == []
    anchors = re.findall(r"\]\(#([\w-]+)\)", text)
    titles = {title.lower().replace(" ", "-") for title in re.findall(r"^## (.+)$", text, re.MULTILINE)}
    assert set(anchors) <= titles


def test_every_launcher_is_spoken_of(renderer, text):
    missing = [path for path in renderer.FILES if path.rpartition("/")[2] not in text]
    assert missing == []


def test_commands_are_known(commands):
    assert len(commands) >= 40
    for words in commands:
        assert words[0] in FOREIGN, words
        known = FOREIGN[words[0]]
        plain = [word for word in words[1:] if not word.startswith("-") and word != "densenet"]
        assert known is None or plain[0] in known, words


def test_ray_commands_are_rays(commands):
    told = [words[1:] for words in commands if words[0] == "ray"]
    assert {words[0] for words in told} >= {"up", "down", "job", "dashboard", "rsync-down", "get-auth-token"}
    for words in told:
        command, rest = ray_cli.commands[words[0]], words[1:]
        if words[0] == "job":
            command, rest = command.commands[words[1]], words[2:]
        command.make_context(words[0], list(rest))  # raises on an option that it has not


def test_submitted_commands_are_ours(root, values, commands):
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    submitted = [words[words.index("--") + 1 :] for words in commands if words[:3] == ["ray", "job", "submit"]]
    assert len(submitted) >= 4
    for words in submitted:
        assert words[:3] == ["python", "-m", "densenet_dist"]
        assert words[3] in known
        config = load_config(str(root / words[4]), *words[5:])
        if config.cluster.workers != "auto":
            assert config.cluster.workers == values["workers"]["count"] * values["workers"]["gpus"]
        if config.storage != "/shared/runs":
            assert (config.storage, config.data.root) == (values["storage"], values["data_root"])
    inside = [words[words.index("--") + 1 :] for words in commands if words[0] == "kubectl" and "--" in words]
    assert inside == [["densenet-dist", "evaluate", f"{values['storage']}/{values['name']}-train"]]
    assert "evaluate" in known


def test_batch_jobs_get_settings_that_exist(root, commands):
    for words in [words for words in commands if words[0] == "sbatch"]:
        script = words.index("launch/slurm/train.sbatch")
        if given := words[script + 1 :]:
            load_config(str(root / given[0]), *given[1:])


def test_names_and_versions_are_those_of_the_values(values, text):
    name, namespace = values["name"], values["namespace"]
    image = f"{values['image']}:{values['image_tag']}"
    assert re.findall(rf"{image}\S*", text) == [image] * 3 + [f"{image}-cpu"]
    assert f"rayjob {name}-train " in text
    assert f"job/{name}-train" in text
    assert f"service/{name}-head-svc" in text  # KubeRay's name for it
    assert f"secret generic {name}-s3 --namespace {namespace}" in text
    assert set(re.findall(r"--namespace (densenet\S*)", text)) == {namespace}
    assert set(re.findall(r"--region (\S+)", text)) == {values["aws"]["region"]}
    assert f"tag:ray-cluster-name,Values={name}" in text
    assert f"labels.ray-cluster-name={name}" in text
    assert "nvidia-580" in values["gcp"]["image"]


def test_the_client_of_google_is_the_one_of_the_head(root, text):
    head = (root / "launch" / "ray_up" / "gcp.yaml").read_text()
    (version,) = set(re.findall(r"google-api-python-client==(\S+)", text))
    assert f"google-api-python-client=={version}" in head

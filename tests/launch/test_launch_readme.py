"""The commands of launch/README.md are Ray's and ours; tests/docs tries the rest."""

from __future__ import annotations

import shlex

from pages import blocks
from ray.scripts.scripts import cli as ray_cli

from densenet_dist.config import load_config


def commands_of(*pages):
    """Every command of the pages' blocks, as words."""
    lines = [line for page in pages for block in blocks(page, "bash") for line in block.text.splitlines()]
    return [words for line in lines if (words := shlex.split(line.removesuffix(" &"), comments=True))]


def test_commands_are_rays_and_ours(root):
    commands = commands_of(root / "launch" / "README.md")
    of_ray = [words[1:] for words in commands if words[0] == "ray"]
    assert {words[0] for words in of_ray} >= {"up", "down", "job", "dashboard", "rsync-down", "get-auth-token"}
    for name, *rest in of_ray:
        command = ray_cli.commands[name]
        if name == "job":
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(name, list(rest))  # raises on an unknown option
    batch = [words[words.index("launch/slurm/train.sbatch") + 1 :] for words in commands if words[0] == "sbatch"]
    for file, *settings in filter(None, batch):
        load_config(str(root / file), *settings)


def test_commands_to_watch_with_bind_to_loopback(root):
    for words in commands_of(root / "launch" / "README.md", root / "docs" / "monitoring.md"):
        assert not {"--address=0.0.0.0", "--bind_all"} & set(words)
        addresses = [word.partition("=")[2] for word in words if word.startswith("--web.listen-address")]
        addresses += [words[index + 1] for index, word in enumerate(words) if word in ("-L", "--host")]
        assert {address.partition(":")[0] for address in addresses} <= {"127.0.0.1", "localhost"}

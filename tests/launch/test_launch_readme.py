"""The commands of launch/README.md are Ray's and ours; tests/docs tries its links, paths and our own command lines."""

from __future__ import annotations

import re
import shlex

from ray.scripts.scripts import cli as ray_cli

from densenet_dist.cli import app
from densenet_dist.config import load_config


def test_commands_are_rays_and_ours(root, values, renderer):
    text = (root / "launch" / "README.md").read_text()
    assert [path for path in renderer.FILES if path.rpartition("/")[2] not in text] == []
    lines = [
        line for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.M) for line in block.splitlines()
    ]
    commands = [words for line in lines if (words := shlex.split(line.removesuffix(" &"), comments=True))]
    of_ray = [words[1:] for words in commands if words[0] == "ray"]
    assert {words[0] for words in of_ray} >= {"up", "down", "job", "dashboard", "rsync-down", "get-auth-token"}
    for name, *rest in of_ray:
        command = ray_cli.commands[name]
        if name == "job":
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(name, list(rest))  # raises on an unknown option
    submitted = [words[words.index("--") + 1 :] for words in commands if words[:3] == ["ray", "job", "submit"]]
    assert len(submitted) >= 4
    for words in submitted:
        assert words[:3] == ["python", "-m", "densenet_dist"]
        assert words[3] in {command.name or command.callback.__name__ for command in app.registered_commands}
        load_config(str(root / words[4]), *words[5:])
    for words in [words for words in commands if words[0] == "sbatch"]:
        if given := words[words.index("launch/slurm/train.sbatch") + 1 :]:
            load_config(str(root / given[0]), *given[1:])
    name, namespace, image = values["name"], values["namespace"], f"{values['image']}:{values['image_tag']}"
    assert set(re.findall(rf"{values['image']}:\S*", text)) == {image, f"{image}-cpu"}
    assert set(re.findall(r"--namespace (densenet\S*)", text)) == {namespace}
    assert set(re.findall(r"--region (\S+)", text)) == {values["aws"]["region"]}
    for named in (f"rayjob {name}-train ", f"service/{name}-head-svc", f"secret generic {name}-s3", f"Values={name}"):
        assert named in text

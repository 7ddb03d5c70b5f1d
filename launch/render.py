"""Renders every launcher file from values.yaml and templates/.

    python launch/render.py            write them
    python launch/render.py --check    write nothing; end with 1 where one differs

In a template ``@{key}`` stands for a value (``workers.gpus``), ``@{_name}`` for the template ``_name.yaml``. Alone on
its line, it may be several lines, which are indented like it, or none, which takes the line away.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
TEMPLATES = HERE / "templates"
TRAIN = {"command": "train", "source": "@{config}", "told": "@{told_train}", "queue_label": "", "suspend": ""}
TUNE = TRAIN | {"command": "tune", "source": "@{sweep}", "told": "@{told_tune}"}
QUEUED = {"queue_label": "kueue.x-k8s.io/queue-name: @{kueue.queue}", "suspend": "suspend: true  # Kueue lets it go"}
# What is written: its template, and what that says beside the values.
FILES: dict[str, tuple[str, dict[str, str]]] = {
    "kuberay/namespace.yaml": ("namespace.yaml", {}),
    "kuberay/networkpolicy.yaml": ("networkpolicy.yaml", {}),
    "kuberay/storage-pvc.yaml": ("storage-pvc.yaml", {}),
    "kuberay/secret-s3.example.yaml": ("secret-s3.example.yaml", {}),
    "kuberay/shell.yaml": ("shell.yaml", {}),
    "kuberay/podmonitor.yaml": ("podmonitor.yaml", {}),
    "kuberay/tensorboard.yaml": ("tensorboard.yaml", {}),
    "kuberay/raycluster.yaml": ("raycluster.yaml", {}),
    "kuberay/rayjob-train.yaml": ("rayjob.yaml", TRAIN),
    "kuberay/rayjob-tune.yaml": ("rayjob.yaml", TUNE),
    "kuberay/rayjob-train-kueue.yaml": ("rayjob.yaml", TRAIN | QUEUED),
    "kuberay/kueue-queue.yaml": ("kueue-queue.yaml", {}),
    "ray_up/aws.yaml": ("ray_up-aws.yaml", {}),
    "ray_up/gcp.yaml": ("ray_up-gcp.yaml", {}),
    "ray_up/local.yaml": ("ray_up-local.yaml", {}),
    "slurm/train.sbatch": ("train.sbatch", {}),
    "local.sh": ("local.sh", {}),
}


def render(values: Mapping[str, Any]) -> dict[str, str]:
    """The text of every file, by its path below launch/.

    Raises:
        ValueError: where values cannot work together, naming all that is wrong.
    """
    if problems := list(_impossible(values)):
        raise ValueError("values.yaml: " + "\n  ".join(problems))
    known = _flat(values) | _commands(values) | _sums(values) | _storage(values)
    return {path: _fill((TEMPLATES / template).read_text(), known | extra) for path, (template, extra) in FILES.items()}


def _impossible(values: Mapping[str, Any]) -> Iterator[str]:
    workers, mount, hosts = values["workers"], values["mount"] + "/", values["on_prem"]["workers"]
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", values["name"]):
        yield f"name: {values['name']!r} is no DNS label of at most 40 characters"
    if values["image_tag"] in ("", "latest"):
        yield "image_tag: name a version, so that all nodes run the same one"
    if not re.fullmatch(r"(sha256:[0-9a-f]{64})?", values["image_digest"]):
        yield "image_digest: is sha256: and 64 hexadecimal digits, or empty"
    if workers["gpus"] < 1 or workers["count"] < 1:
        yield "workers: at least one, with at least one GPU"
    elif workers["cpus"] <= workers["gpus"]:
        yield f"workers.cpus: {workers['cpus']} are too few for {workers['gpus']} ranks and Ray's own processes"
    for key in ("storage", "data_root"):
        if not values[key].startswith(("s3://", mount) if key == "storage" else mount):
            yield f"{key}: {values[key]} is not below mount ({mount}): pods and machines would keep it to themselves"
    if len(hosts) != workers["count"]:
        yield f"on_prem.workers: {len(hosts)} hosts, but workers.count is {workers['count']}"


def _commands(values: Mapping[str, Any]) -> dict[str, str]:
    """What `densenet-dist` is told, and the environment in the form of each launcher."""
    workers, env = values["workers"], values["env"].items()
    cpus_per_rank = (workers["cpus"] - 1) // workers["gpus"]  # Ray's own processes keep one
    place = [f"storage={values['storage']}", f"data.root={values['data_root']}"]
    ranks = [f"cluster.workers={workers['count'] * workers['gpus']}", f"cluster.cpus_per_worker={cpus_per_rank}"]
    told = {
        "told_train": [*place, *values["settings"], *ranks, "cluster.device=cuda", "cluster.timeout_s=1800"],
        "told_tune": [*place, "gpus_per_worker=1", f"cpus_per_worker={cpus_per_rank}"],
        "told_slurm": [*place, *values["settings"]],
    }
    return {
        **{key: " ".join(map(shlex.quote, words)) for key, words in told.items()},
        "image_ref": ":".join([values["image"], values["image_tag"]]) + ("@" + values["image_digest"]).rstrip("@"),
        "env_list": "\n".join(f'- {{name: {key}, value: "{value}"}}' for key, value in env),
        "env_docker": "\n".join(f"- --env {key}={value}" for key, value in env),
        "env_export": "\n".join(f"export {key}={value}" for key, value in env),
    }


def _sums(values: Mapping[str, Any]) -> dict[str, str]:
    workers = values["workers"]
    count, others = workers["count"], (values["head"], values["submitter"])
    sums = {
        "shm_gib": max(1, workers["memory_gib"] // 2),
        "head_shm_gib": max(1, values["head"]["memory_gib"] // 2),
        "quota_cpus": count * workers["cpus"] + sum(other["cpus"] for other in others),
        "quota_memory_gib": count * workers["memory_gib"] + sum(other["memory_gib"] for other in others),
        "quota_gpus": count * workers["gpus"],
        "deadline_min": values["job"]["deadline_s"] // 60,
    }
    return {key: str(value) for key, value in sums.items()}


def _storage(values: Mapping[str, Any]) -> dict[str, str]:
    """What differs between a shared folder and an object store."""
    name, mount, profile = values["name"], values["mount"], values["aws"]["instance_profile"]
    folder = f"sudo install --directory --owner=1000 --group=1000 {mount}"
    if values["storage"].startswith("s3://"):
        return {
            "tb_logdir": values["storage"].partition("?")[0],
            # The name that boto3, with which TensorBoard reads, has for it.
            "tb_env": "env:\n- name: AWS_DEFAULT_REGION\n  valueFrom:\n"
            f"    secretKeyRef: {{name: {name}-s3, key: AWS_REGION, optional: true}}",
            "volume": "emptyDir: {}",
            "env_from": f"envFrom: [{{secretRef: {{name: {name}-s3}}}}]",
            "profile": f"IamInstanceProfile: {{Name: {profile}}}" if profile else "",
            "mount_in_cloud": f"- {folder}",
            "mount_on_prem": f"- {folder}",
        }
    client = "command -v mount.nfs4 || (sudo apt-get update --quiet && sudo apt-get install --yes --quiet nfs-common)"
    return {
        "tb_logdir": values["storage"],
        "tb_env": "",
        "volume": f"persistentVolumeClaim: {{claimName: {name}}}",
        "env_from": "",
        "profile": "",
        "mount_in_cloud": f"- {client}\n- findmnt {mount} || ({folder} && sudo mount -t nfs4 {values['nfs']} {mount})",
        "mount_on_prem": f"- findmnt {mount}  # fails where it is not mounted",
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return flat


def _fill(text: str, values: Mapping[str, str]) -> str:
    def value(key: str) -> str:
        return _fill((TEMPLATES / f"{key}.yaml").read_text().rstrip() if key[0] == "_" else values[key], values)

    def whole_line(match: re.Match[str]) -> str:
        lines = value(match[2])
        return textwrap.indent(lines, match[1]) + "\n" if lines else ""

    text = re.sub(r"^( *)@\{([\w.]+)\}\n", whole_line, text, flags=re.MULTILINE)
    return re.sub(r"@\{([\w.]+)\}", lambda match: value(match[1]), text)


def main() -> int:
    """Write what differs, or name it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a file differs")
    check = parser.parse_args().check
    try:
        files = render(yaml.safe_load((HERE / "values.yaml").read_text()))
    except ValueError as error:
        sys.exit(f"error: {error}")
    differ = [path for path, text in files.items() if not (HERE / path).is_file() or (HERE / path).read_text() != text]
    for path in differ:
        print(f"{'differs' if check else 'wrote'}: launch/{path}")
        if not check:
            (HERE / path).parent.mkdir(exist_ok=True)
            (HERE / path).write_text(files[path])
            (HERE / path).chmod(0o755 if path.endswith(".sh") else 0o644)
    return 1 if check and differ else 0


if __name__ == "__main__":
    sys.exit(main())

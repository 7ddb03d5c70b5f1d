"""Renders every launcher file from values.yaml and templates/, which are Jinja2.

    python launch/render.py            write them
    python launch/render.py --check    write nothing; end with 1 where one differs

A template sees the values under their keys (``workers.gpus``) and what `_derived` adds; a name that is missing is an
error.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent
TEMPLATES = HERE / "templates"
# What is written, and its template where that has another name.
FILES = {
    "kuberay/namespace.yaml": "namespace.yaml",
    "kuberay/networkpolicy.yaml": "networkpolicy.yaml",
    "kuberay/storage-pvc.yaml": "storage-pvc.yaml",
    "kuberay/secret-s3.example.yaml": "secret-s3.example.yaml",
    "kuberay/shell.yaml": "shell.yaml",
    "kuberay/podmonitor.yaml": "podmonitor.yaml",
    "kuberay/tensorboard.yaml": "tensorboard.yaml",
    "kuberay/raycluster.yaml": "raycluster.yaml",
    "kuberay/rayjob-train.yaml": "rayjob.yaml",
    "kuberay/rayjob-tune.yaml": "rayjob.yaml",
    "kuberay/rayjob-train-kueue.yaml": "rayjob.yaml",
    "kuberay/kueue-queue.yaml": "kueue-queue.yaml",
    "ray_up/aws.yaml": "ray_up-aws.yaml",
    "ray_up/gcp.yaml": "ray_up-gcp.yaml",
    "ray_up/local.yaml": "ray_up-local.yaml",
    "slurm/train.sbatch": "train.sbatch",
    "local.sh": "local.sh",
}
ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
HEADER = (
    "# Rendered by launch/render.py from launch/values.yaml and launch/templates: change those. "
    "What to do: launch/README.md."
)


def render(values: Mapping[str, Any]) -> dict[str, str]:
    """The text of every file, by its path below launch/.

    Raises:
        ValueError: where values cannot work together, naming all that is wrong.
    """
    if problems := list(_conflicts(values)):
        raise ValueError("values.yaml: " + "\n  ".join(problems))
    known = {**values, **_derived(values), "header": HEADER}
    return {path: ENVIRONMENT.get_template(template).render(known, path=path) for path, template in FILES.items()}


def _conflicts(values: Mapping[str, Any]) -> Iterator[str]:
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


def _derived(values: Mapping[str, Any]) -> dict[str, Any]:
    """What several templates say that follows from the values."""
    workers, others = values["workers"], (values["head"], values["submitter"])
    digest = f"@{values['image_digest']}" if values["image_digest"] else ""
    cpus_per_rank = (workers["cpus"] - 1) // workers["gpus"]  # Ray's own processes keep one
    place = [f"storage={values['storage']}", f"data.root={values['data_root']}"]
    ranks = [f"cluster.workers={workers['count'] * workers['gpus']}", f"cluster.cpus_per_worker={cpus_per_rank}"]
    train = [*place, *values["settings"], *ranks, "cluster.device=cuda", "cluster.timeout_s=1800"]
    return {
        "image_ref": f"{values['image']}:{values['image_tag']}{digest}",
        "on_s3": values["storage"].startswith("s3://"),
        "quota": {
            key: workers["count"] * workers[key] + sum(other.get(key, 0) for other in others)
            for key in ("cpus", "memory_gib", "gpus")
        },
        "train_settings": shlex.join(train),
        "tune_settings": shlex.join([*place, "gpus_per_worker=1", f"cpus_per_worker={cpus_per_rank}"]),
        "slurm_settings": shlex.join([*place, *values["settings"]]),
    }


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

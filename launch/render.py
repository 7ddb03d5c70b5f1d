"""Render every launcher file from values.yaml and templates/ (Jinja2).

    python launch/render.py            write the files
    python launch/render.py --check    write nothing; exit with 1 if a file differs

Templates see the values under their keys (``workers.gpus``) and what `_derived` adds; a missing name is an error.
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

from densenet_dist.config import load_config
from densenet_dist.errors import ConfigError
from densenet_dist.sweep.definition import load_sweep

HERE = Path(__file__).parent
TEMPLATES = HERE / "templates"
# The output files and their templates.
FILES = {
    "kuberay/namespace.yaml": "namespace.yaml",
    "kuberay/networkpolicy.yaml": "networkpolicy.yaml",
    "kuberay/disruption.yaml": "disruption.yaml",
    "kuberay/storage-pvc.yaml": "storage-pvc.yaml",
    "kuberay/secret-s3.example.yaml": "secret-s3.example.yaml",
    "kuberay/shell.yaml": "shell.yaml",
    "kuberay/podmonitor.yaml": "podmonitor.yaml",
    "kuberay/tensorboard.yaml": "tensorboard.yaml",
    "kuberay/raycluster.yaml": "raycluster.yaml",
    "kuberay/rayjob-train.yaml": "rayjob.yaml",
    "kuberay/rayjob-tune.yaml": "rayjob.yaml",
    "kuberay/rayjob-train-elastic.yaml": "rayjob.yaml",
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
    """Return the text of every file by its path below launch/.

    Raises:
        ValueError: Values are wrong or conflict; the message lists all problems.
    """
    if problems := list(_conflicts(values)):
        raise ValueError("values.yaml: " + "\n  ".join(problems))
    known = {**values, **_derived(values), "header": HEADER}
    return {path: ENVIRONMENT.get_template(template).render(known, path=path) for path, template in FILES.items()}


def _conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    workers, mount, hosts = values["workers"], values["mount"] + "/", values["on_prem"]["workers"]
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", values["name"]):
        yield f"name: {values['name']!r} is not a DNS label of at most 40 characters"
    if values["image_tag"] in ("", "latest"):
        yield "image_tag: name a version, so that all nodes run the same one"
    if not re.fullmatch(r"(sha256:[0-9a-f]{64})?", values["image_digest"]):
        yield "image_digest: must be empty, or sha256: followed by 64 hexadecimal digits"
    if workers["gpus"] < 1 or workers["count"] < 1:
        yield "workers: at least one, with at least one GPU"
    elif workers["cpus"] <= workers["gpus"]:
        yield f"workers.cpus: {workers['cpus']} are too few for {workers['gpus']} ranks and Ray's own processes"
    for key in ("storage", "data_root"):
        if not values[key].startswith(("s3://", mount) if key == "storage" else mount):
            yield f"{key}: {values[key]} is not below mount ({mount}), so other pods and machines would not see it"
    if not 1 <= values["kubernetes"]["min_workers"] <= workers["count"]:
        yield f"kubernetes.min_workers: must be between 1 and workers.count ({workers['count']})"
    if values["kubernetes"]["grace_s"] < 45:
        yield "kubernetes.grace_s: must be at least 45 s, so that a run can save before its pod ends"
    for load, file, settings in ((load_config, "config", values["settings"]), (load_sweep, "sweep", [])):
        try:
            load(str(HERE.parent / values[file]), *settings)
        except ConfigError as error:  # before a cluster is started for it
            yield f"{file}, settings: {error}"
    if len(hosts) != workers["count"]:
        yield f"on_prem.workers: {len(hosts)} hosts, but workers.count is {workers['count']}"


def _derived(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what several templates need and the values imply."""
    workers, others = values["workers"], (values["head"], values["submitter"])
    digest = f"@{values['image_digest']}" if values["image_digest"] else ""
    cpus_per_rank = (workers["cpus"] - 1) // workers["gpus"]  # Ray's own processes keep one
    place = [f"storage={values['storage']}", f"data.root={values['data_root']}"]
    ranks = workers["count"] * workers["gpus"]
    fewest = values["kubernetes"]["min_workers"] * workers["gpus"]
    device = [f"cluster.cpus_per_worker={cpus_per_rank}", "cluster.device=cuda", "cluster.timeout_s=1800"]
    train = [*place, *values["settings"], f"cluster.workers={ranks}", *device]
    elastic = [*place, *values["settings"], f"cluster.workers.min={fewest}", f"cluster.workers.max={ranks}", *device]
    return {
        "image_ref": f"{values['image']}:{values['image_tag']}{digest}",
        "on_s3": values["storage"].startswith("s3://"),
        "quota": {
            key: workers["count"] * workers[key] + sum(other.get(key, 0) for other in others)
            for key in ("cpus", "memory_gib", "disk_gib", "gpus")
        },
        "drain_s": values["kubernetes"]["grace_s"] - 15,  # then Ray ends its processes, before Kubernetes kills them
        "train_settings": shlex.join(train),
        "elastic_settings": shlex.join(elastic),
        "tune_settings": shlex.join([*place, "gpus_per_worker=1", f"cpus_per_worker={cpus_per_rank}"]),
        "slurm_settings": shlex.join([*place, *values["settings"]]),
    }


def main() -> int:
    """Write or list the files that differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file differs")
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

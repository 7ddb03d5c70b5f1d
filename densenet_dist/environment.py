"""Versions, machine and code of a run, for env.json."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from densenet_dist.credentials import without_credentials

_PACKAGES = ("densenet-dist", "torch", "torchvision", "ray", "nvidia-dali-cuda130", "numpy", "tensorboard")


def describe_environment() -> dict[str, Any]:
    """Return versions, machine, git commit and command as plain values; no secrets (no environment variables)."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": without_credentials(" ".join(sys.argv)),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "packages": {name: package_version(name) for name in _PACKAGES},
        "git": git_commit(),
    }


def package_version(name: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit(folder: Path = Path(__file__).parent) -> str | None:
    """Return the commit of the checkout that contains `folder`, with ``+dirty`` if files differ from it; else None."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may be inside the checkout of another project, which does not track this file.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return commit + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "") if commit else None


def cpu_name() -> str:
    """Return the model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

"""What a process runs in: cache and home folder, versions, machine and code.

Commands that must start fast import this module, so that slow imports are in functions.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

CACHE_ENV = "DENSENET_DIST_CACHE"
_PACKAGES = ("densenet-dist", "torch", "torchvision", "ray", "nvidia-dali-cuda130", "numpy", "tensorboard")


def unique_suffix() -> str:
    """Return a suffix for temporary files that differs between processes, also of containers that share a disk."""
    return f"{os.uname().nodename}.{os.getpid()}"


def cache_folder() -> Path:
    """Return ``$DENSENET_DIST_CACHE``, else ``densenet_dist`` under ``$XDG_CACHE_HOME`` or ``~/.cache``.

    It is created with permissions for this user only, if possible. It may be deleted when nothing runs.
    """
    own, base = os.environ.get(CACHE_ENV), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own).expanduser() if own else Path(base or Path.home() / ".cache") / "densenet_dist"
    with suppress(OSError):  # a later write reports the error
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder.absolute()


def describe_environment() -> dict[str, Any]:
    """Return versions, machine, git commit and command for env.json; no secrets (no environment variables)."""
    import torch

    from densenet_dist.credentials import without_credentials

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
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of the checkout of this package, with ``+dirty`` if files differ from it, or None."""
    import subprocess

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
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

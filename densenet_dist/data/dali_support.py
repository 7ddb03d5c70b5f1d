"""Check whether DALI works on this machine, and explain what to do otherwise. DALI is imported only when selected."""

from __future__ import annotations

import ctypes
import importlib
from contextlib import suppress
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from densenet_dist.errors import EnvironmentProblem

PACKAGE = "nvidia-dali-cuda130"
_ALTERNATIVE = "augment with torch instead: data.loader=torch"


def dali_installed() -> bool:
    """Return whether the package is installed; it may not work."""
    try:
        return util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # there is no package "nvidia" either
        return False


def require_dali(device: torch.device, *, decoding: bool) -> None:
    """Check that DALI works on `device`.

    Args:
        decoding: whether it has to decode image files.

    Raises:
        EnvironmentProblem: naming what is missing or too old, the versions, and what to do.
    """
    if not dali_installed():
        raise EnvironmentProblem(
            f"data.loader=dali, but DALI is not installed\n  install it: pip install {PACKAGE}\n  or {_ALTERNATIVE}"
        )
    try:
        backend = importlib.import_module("nvidia.dali.backend")
        importlib.import_module("nvidia.dali.fn")
    except (ImportError, OSError) as error:
        raise EnvironmentProblem(
            f"DALI {dali_version()} is installed but cannot be imported: {error}\n"
            f"  install it again: pip install --force-reinstall {PACKAGE}\n  or {_ALTERNATIVE}"
        ) from error
    if device.type == "cuda":
        _require_gpu(backend)
    if decoding and backend.GetNvimgcodecVersion() == -1:
        package = "nvidia-nvimgcodec-cu13"
        raise EnvironmentProblem(
            f"DALI {dali_version()} cannot decode images: its decoder library {package} is missing\n"
            f"  install it: pip install {package}\n  or {_ALTERNATIVE}"
        )


def dali_problem(error: BaseException, device: torch.device) -> EnvironmentProblem:
    """Convert an error of DALI itself to one message, without the traceback of the pipeline in it."""
    lines = [line.strip() for line in str(error).splitlines()]
    # If an operator failed, DALI first shows the code that asked for it, up to a line "encountered:".
    lines = [line for line in lines[lines.index("encountered:") + 1 if "encountered:" in lines else 0 :] if line]
    messages = [line for line in lines if not line.startswith(("Critical error", "Error in"))]
    return EnvironmentProblem(
        f"DALI {dali_version()} failed on {device}: {messages[0] if messages else error}\n  {_ALTERNATIVE}"
    )


def dali_version() -> str | None:
    """Return the installed version, or None."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(PACKAGE)
    return None


def driver_versions() -> tuple[str | None, tuple[int, int] | None]:
    """Return the NVIDIA driver's version, and the newest CUDA (major, minor) that it supports; None if unknown."""
    release = None
    with suppress(OSError):
        for line in Path("/proc/driver/nvidia/version").read_text().splitlines():
            if "Kernel Module" in line:
                release = next((word for word in line.split() if word[:1].isdigit() and "." in word), None)
    number = ctypes.c_int(0)
    with suppress(OSError, AttributeError):
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0:
            return release, (number.value // 1000, number.value % 1000 // 10)
    return release, None


def _require_gpu(backend: Any) -> None:
    built = int(str(backend.__cuda_version__)[:2])  # 13.4.92 is 13492
    release, known = driver_versions()
    title = f"DALI {dali_version()}, which is built for CUDA {built},"
    if known is None:
        raise EnvironmentProblem(
            f"{title} finds no NVIDIA driver on this machine\n"
            f"  install a driver that supports CUDA {built} (in a container: start it with its GPUs, --gpus all)\n"
            f"  or {_ALTERNATIVE}, or train on the CPU: cluster.device=cpu"
        )
    driver = f"the driver {f'{release} ' if release else ''}supports CUDA {known[0]}.{known[1]}"
    if known[0] < built:
        raise EnvironmentProblem(
            f"{title} cannot work here: {driver} at most\n"
            f"  update the driver to one that supports CUDA {built}, or {_ALTERNATIVE}"
        )
    problem = "finds no GPU"
    try:
        if backend.GetCUDADeviceCount() > 0:
            return
    except RuntimeError as error:  # for example after a driver update without a restart
        problem = f"cannot use the GPU ({' '.join(str(error).split())})"
    raise EnvironmentProblem(
        f"{title} {problem}, although {driver}\n"
        "  see 'nvidia-smi' and CUDA_VISIBLE_DEVICES; restart the machine if the driver was updated\n"
        f"  or {_ALTERNATIVE}, or train on the CPU: cluster.device=cpu"
    )

"""Whether DALI can work here, and what to say where it cannot. DALI itself is imported only when it is asked for."""

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
_WAY_OUT = "augment with torch instead: data.loader=torch"


def dali_installed() -> bool:
    """Whether the package is there; whether it works is another matter."""
    try:
        return util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # there is not even a folder "nvidia"
        return False


def require_dali(device: torch.device, *, decoding: bool) -> None:
    """Make sure that DALI can work on `device`.

    Args:
        decoding: whether it is to decode pictures in files.

    Raises:
        EnvironmentProblem: naming what is missing or too old, with the versions, and the way out.
    """
    if not dali_installed():
        raise EnvironmentProblem(
            f"data.loader=dali, but DALI is not installed\n  install it: pip install {PACKAGE}\n  or {_WAY_OUT}"
        )
    try:
        backend = importlib.import_module("nvidia.dali.backend")
        importlib.import_module("nvidia.dali.fn")
    except (ImportError, OSError) as error:
        raise EnvironmentProblem(
            f"DALI {dali_version()} is installed but cannot be imported: {error}\n"
            f"  install it again: pip install --force-reinstall {PACKAGE}\n  or {_WAY_OUT}"
        ) from error
    if device.type == "cuda":
        _require_driver(backend)
    if decoding:
        _require_decoders(backend)


def explain(error: BaseException, device: torch.device) -> EnvironmentProblem:
    """A failure of DALI itself in one message: the line that says what happened, not the wrapping around it."""
    lines = [line.strip() for line in str(error).splitlines()]
    # Where an operator failed, DALI shows the lines of code that asked for it before it says what happened.
    said = [line for line in lines[lines.index("encountered:") + 1 if "encountered:" in lines else 0 :] if line]
    telling = [line for line in said if not line.startswith(("Critical error", "Error in"))]
    return EnvironmentProblem(
        f"DALI {dali_version()} failed on {device}: {telling[0] if telling else error}\n  {_WAY_OUT}"
    )


def dali_version() -> str | None:
    """The installed version, or None."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(PACKAGE)
    return None


def driver_versions() -> tuple[str | None, tuple[int, int] | None]:
    """The NVIDIA driver's own version, and the newest CUDA (major, minor) that it knows; None for what is not there."""
    release = None
    with suppress(OSError):
        for line in Path("/proc/driver/nvidia/version").read_text().splitlines():
            if "Kernel Module" in line:
                release = next((word for word in line.split() if word[:1].isdigit() and "." in word), None)
    number = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            return release, None
    except (OSError, AttributeError):
        return release, None
    return release, (number.value // 1000, number.value % 1000 // 10)


def _require_driver(backend: Any) -> None:
    built = int(str(backend.__cuda_version__)[:2])  # 13.4.92 is 13492
    release, known = driver_versions()
    title = f"DALI {dali_version()}, which is built for CUDA {built},"
    if known is None:
        raise EnvironmentProblem(
            f"{title} finds no NVIDIA driver on this machine\n"
            f"  install a driver that knows CUDA {built} (in a container: start it with its GPUs, --gpus all)\n"
            f"  or {_WAY_OUT}, or train on the CPU: cluster.device=cpu"
        )
    driver = f"the driver {f'{release} ' if release else ''}knows CUDA {known[0]}.{known[1]}"
    if known[0] < built:
        raise EnvironmentProblem(
            f"{title} cannot work here: {driver} at most\n"
            f"  update the driver to one that knows CUDA {built}, or {_WAY_OUT}"
        )
    try:
        count = backend.GetCUDADeviceCount()
    except RuntimeError as error:  # a driver in disorder, as after an update without a restart
        raise EnvironmentProblem(
            f"{title} cannot use the GPU, although {driver}: {' '.join(str(error).split())}\n"
            f"  restart the machine if the driver was updated, or {_WAY_OUT}"
        ) from error
    if count == 0:
        raise EnvironmentProblem(
            f"{title} finds no GPU, although {driver}\n"
            f"  see 'nvidia-smi' and CUDA_VISIBLE_DEVICES, or {_WAY_OUT}, or train on the CPU: cluster.device=cpu"
        )


def _require_decoders(backend: Any) -> None:
    if backend.GetNvimgcodecVersion() == -1:
        package = "nvidia-nvimgcodec-cu13"
        raise EnvironmentProblem(
            f"DALI {dali_version()} cannot decode pictures: its decoder library {package} is missing\n"
            f"  install it: pip install {package}\n  or {_WAY_OUT}"
        )

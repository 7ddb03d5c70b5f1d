"""``densenet-dist doctor``: check whether a configuration can run on this machine, and how to fix what is missing."""

from __future__ import annotations

import importlib
import platform
import shlex
import uuid
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from rich.console import Console
from rich.text import Text

from densenet_dist.cluster.connection import address_of, connected
from densenet_dist.credentials import without_credentials
from densenet_dist.custom import is_custom
from densenet_dist.data.cifar import SPECS
from densenet_dist.data.dali_loader import PACKAGE as DALI_PACKAGE
from densenet_dist.data.dali_loader import dali_installed, dali_version, require_dali
from densenet_dist.data.datasets import GENERATED, prepare_dataset, publish_dataset
from densenet_dist.data.store import DataStore, locked_cache
from densenet_dist.environment import cpu_name, package_version
from densenet_dist.errors import DenseNetDistError, EnvironmentProblem
from densenet_dist.model.kernels import unavailable
from densenet_dist.object_store import is_uri
from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import Config
from densenet_dist.trackers import require_trackers, require_wandb_key

_COLORS = {"ok": "green", "note": "yellow", "bad": "red"}


class Finding(NamedTuple):
    """The result of a check.

    Attributes:
        state: ok, note (works with a limitation) or bad (does not work).
        text: what was found.
        hint: what to do about it.
    """

    state: Literal["ok", "note", "bad"]
    text: str
    hint: str = ""


def examine(config: Config) -> bool:
    """Run all checks and print their results; return whether the configuration can run here."""
    checks = {
        **{"machine": _machine, "torch": _torch, "GPUs": _gpus, "fused block": _block, "DALI": _dali, "Ray": _ray},
        **{"storage": _storage, "data": _data},
    }
    if config.log.wandb.enabled or config.log.mlflow.enabled:
        checks["loggers"] = _loggers
    console = Console(highlight=False)
    bad = []
    for name, check in checks.items():
        try:
            found = check(config)
        except DenseNetDistError as error:
            found = _failed(error)
        except Exception as error:  # the other checks still run
            found = Finding("bad", f"{type(error).__name__}: {error}")
        text = found.text + (f"\n{' ' * 19}-> {found.hint}" if found.hint else "")
        label = f"{found.state:<5} {name:<12} ", _COLORS[found.state]
        console.print(Text.assemble(label, without_credentials(text)), soft_wrap=True)
        if found.state == "bad":
            bad.append(name)
    console.print(f"\nnot ready: {', '.join(bad)}" if bad else "\nready")
    return not bad


def _failed(error: DenseNetDistError, state: Literal["note", "bad"] = "bad") -> Finding:
    problem, *hints = str(error).splitlines()
    return Finding(state, problem, " ".join(map(str.strip, hints)))


def _machine(config: Config) -> Finding:
    version = package_version("densenet-dist") or "not installed"
    return Finding("ok", f"densenet-dist {version}, Python {platform.python_version()}, {cpu_name()}")


def _torch(config: Config) -> Finding:
    try:
        vision = importlib.import_module("torchvision").__version__
    except (ImportError, RuntimeError) as error:
        problem = f"torch {torch.__version__}; torchvision does not import: {error}"
        return Finding("bad", problem, "install torch and torchvision of the same build: make setup")
    return Finding("ok", f"torch {torch.__version__}, torchvision {vision}, CUDA {torch.version.cuda}")


def _gpus(config: Config) -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("ok", f"{len(names)}: {', '.join(sorted(set(names)))}")
    driver = Path("/proc/driver/nvidia/version").exists()
    text = "an NVIDIA driver is installed, but torch cannot use a GPU" if driver else "no GPU"
    hint = f"update the driver to one that supports CUDA {torch.version.cuda}" if driver else ""
    if config.cluster.engine == "ray" and address_of(config.cluster)[0]:
        return Finding("note", f"{text} on this machine; the workers use those of the cluster (see Ray)", hint)
    if config.cluster.device == "cuda" and not (config.cluster.engine == "ray" and driver):
        return Finding("bad", text, hint or "train on the CPU with cluster.device=cpu")
    return Finding("note", text + "; training runs on the CPU", hint)


def _device(config: Config) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and config.cluster.device != "cpu" else "cpu")


def _block(config: Config) -> Finding:
    on_gpu = _device(config).type == "cuda"
    if reason := unavailable(_device(config).type):
        hint = "install a C++ compiler (Debian: apt install g++)"
        hint = "install Triton: make setup" if "not installed" in reason else hint
        hint = "" if "chmod" in reason else hint
        return Finding("note", f"{reason}; the reference form of the dense block is used", hint)
    return Finding("ok", "Triton kernels" if on_gpu else "C++ kernels, built for this CPU")


def _dali(config: Config) -> Finding:
    if not dali_installed():
        if config.data.loader == "dali":
            return Finding("bad", "not installed", f"pip install {DALI_PACKAGE}, or set data.loader=auto")
        return Finding("note", "not installed; the torch loader is used", f"pip install {DALI_PACKAGE}")
    device = _device(config)
    try:
        require_dali(device, decoding=config.data.name == "folder")
    except EnvironmentProblem as error:
        return _failed(error, "bad" if config.data.loader == "dali" else "note")
    return Finding("ok", f"{dali_version()}, on the {'GPU' if device.type == 'cuda' else 'CPU'}")


def _ray(config: Config) -> Finding:
    version = package_version("ray")
    if config.cluster.engine == "local":
        return Finding("ok", f"{version}, not used (cluster.engine=local)")
    with connected(config.cluster) as is_private:
        import ray

        resources = ray.cluster_resources()
    where = "starts on this machine" if is_private else f"cluster at {address_of(config.cluster)[0]}"
    shown = ", ".join(f"{resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
    return Finding("ok", f"{version}, {where}: {shown}")


def _storage(config: Config) -> Finding:
    run = RunFolder(config.storage, f".doctor-{uuid.uuid4().hex[:8]}")
    run.create()
    run.remove("")
    return Finding("ok", f"{config.storage} is writable")


def _data(config: Config) -> Finding:
    name, root = config.data.name, config.data.root
    if name in GENERATED or is_custom(name):
        return Finding("ok", f"{name} is generated when used")
    if is_uri(root):
        return _data_on_store(config)
    try:
        folder, found = prepare_dataset(name, root, download=False, on_bad_image=config.data.on_bad_image)
    except DenseNetDistError as error:
        text = str(error).splitlines()[0]
        if name == "folder":
            return Finding("bad", text, f"for details: densenet-dist data prepare folder --root {shlex.quote(root)}")
        if config.data.download and not any(Path(root).glob("cifar*")):
            return Finding("note", f"{name} is not in {root}; it will be downloaded")
        return Finding("bad", text, f"densenet-dist data prepare {name} --root {shlex.quote(root)}")
    return Finding("ok", f"{name} in {folder} is valid: {found}")


def _data_on_store(config: Config) -> Finding:
    """Check that the data set exists on the object store and that this node can copy it, without copying it."""
    name, root = config.data.name, config.data.root
    if config.data.download and name != "folder":
        store = DataStore(root)
        if SPECS[name].archive not in store.list():
            return Finding("note", f"{name} is not in {store.place}; it will be downloaded once and uploaded there")
    found = publish_dataset(name, root, download=False)
    with locked_cache(root) as entry:
        return Finding("ok", f"{found}; this node copies it to {entry}")


def _loggers(config: Config) -> Finding:
    """Check W&B and MLflow without contacting their servers."""
    require_trackers(config)
    if config.log.wandb.enabled:
        try:
            require_wandb_key()
        except PermissionError as error:
            problem, _, hint = str(error).partition(": ")
            return Finding("note", f"W&B has {problem}", hint)
    return Finding("ok", "installed and configured")

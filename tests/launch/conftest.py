"""The launchers as they are committed, and as they would be for other values."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DIGEST = "sha256:" + "0123456789abcdef" * 4
S3 = "s3://bucket/runs"


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"given twice: {keys}"
        return super().construct_mapping(node, deep)


def parse(text: str) -> list[dict[str, Any]]:
    return list(yaml.load_all(text, StrictLoader))


def load(path: Path) -> ModuleType:
    """A script of launch/, as a module."""
    spec = importlib.util.spec_from_file_location(f"launch_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def renderer() -> ModuleType:
    return load(ROOT / "launch" / "render.py")


@pytest.fixture(scope="session")
def starter() -> ModuleType:
    return load(ROOT / "launch" / "start.py")


@pytest.fixture(scope="session")
def cpu_lock() -> ModuleType:
    return load(ROOT / "launch" / "cpu_lock.py")


@pytest.fixture
def values() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "launch" / "values.yaml").read_text())


@pytest.fixture
def on_s3(values: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(values)
    changed["storage"], changed["aws"]["instance_profile"] = S3, "may-use-the-bucket"
    return changed


@pytest.fixture(params=["committed", "s3", "large"])
def variant(request: pytest.FixtureRequest, values: dict[str, Any], on_s3: dict[str, Any]) -> dict[str, Any]:
    """Values: as they stand; with an object store; and 4 workers of 8 GPUs with an image pinned by its digest."""
    if request.param == "s3":
        return on_s3
    if request.param == "large":
        values["workers"] = {"count": 4, "gpus": 8, "cpus": 96, "memory_gib": 768}
        values["on_prem"]["workers"] = [f"192.0.2.{host}" for host in range(11, 15)]
        values["image_digest"], values["name"] = DIGEST, "big"
        values["settings"] = ["train.global_batch_size=1024", "model.num_layers=[12,12]"]
        values["aws"]["worker_type"], values["gcp"]["worker_type"] = "p5.48xlarge", "a3-highgpu-8g"
    return values


@pytest.fixture
def files(variant: dict[str, Any], renderer: ModuleType) -> dict[str, str]:
    """The text of every launcher of the variant."""
    return renderer.render(variant)


@pytest.fixture
def documents(files: dict[str, str]) -> Callable[[str], list[dict[str, Any]]]:
    """The YAML documents of a launcher of the variant."""
    return lambda path: parse(files[path])


@pytest.fixture(scope="session")
def locked() -> Callable[[str], str]:
    """The version of a package in requirements.lock."""
    text = (ROOT / "requirements.lock").read_text()
    return lambda name: re.findall(rf"^{re.escape(name)}==([^ ;]+)", text, re.MULTILINE)[0]

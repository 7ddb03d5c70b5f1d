"""The launchers as they are committed, and rendered for other values."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[2]


class Rendered(NamedTuple):
    """All launchers for some values."""

    values: dict[str, Any]
    files: dict[str, str]

    @property
    def on_s3(self) -> bool:
        return self.values["storage"].startswith("s3://")

    @property
    def image(self) -> str:
        digest = self.values["image_digest"]
        return f"{self.values['image']}:{self.values['image_tag']}" + (f"@{digest}" if digest else "")

    def documents(self, path: str) -> list[dict[str, Any]]:
        return list(yaml.safe_load_all(self.files[path]))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def renderer() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "launch" / "render.py")))


@pytest.fixture
def values() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "launch" / "values.yaml").read_text())


@pytest.fixture(params=["committed", "s3", "large"])
def rendered(request: pytest.FixtureRequest, values: dict[str, Any], renderer: SimpleNamespace) -> Rendered:
    """For the values as committed; with an object store; with 4 workers of 8 GPUs and an image pinned by its digest."""
    if request.param == "s3":
        values["storage"], values["aws"]["instance_profile"] = "s3://bucket/runs", "may-use-the-bucket"
    if request.param == "large":
        values["workers"] = {"count": 4, "gpus": 8, "cpus": 96, "memory_gib": 768, "disk_gib": 500}
        values["on_prem"]["workers"] = [f"192.0.2.{host}" for host in range(11, 15)]
        values["image_digest"], values["name"] = "sha256:" + "0123456789abcdef" * 4, "big"
        values["kubernetes"] |= {"min_workers": 2, "service_account": "trainer", "image_pull_secrets": ["one", "two"]}
        values["kubernetes"]["egress"] = [{"cidr": "10.0.0.0/8", "port": 5000}]
        values["settings"] = ["train.global_batch_size=1024", "model.num_layers=[12,12]"]
    return Rendered(values, renderer.render(values))

"""A copy of a tiny run, exported files of it, and images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from densenet_dist.inference.exporting import export


@pytest.fixture
def run(original, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(original, tmp_path / "runs" / "tiny")


@pytest.fixture(scope="session")
def exported(original, tmp_path_factory):
    """A float32 file of a format, checked when it was written; not to be changed."""
    folder, made = tmp_path_factory.mktemp("exported"), {}

    def file(format: str) -> Path:
        if format not in made:
            if format == "onnx":
                pytest.importorskip("onnxscript")
                pytest.importorskip("onnxruntime")
            ending = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}[format]
            made[format] = export(original, format=format, out=folder / f"tiny{ending}").path
        return made[format]

    return file


@pytest.fixture
def images() -> torch.Tensor:
    """(5, 3, 32, 32) float32 gray levels."""
    return torch.randint(256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()

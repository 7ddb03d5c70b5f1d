"""A tiny run with averaged weights, exported files of it, and commands run in an empty folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from runs import run_of, tiny, train

from densenet_dist.inference.exporting import export


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """The folder of a finished run; not to be changed."""
    config = tiny(tmp_path_factory.mktemp("original"), "train.epochs=2", "train.ema_decay=0.5")
    train(config)
    return run_of(config).path


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
    """(5, 3, 32, 32) float32 grey levels."""
    return torch.randint(256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()

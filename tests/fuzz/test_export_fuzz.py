"""Exported files, scratched or forged: what comes out is a network that classifies, or one error."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import torch
from fuzz_budget import budget
from fuzz_bytes import scratched
from fuzz_json import forged
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from densenet_dist.errors import CheckpointError
from densenet_dist.inference.classifier import load_classifier
from densenet_dist.inference.exporting import export


class Files:
    """An exported file of a tiny run, and a place for changed copies."""

    def __init__(self, folder: Path) -> None:
        config = runs.tiny(folder, "train.epochs=1")
        runs.train(config)
        self.place = folder
        self.made = export(folder / "tiny", out=folder / "a.safetensors", check=False).path
        self.weights = load_file(self.made)
        with safe_open(self.made, "pt") as file:
            self.header = file.metadata()["densenet_dist"]

    def load(self, content: bytes | None = None) -> None:
        file = self.place / "x.safetensors"
        if content is not None:
            file.write_bytes(content)
        try:
            classifier = load_classifier(file, device="cpu")
        except CheckpointError:
            return
        size = classifier.header.image_size
        logits = classifier.logits(torch.zeros(1, 3, size, size))
        assert logits.shape == (1, len(classifier.class_names))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("exports"))


@budget(20, 400)
@given(st.data())
def test_scratched_files(files: Files, data: st.DataObject) -> None:
    files.load(data.draw(scratched(files.made.read_bytes())))


@budget(30, 300)
@given(st.data())
def test_forged_headers(files: Files, data: st.DataObject) -> None:
    text = data.draw(forged(files.header)).encode("utf-8", "replace").decode()
    save_file(files.weights, files.place / "x.safetensors", metadata={"densenet_dist": text})
    files.load()

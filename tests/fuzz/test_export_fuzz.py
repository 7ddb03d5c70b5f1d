"""Exported files, scratched or forged: what comes out is a net that classifies, or one error; nothing is run."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

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


class Canary:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


class Files:
    """Exported files of a tiny run, and a place for changed copies."""

    def __init__(self, folder: Path) -> None:
        config = runs.tiny(folder, "train.epochs=1")
        runs.train(config)
        self.place, self.ran = folder, folder / "ran"
        self.made = {
            format: export(folder / "tiny", format=format, out=folder / f"a{ending}", check=False).path
            for format, ending in (("safetensors", ".safetensors"), ("torch-export", ".pt2"))
        }
        self.weights = load_file(self.made["safetensors"])
        with safe_open(self.made["safetensors"], "pt") as file:
            self.header = file.metadata()["densenet_dist"]
        with zipfile.ZipFile(self.made["torch-export"]) as archive:
            self.members = {info.filename: archive.read(info) for info in archive.infolist()}

    def judge(self, name: str, content: bytes | None = None) -> None:
        file = self.place / name
        if content is not None:
            file.write_bytes(content)
        try:
            classifier = load_classifier(file, device="cpu")
        except CheckpointError:
            return
        finally:
            assert not self.ran.exists()
        size = classifier.header.image_size
        logits = classifier.logits(torch.zeros(1, 3, size, size))
        assert logits.shape == (1, len(classifier.class_names))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("exports"))


@budget(20, 400)
@given(st.data())
def test_scratched_files(files: Files, data: st.DataObject) -> None:
    format = data.draw(st.sampled_from(["safetensors", "torch-export"]))
    file = files.made[format]
    files.judge(f"x{file.suffix}", data.draw(scratched(file.read_bytes())))


@budget(30, 300)
@given(st.data())
def test_forged_headers(files: Files, data: st.DataObject) -> None:
    text = data.draw(forged(files.header)).encode("utf-8", "replace").decode()
    save_file(files.weights, files.place / "x.safetensors", metadata={"densenet_dist": text})
    files.judge("x.safetensors")


@budget(15, 200)
@given(st.data())
def test_forged_archives(files: Files, data: st.DataObject) -> None:
    members = dict(files.members)
    (config,) = [name for name in members if name.endswith("weights_config.json")]
    members[config] = data.draw(forged(members[config].decode())).encode("utf-8", "replace")
    for name in members:  # pickles where PyTorch's own loader would take them for such
        if name.endswith("sample_inputs/model.pt") or (name.endswith("weight_0") and data.draw(st.booleans())):
            members[name] = pickle.dumps(Canary(files.ran))
    with zipfile.ZipFile(files.place / "x.pt2", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    files.judge("x.pt2")

"""Checkpoints and exported files, damaged or forged: what was saved is loaded, or the damage is named."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import runs
import torch
from fuzzing import damaged, forged, fuzz
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from densenet_dist.errors import CheckpointError, DenseNetDistError, StorageError
from densenet_dist.inference.classifier import load_classifier
from densenet_dist.inference.exporting import export
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.evaluation import evaluate

SETTINGS = ("train.ema_decay=0.5", "checkpoint.keep=2", "train.epochs=2")
EXPORTS = ("exported.safetensors", "changed.safetensors")


class Original:
    """A finished run, and a copy of it to be damaged."""

    def __init__(self, folder: Path) -> None:
        runs.train(runs.tiny(folder, *SETTINGS))
        self.path, self.copy = folder / "tiny", folder / "copy"
        files = (path for path in self.path.glob("checkpoints/**/*") if path.is_file())
        self.files = sorted(str(path.relative_to(self.path)) for path in files)
        self.exported = export(self.path, out=folder / EXPORTS[0], check=False).path
        self.figures = [evaluate(self.path, checkpoint=which) for which in ("best", "last")]

    def fresh(self) -> Path:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.path, self.copy)
        return self.copy

    def sign(self) -> None:
        """Make every digest that of the file, as whoever can write one can write the other."""
        for meta in self.copy.glob("checkpoints/step-*/checkpoint.json"):
            said = json.loads(meta.read_text())
            for name in said["sha256"]:
                said["sha256"][name] = hashlib.sha256((meta.parent / name).read_bytes()).hexdigest()
            meta.write_text(json.dumps(said))

    def open_copy(self) -> None:
        """Read all that can be read; errors other than the two of a damaged run are failures."""
        store = CheckpointStore(runs.RunFolder(str(self.copy.parent), self.copy.name))
        for load in (store.load_latest, store.load_best):
            with suppress(CheckpointError, StorageError):
                load()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return Original(tmp_path_factory.mktemp("run"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@fuzz(3200)
@given(st.integers(0, 3).map(lambda number: number == 0), st.data())
def test_damaged_and_forged_files(original: Original, signed: bool, data: st.DataObject):
    """One in four is signed with the right digests, so that the formats themselves are met; then the run resumes."""
    copy = original.fresh()
    name = data.draw(st.sampled_from([name for name in original.files if not (signed and name.endswith(".json"))]))
    content = (original.path / name).read_bytes()
    forge = name.endswith(".json") and data.draw(st.booleans())
    if forge:
        content = data.draw(forged(content.decode())).encode("utf-8", "surrogatepass")
    else:
        content = data.draw(damaged(content))
    (copy / name).write_bytes(content)
    if signed:
        original.sign()
    original.open_copy()
    with suppress(DenseNetDistError if signed else (CheckpointError, StorageError)):
        if signed:
            runs.train(runs.tiny(copy.parent, *SETTINGS, "train.epochs=3", "name=copy"))
        else:
            found = evaluate(copy, checkpoint=data.draw(st.sampled_from(["best", "last"])))
            assert forge or found in original.figures
    assert {path.name for path in copy.parent.iterdir()} <= {"copy", "tiny", *EXPORTS}


def test_descriptions_and_lists_name_nothing_elsewhere(original: Original):
    """A device or a pipe would be read without end; from an object store, folders would be written to such a place."""
    copy = original.fresh()
    for meta in copy.glob("checkpoints/step-*/checkpoint.json"):
        said = json.loads(meta.read_text())
        said["sha256"]["../../config.yaml"] = hashlib.sha256((copy / "config.yaml").read_bytes()).hexdigest()
        meta.write_text(json.dumps(said))
    with pytest.raises(CheckpointError):
        evaluate(copy)
    copy = original.fresh()
    (copy / "elsewhere").mkdir()
    for folder in copy.glob("checkpoints/step-*"):
        folder.rename(copy / "elsewhere" / folder.name)
    manifest = copy / "checkpoints" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step-', '"../elsewhere/step-'))
    with pytest.raises(CheckpointError):
        evaluate(copy)


@fuzz(700)
@given(st.booleans(), st.data())
def test_exported_files(original: Original, only_header: bool, data: st.DataObject):
    """What comes out is a network that classifies, or one error."""
    file = original.exported.with_name(EXPORTS[1])
    if only_header:
        with safe_open(original.exported, "pt") as opened:
            header = data.draw(forged(opened.metadata()["densenet_dist"])).encode("utf-8", "replace").decode()
        save_file(load_file(original.exported), file, metadata={"densenet_dist": header})
    else:
        file.write_bytes(data.draw(damaged(original.exported.read_bytes())))
    with suppress(CheckpointError):
        classifier = load_classifier(file, device="cpu")
        size = classifier.header.image_size
        assert classifier.logits(torch.zeros(1, 3, size, size)).shape == (1, len(classifier.class_names))

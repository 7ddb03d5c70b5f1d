"""A run's checkpoints, scratched or forged: what was saved is loaded, or the damage is named; nothing is run."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from contextlib import suppress
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

from densenet_dist.errors import CheckpointError, DenseNetDistError, StorageError
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.evaluation import evaluate

SETTINGS = ("train.ema_decay=0.5", "checkpoint.keep=2", "train.epochs=2")


class Canary:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


class Original:
    """A finished run, and what may be found in copies of it."""

    def __init__(self, folder: Path) -> None:
        self.config = runs.tiny(folder, *SETTINGS)
        runs.train(self.config)
        self.path = folder / "tiny"
        self.copy, self.ran = folder / "copy", folder / "ran"
        self.files = sorted(
            str(path.relative_to(self.path)) for path in self.path.glob("checkpoints/**/*") if path.is_file()
        )
        self.figures = [evaluate(self.path, checkpoint=which) for which in ("best", "last")]
        self.weights = {
            hashlib.sha256(each).hexdigest()
            for files in runs.weights_of(self.config).values()
            for each in files.values()
        }

    def fresh(self) -> Path:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.path, self.copy)
        return self.copy

    def sign(self) -> None:
        """Make every digest that of the file, as whoever can write one can write the other."""
        for meta in self.copy.glob("checkpoints/step-*/checkpoint.json"):
            said = json.loads(meta.read_text())
            said["sha256"] = {
                name: hashlib.sha256((meta.parent / name).read_bytes()).hexdigest() for name in said["sha256"]
            }
            meta.write_text(json.dumps(said))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return Original(tmp_path_factory.mktemp("run"))


def opened(path: Path) -> None:
    """Read all that can be read; errors other than the two of a damaged run are failures."""
    for load in ("load_latest", "load_best"):
        with suppress(CheckpointError, StorageError):
            getattr(CheckpointStore(runs.RunFolder(str(path.parent), path.name)), load)()


@budget(40, 1200)
@given(st.data())
def test_scratched(original: Original, data: st.DataObject):
    copy = original.fresh()
    name = data.draw(st.sampled_from(original.files))
    (copy / name).write_bytes(data.draw(scratched((original.path / name).read_bytes())))
    opened(copy)
    try:
        figures = evaluate(copy, checkpoint=data.draw(st.sampled_from(["best", "last"])))
    except (CheckpointError, StorageError):
        return
    assert figures in original.figures


@budget(40, 1200)
@given(st.data())
def test_forged_lists(original: Original, data: st.DataObject):
    copy = original.fresh()
    name = data.draw(st.sampled_from([name for name in original.files if name.endswith(".json")]))
    text = data.draw(forged((original.path / name).read_text()))
    (copy / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    opened(copy)
    assert sorted(path.name for path in original.copy.parent.iterdir()) == ["copy", "tiny"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@budget(15, 800)
@given(st.data())
def test_forged_weights_and_states(original: Original, data: st.DataObject):
    """Signed with the right digests, so that the formats themselves are met; then the run goes on from it."""
    copy = original.fresh()
    name = data.draw(st.sampled_from([name for name in original.files if not name.endswith(".json")]))
    (copy / name).write_bytes(data.draw(scratched((original.path / name).read_bytes())))
    original.sign()
    opened(copy)
    with suppress(DenseNetDistError):
        runs.train(runs.tiny(copy.parent, *SETTINGS, "train.epochs=3", "name=copy"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["protocol 0", "protocol 2", "protocol 5", "zip", "legacy"])
@pytest.mark.parametrize(
    "file", ["state.pt", "model.safetensors", "ema.safetensors", "checkpoint.json", "manifest.json"]
)
def test_pickles_are_never_run(original: Original, form: str, file: str):
    copy, ran = original.fresh(), original.ran
    for path in copy.glob("checkpoints/**/*"):
        if path.name == file:
            write_canary(path, form, ran)
    if not file.endswith(".json"):
        original.sign()
    for act in (lambda: evaluate(copy), lambda: runs.train(runs.tiny(copy.parent, *SETTINGS, "name=copy"))):
        # A list may be made anew from the checkpoints that it should name.
        with suppress(CheckpointError) if file == "manifest.json" else pytest.raises(CheckpointError):
            act()
    assert not ran.exists()
    if file == "state.pt":
        torch.load(next(copy.glob("checkpoints/*/state.pt")), weights_only=False)
        assert ran.exists()  # it was a real one
        ran.unlink()


def write_canary(path: Path, form: str, target: Path) -> None:
    content = {"optimizer": Canary(target)}
    if form in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    elif path.name == "state.pt":
        torch.save(content, path, pickle_protocol=int(form[-1]) or 2)
    else:
        path.write_bytes(pickle.dumps(content, protocol=int(form[-1])))


def test_a_description_names_no_other_files(original: Original):
    """A device or a pipe would be read without end."""
    copy = original.fresh()
    for meta in copy.glob("checkpoints/step-*/checkpoint.json"):
        said = json.loads(meta.read_text())
        said["sha256"]["../../config.yaml"] = hashlib.sha256((copy / "config.yaml").read_bytes()).hexdigest()
        meta.write_text(json.dumps(said))
    with pytest.raises(CheckpointError):
        evaluate(copy)


def test_a_list_names_no_folders_elsewhere(original: Original):
    """From an object store they would be written to such a place."""
    copy = original.fresh()
    (copy / "elsewhere").mkdir()
    for folder in copy.glob("checkpoints/step-*"):
        folder.rename(copy / "elsewhere" / folder.name)
    said = json.loads((copy / "checkpoints" / "manifest.json").read_text())
    for entry in said["checkpoints"]:
        entry["name"] = f"../elsewhere/{entry['name']}"
    said["best"] = said["checkpoints"][0]["name"]
    (copy / "checkpoints" / "manifest.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError):
        evaluate(copy)

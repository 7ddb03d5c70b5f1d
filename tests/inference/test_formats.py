"""Exported files: the same network as the run's, whatever the format, and metadata; and what is refused."""

from __future__ import annotations

import json
import os
import sys
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import densenet_dist
from densenet_dist.data import shapes
from densenet_dist.errors import CheckpointError, ConfigError, EnvironmentProblem, StorageError
from densenet_dist.inference import formats
from densenet_dist.inference.classifier import load_classifier, open_trained
from densenet_dist.inference.exporting import LARGEST_DIFFERENCE, export
from densenet_dist.inference.header import header_of
from densenet_dist.train.evaluation import prepare_evaluation


def test_a_file_classifies_as_the_run_does(original, exported, images):
    classifier = load_classifier(exported("safetensors"))
    _, _, network = open_trained(original)
    for count in (1, 5):
        expected = network(images[:count])
        torch.testing.assert_close(classifier.logits(images[:count]), expected, rtol=0, atol=LARGEST_DIFFERENCE)
    assert classifier.class_names == shapes.CLASS_NAMES
    assert classifier.header.metrics.keys() >= {"val/top1"}


@pytest.mark.parametrize("format", ["safetensors", "torch-export", "onnx"])
def test_a_file_has_the_mode_of_other_files_and_no_folder_that_cannot_take_it(original, exported, tmp_path, format):
    (tmp_path / "other").touch()
    file = exported(format)
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode
    with pytest.raises(StorageError, match=r"^/proc/x\..* cannot be written: "):  # not even root can
        export(original, format=format, out=f"/proc/x{file.suffix}", check=False)
    os.mkfifo(tmp_path / f"pipe{file.suffix}")
    with pytest.raises(StorageError, match="not a regular file"):
        export(original, format=format, out=tmp_path / f"pipe{file.suffix}", check=False)


@pytest.mark.parametrize("format", ["torch-export", "onnx"])
def test_other_libraries_run_a_file_and_predict_names_them(original, exported, images, command, format):
    file = exported(format)
    if format == "onnx":
        assert b"/" + b"densenet_dist/" not in file.read_bytes()  # no paths of this machine
        session = pytest.importorskip("onnxruntime").InferenceSession(file)
        assert [each.shape[0] for each in (*session.get_inputs(), *session.get_outputs())] == ["batch", "batch"]
        assert json.loads(session.get_modelmeta().custom_metadata_map["densenet_dist"])["run"] == "tiny"

        def program(pixels):
            return torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])
    else:
        with warnings.catch_warnings(action="ignore"):
            program = torch.export.load(file).module()
    _, _, network = open_trained(original)
    for count in (1, 5):
        expected = network(images[:count])
        torch.testing.assert_close(program(images[:count]), expected, rtol=0, atol=LARGEST_DIFFERENCE)
    code, _, err = command("predict", file, "x.png")
    assert code == 6
    assert "onnxruntime runs .onnx files, torch.export.load reads .pt2 files" in err


def test_export_checks_and_names_the_file(original, command, tmp_path):
    code, out, _ = command("export", original)
    assert (code, [path.name for path in tmp_path.iterdir()]) == (0, ["tiny.safetensors"])
    assert "checked on 75 test images" in out
    assert "top-1 agrees on all" in out
    classifier, evaluation = densenet_dist.load_classifier("tiny.safetensors"), prepare_evaluation(original)
    (prediction,) = classifier.predict(evaluation.dataset.test.images[7], top=3)
    with torch.no_grad():
        logits = evaluation.model.eval()(next(iter(evaluation.loader())).images)
    assert [guess.label for guess in prediction.top] == logits[7].topk(3).indices.tolist()
    code, out, _ = command("export", original, "--no-check", "data.root=/nowhere", "--checkpoint", "last")
    assert code == 0
    assert "not checked" in out
    with safe_open(tmp_path / "tiny.safetensors", "pt") as file:
        assert json.loads(file.metadata()["densenet_dist"])["checkpoint"].startswith("last, step 10")


@pytest.mark.parametrize("change", [0.001, float("nan")])
def test_a_file_that_differs_is_not_kept(original, monkeypatch, tmp_path, change):
    def broken(network, header):
        with torch.no_grad():
            network.model.classifier.bias[0] += change
        return formats.safetensors_bytes(network, header)

    monkeypatch.setitem(formats.WRITERS, "safetensors", broken)
    with pytest.raises(CheckpointError, match=r"(?s)differ from those of the run by up to (0\.001|nan).*--no-check"):
        export(original, out=tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_export_refuses(original, tmp_path):
    with pytest.raises(ConfigError, match=r"must end in \.safetensors"):
        export(original, out=tmp_path / "x.onnx")
    with pytest.raises(StorageError, match="cannot be written: No such file"):
        export(original, out=tmp_path / "none" / "x.safetensors", check=False)


def test_onnx_without_its_packages_names_the_extra(original, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = command("export", original, "--format", "onnx")
    assert code == EnvironmentProblem.exit_code
    assert "pip install 'densenet-dist[onnx]'" in err


@pytest.fixture
def header(exported) -> str:
    """The metadata of an exported file."""
    with safe_open(exported("safetensors"), "pt") as file:
        return file.metadata()["densenet_dist"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h.update(format=2), "format"),
        (lambda h: h.update(mean=[float("nan"), 0, 0]), "mean.0"),
        (lambda h: h.update(class_names=["Käse ☂"]), "1 class names for 10 classes"),
        (lambda h: h.update(run="\u202etxt"), "cannot be printed"),
        (lambda h: h["architecture"].update(growth_rate=10**9), "architecture.growth_rate"),
        (lambda h: h["architecture"].update(num_layers=[2000] * 3), "6000 layers, more than 2000"),
    ],
)
def test_metadata_that_cannot_be_true(header, change, said):
    assert header_of(header, "x").to_json() == header
    content = json.loads(header)
    change(content)
    with pytest.raises(CheckpointError, match="x: its metadata is not that of an exported model: ") as caught:
        header_of(json.dumps(content), "x")
    assert said in str(caught.value)


def test_metadata_of_another_kind():
    others = dict.fromkeys(("", "[]", "[" * 100_000, b"\xff"), "is not that of an exported model")
    others |= {None: "it has no densenet_dist in its metadata", " " * 9_000_000: "has 9,000,000 bytes"}
    for text, said in others.items():
        with pytest.raises(CheckpointError, match=said):
            header_of(text, "x")


def test_files_of_others_are_refused(exported, header, tmp_path, command):
    weights = load_file(exported("safetensors"))
    old = json.dumps(json.loads(header) | {"precision": "int8"})  # as an earlier version wrote
    save_file(weights, tmp_path / "plain.safetensors")
    save_file(weights, tmp_path / "int8.safetensors", metadata={"densenet_dist": old})
    save_file(weights | {"more": torch.zeros(1)}, tmp_path / "other.safetensors", metadata={"densenet_dist": header})
    for name, said in (
        ("plain.safetensors", "was not written by densenet-dist export"),
        ("int8.safetensors", "precision: Input should be 'fp32'"),
        ("other.safetensors", "not in this model: more"),
        ("missing.safetensors", "cannot be read: No such file"),
    ):
        code, out, err = command("predict", name, "x.png")
        assert (code, out) == (6, "")
        assert said in err

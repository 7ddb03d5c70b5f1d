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
from densenet_dist.train.evaluation import evaluate, prepare_evaluation


@pytest.mark.parametrize("format", ["safetensors", "onnx"])
def test_a_file_classifies_as_the_run_does(original, exported, images, format):
    classifier = load_classifier(exported(format))
    _, _, network = open_trained(original)
    for count in (1, 5):
        expected = network(images[:count])
        torch.testing.assert_close(classifier.logits(images[:count]), expected, rtol=0, atol=LARGEST_DIFFERENCE)
    assert b"/" + b"densenet_dist/" not in exported(format).read_bytes()  # no paths of this machine
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
    if format == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(file)
        assert [each.shape[0] for each in (*session.get_inputs(), *session.get_outputs())] == ["batch", "batch"]


def test_pytorch_alone_runs_a_program_and_predict_refuses_it(original, exported, images, command):
    with warnings.catch_warnings(action="ignore"):
        program = torch.export.load(exported("torch-export")).module()
    _, _, network = open_trained(original)
    for count in (1, 5):
        torch.testing.assert_close(program(images[:count]), network(images[:count]), rtol=0, atol=1e-5)
    code, _, err = command("predict", exported("torch-export"), "x.png")
    assert code == 6
    assert "is a torch-export file" in err


@pytest.mark.parametrize("format", ["safetensors", pytest.param("torch-export", marks=pytest.mark.nightly)])
def test_bf16_halves_the_file_and_says_what_it_loses(original, exported, command, format, tmp_path):
    code, out, _ = command("export", original, "--out", exported(format).name, "--precision", "bf16",
                           "--format", format)  # fmt: skip
    assert code == 0
    assert "checked on 75 test images: largest difference of a logit" in out
    assert f"test top-1: {evaluate(original)['top1']:.2%} in fp32" in out
    small = tmp_path / exported(format).name
    assert small.stat().st_size < exported(format).stat().st_size
    if format == "safetensors":
        assert load_classifier(small).header.precision == "bf16"


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
    with pytest.raises(ConfigError, match="no bf16 convolutions"):
        export(original, format="onnx", precision="bf16")
    with pytest.raises(ConfigError, match=r"must end in \.safetensors"):
        export(original, out=tmp_path / "x.onnx")
    with pytest.raises(StorageError, match="no such folder"):
        export(original, out=tmp_path / "none" / "x.safetensors")


def test_onnx_without_its_packages_names_the_extra(original, monkeypatch, command, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"\x08\x08")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for arguments in (("export", original, "--format", "onnx"), ("predict", "x.onnx", "x.png")):
        code, _, err = command(*arguments)
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
        ("int8.safetensors", "precision: Input should be 'fp32' or 'bf16'"),
        ("other.safetensors", "not in this model: more"),
        ("missing.onnx", "cannot be read: No such file"),
    ):
        code, out, err = command("predict", name, "x.png")
        assert (code, out) == (6, "")
        assert said in err


def test_an_onnx_file_cannot_read_others(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    for place in ("secret.bin", f"../{tmp_path.name}/secret.bin", str(tmp_path / "secret.bin")):
        weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", place), ("offset", "0"), ("length", "16")):
            entry = weight.external_data.add()
            entry.key, entry.value = key, value
        shown = [onnx.helper.make_tensor_value_info(name, 1, [4]) for name in ("pixels", "logits")]
        node = onnx.helper.make_node("Add", ["pixels", "w"], ["logits"])
        graph = onnx.helper.make_graph([node], "g", shown[:1], shown[1:], [weight])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
        (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(CheckpointError, match=r"x\.onnx is damaged, or no ONNX file: .*(xternal data|model_path)"):
            load_classifier("x.onnx")

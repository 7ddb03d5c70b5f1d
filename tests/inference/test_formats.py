"""Exported files: the same net as the run's, whatever the format; and what is refused."""

from __future__ import annotations

import json
import sys
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import densenet_dist
from densenet_dist.data import shapes
from densenet_dist.errors import CheckpointError, ConfigError, EnvironmentProblem, StorageError
from densenet_dist.inference import safetensors_format, torch_export_format
from densenet_dist.inference.classifier import load_classifier, open_exported
from densenet_dist.inference.exporting import LARGEST_DIFFERENCE, export
from densenet_dist.inference.header import make_header
from densenet_dist.inference.network import Network
from densenet_dist.inference.trained import open_trained
from densenet_dist.model import densenet
from densenet_dist.train.evaluation import evaluate, predict, prepare_evaluation

FORMATS = ("safetensors", "torch-export", "onnx")
VARIANTS = {
    "notebook": {"growth_rate": 5, "num_layers": (2, 1)},
    "densenet": {"growth_rate": 4, "num_layers": (1, 2), "drop_rate": 0.2},
    "densenet_bc": {"growth_rate": 4, "num_layers": (2, 1)},
    "densenet121": {"growth_rate": 4, "num_layers": (1, 1), "image_size": 40},
}


def net_of(variant):
    torch.manual_seed(1)
    net = densenet(variant, num_classes=3, **VARIANTS[variant]).eval()
    with torch.no_grad():  # statistics as training leaves them, or half of the net would be untested
        for name, each in net.state_dict().items():
            if name.endswith(("running_var", "norm1.weight")):
                each.uniform_(0.5, 1.5)
            elif name.endswith(("running_mean", "norm1.bias")):
                each.uniform_(-0.5, 0.5)
    return net


def header_for(net, precision="fp32"):
    return make_header(
        net.architecture, version="1", run="r", data="shapes", checkpoint="best", commit=None, created="now",
        class_names=("a", "b", "c"), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3), crop=1.0, precision=precision,
        metrics={},
    )  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_is_the_run(original, exported, images, format):
    classifier = load_classifier(exported(format))
    run = open_trained(original, device="cpu")
    for count in (1, 2, 5):
        torch.testing.assert_close(
            classifier.logits(images[:count]), run.network(images[:count]), rtol=0, atol=LARGEST_DIFFERENCE
        )
    assert classifier.class_names == shapes.CLASS_NAMES
    assert classifier.header.run == "tiny"
    assert classifier.header.metrics.keys() >= {"val/top1"}


def test_the_weights_are_those_that_the_run_is_evaluated_with(original, exported):
    best = original / "checkpoints" / json.loads((original / "checkpoints" / "manifest.json").read_text())["best"]
    averaged, trained = load_file(best / "ema.safetensors"), load_file(best / "model.safetensors")
    written = load_file(exported("safetensors"))
    assert written.keys() == {name for name in averaged if not name.endswith("num_batches_tracked")}
    assert all(torch.equal(written[name], averaged[name]) for name in written)
    assert any(not torch.equal(written[name], trained[name]) for name in written)


def some(*often):
    """All variants, those but `often` nightly: what differs between them is the net's own, and tested there."""
    return [pytest.param(name, marks=[] if name in often else [pytest.mark.nightly]) for name in VARIANTS]


@pytest.mark.parametrize("variant", some("notebook", "densenet_bc"))
def test_every_variant_in_the_formats_of_torch(tmp_path, variant):
    net = net_of(variant)
    header = header_for(net)
    pixels = torch.rand(3, 3, header.image_size, header.image_size) * 255
    wanted = Network(net, header.mean, header.std)(pixels).detach()
    assert wanted.std() > 0.01
    safetensors_format.write(net, header, tmp_path / "a.safetensors")
    torch_export_format.write(Network(net, header.mean, header.std), header, tmp_path / "a.pt2")
    for file in ("a.safetensors", "a.pt2"):
        found = open_exported(tmp_path / file)
        assert found.header == header
        torch.testing.assert_close(found.logits(pixels), wanted, rtol=0, atol=1e-5)
    program = torch_export_format.run_program(tmp_path / "a.pt2")
    torch.testing.assert_close(program(pixels[:1]), wanted[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", some("notebook"))
def test_every_variant_as_onnx(tmp_path, variant):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from densenet_dist.inference import onnx_format

    net = net_of(variant)
    header = header_for(net)
    pixels = torch.rand(3, 3, header.image_size, header.image_size) * 255
    wanted = Network(net, header.mean, header.std)(pixels).detach()
    onnx_format.write(Network(net, header.mean, header.std), header, tmp_path / "a.onnx")
    torch.testing.assert_close(
        open_exported(tmp_path / "a.onnx").logits(pixels), wanted, rtol=0, atol=LARGEST_DIFFERENCE
    )
    assert b"/" + b"densenet_dist/" not in (tmp_path / "a.onnx").read_bytes()  # no paths of this machine


@pytest.mark.parametrize(
    ("format", "precision"),
    [
        pytest.param("safetensors", "bf16", marks=pytest.mark.nightly),
        ("safetensors", "int8"),
        pytest.param("torch-export", "bf16", marks=pytest.mark.nightly),
        ("onnx", "int8"),
    ],
)
def test_smaller_files_say_what_they_lose(original, exported, images, format, precision, tmp_path):
    whole, small = exported(format), exported(format, precision)
    if format == "onnx":  # all of it is 8 bits; of a net this small the graph is most of the file
        assert b"QuantizeLinear" in small.read_bytes()
    else:
        assert small.stat().st_size < whole.stat().st_size
    wanted, found = (load_classifier(file).logits(images) for file in (whole, small))
    assert 0 < (wanted - found).abs().max() < 0.5 * wanted.std()


def test_export_tells_what_was_compared(original, command):
    code, out, _ = command("export", original, "--out", "small.safetensors", "--precision", "int8")
    assert code == 0
    assert "checked on 75 test images: largest difference of a logit" in out
    top1 = evaluate(original)["top1"]
    assert f"test top-1: {top1:.2%} in fp32" in out


def test_export_checks_and_names_the_file(original, command, tmp_path):
    code, out, _ = command("export", original)
    assert (code, [path.name for path in tmp_path.iterdir()]) == (0, ["tiny.safetensors"])
    assert "tiny.safetensors: " in out
    assert "checked on 75 test images" in out
    assert "top-1 agrees on all" in out
    code, out, _ = command("export", original, "--no-check", "data.root=/nowhere", "--checkpoint", "last")
    assert code == 0
    assert "not checked" in out
    with safe_open(tmp_path / "tiny.safetensors", "pt") as file:
        assert json.loads(file.metadata()["densenet_dist"])["checkpoint"].startswith("last, step 10")


def test_a_file_that_differs_is_not_kept(original, monkeypatch, tmp_path):
    write = safetensors_format.write

    def broken(model, header, path):
        with torch.no_grad():
            model.classifier.bias[0] += 0.001
        write(model, header, path)

    monkeypatch.setattr(safetensors_format, "write", broken)
    with pytest.raises(CheckpointError, match=r"(?s)differ from those of the run by up to 0\.001.*--no-check"):
        export(original, out=tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_export_refuses(original, tmp_path, command):
    with pytest.raises(ConfigError, match="no bf16 convolutions"):
        export(original, format="onnx", precision="bf16")
    with pytest.raises(ConfigError, match="int8 is for onnx and safetensors"):
        export(original, format="torch-export", precision="int8")
    with pytest.raises(ConfigError, match=r"must end in \.safetensors"):
        export(original, out=tmp_path / "x.onnx")
    with pytest.raises(StorageError, match="no such folder"):
        export(original, out=tmp_path / "none" / "x.safetensors")
    code, _, err = command("export", "nothing")
    assert (code, "there is no run at" in err) == (5, True)


def test_onnx_without_its_packages_names_the_extra(original, exported, monkeypatch, command, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"\x08\x08")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for arguments in (("export", original, "--format", "onnx"), ("predict", "x.onnx", "x.png")):
        code, _, err = command(*arguments)
        assert code == EnvironmentProblem.exit_code
        assert "pip install 'densenet-dist[onnx]'" in err


def test_an_archive_is_read_without_its_program_or_pickles(exported, tmp_path):
    """What could run in an archive is not looked at, or is the reason to refuse it."""
    source = exported("torch-export")
    with zipfile.ZipFile(source) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}

    def written(change, compression=zipfile.ZIP_STORED):
        changed = dict(files)
        change(changed)
        with zipfile.ZipFile(tmp_path / "x.pt2", "w", compression) as archive:
            for name, content in changed.items():
                archive.writestr(name, content)
        return tmp_path / "x.pt2"

    def named(end):
        (name,) = [name for name in files if name.endswith(end)]
        return name

    def edit_config(changed, edit):
        said = json.loads(changed[named("weights_config.json")])
        edit(next(iter(said["config"].values())))
        changed[named("weights_config.json")] = json.dumps(said)

    def harmless(changed):
        for end in ("models/model.json", "sample_inputs/model.pt", "constants_config.json"):
            changed[named(end)] = b"x"

    load_classifier(written(harmless))
    for change, said in (
        (lambda c: edit_config(c, lambda entry: entry.update(use_pickle=True)), "pickled weights"),
        (lambda c: edit_config(c, lambda entry: entry.update(path_name="../x")), "damaged"),
        (lambda c: edit_config(c, lambda entry: entry["tensor_meta"].update(storage_offset={"as_int": 4})), "laid out"),
        (lambda c: edit_config(c, lambda entry: entry["tensor_meta"].update(sizes=[{"as_int": 10**9}])), "in this net"),
        (lambda c: c.pop(named("extra/densenet_dist.json")), "has no densenet_dist in its metadata"),
        (lambda c: c.pop(named("weights/weight_0")), "damaged"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load_classifier(written(change))
    with pytest.raises(CheckpointError, match="packed members"):
        load_classifier(written(lambda c: None, zipfile.ZIP_DEFLATED))


def test_files_of_others_are_refused(exported, tmp_path, command):
    weights = load_file(exported("safetensors"))
    save_file(weights, tmp_path / "plain.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights at all")
    (tmp_path / "empty.pt2").write_bytes(b"")
    for name, said in (
        ("plain.safetensors", "was not written by densenet-dist export"),
        ("text.safetensors", "is no exported net"),
        ("empty.pt2", "is no exported net"),
        ("missing.onnx", "cannot be read: No such file"),
    ):
        code, out, err = command("predict", name, "x.png")
        assert (code, out) == (6, "")
        assert said in err


def test_python_interface(original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = densenet_dist.export(original)
    assert made.check.largest < 1e-6
    classifier = densenet_dist.load_classifier(made.path)
    evaluation = prepare_evaluation(original)
    picture = evaluation.dataset.test.images[7]
    (prediction,) = classifier.predict(picture, top=3)
    assert [guess.name for guess in prediction.top] == [
        classifier.class_names[label] for label in predict(evaluation).logits[7].topk(3).indices.tolist()
    ]
    assert len(classifier.predict([picture, picture], top=99)[1].top) == 10


@pytest.mark.parametrize("place", ["secret.bin", "../{folder}/secret.bin", "{path}/secret.bin"])
def test_an_onnx_file_cannot_read_others(tmp_path, monkeypatch, place):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    where = place.format(folder=tmp_path.name, path=tmp_path)
    for key, value in (("location", where), ("offset", "0"), ("length", "16")):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    shown = [onnx.helper.make_tensor_value_info(name, 1, [4]) for name in ("pixels", "logits")]
    node = onnx.helper.make_node("Add", ["pixels", "w"], ["logits"])
    graph = onnx.helper.make_graph([node], "g", shown[:1], shown[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"x\.onnx is damaged, or no ONNX file: .*(xternal data|model_path)"):
        load_classifier("x.onnx")

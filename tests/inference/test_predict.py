"""Pictures: found, decoded and shown to the net as an evaluation would; and ``densenet-dist predict``."""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from photos import write_photos
from PIL import Image
from runs import run_of, tiny, train

from densenet_dist.config import load_config, to_yaml
from densenet_dist.errors import DataError, StorageError
from densenet_dist.inference import images as inference_images
from densenet_dist.inference.classifier import load_classifier
from densenet_dist.inference.images import Unreadable, find, prepare
from densenet_dist.train.evaluation import prepare_evaluation


@pytest.fixture
def photo() -> Image.Image:
    """60 x 40 pixels of smooth colors."""
    across, down = np.meshgrid(np.linspace(0, 255, 60), np.linspace(0, 255, 40))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=2).round().astype(np.uint8))


def assert_files_are_classified_as_in_evaluation(run, files):
    classifier, evaluation = load_classifier(run, device="cpu"), prepare_evaluation(run)
    size = evaluation.config.train.eval_batch_size
    batches = [files[start : start + size] for start in range(0, len(files), size)]
    for batch, expected in zip(batches, evaluation.loader(), strict=True):
        pixels = torch.stack([prepare(file, classifier.header.image_size, classifier.header.crop) for file in batch])
        with torch.no_grad():
            assert torch.equal(classifier.logits(pixels), evaluation.model.eval()(expected.images))


def test_pictures_of_a_data_set_give_the_bits_of_its_evaluation(original, tmp_path):
    evaluation = prepare_evaluation(original)
    for place, image in enumerate(evaluation.dataset.test.images):
        Image.fromarray(image).save(tmp_path / f"{place:04d}.png")
    assert_files_are_classified_as_in_evaluation(original, sorted(tmp_path.iterdir()))


def test_images_of_a_data_set_are_never_cropped(run):
    changed = load_config(run / "config.yaml", "data.augment=random_resized_crop")
    (run / "config.yaml").write_text(to_yaml(changed))
    assert load_classifier(run).header.crop == 1.0


def test_pictures_in_folders_are_cut_as_in_evaluation(tmp_path):
    for part, count in (("train", 4), ("test", 3)):
        write_photos(tmp_path / "photos" / part, ("cat", "dog"), count)
    root = f"data.root={tmp_path / 'photos'}"
    settings = ("data.name=folder", root, "data.image_size=32", "data.augment=random_resized_crop", "data.limit=null")
    config = tiny(tmp_path, *settings, "train.epochs=1", "train.global_batch_size=4", "data.val_fraction=0.25")
    train(config)
    files = sorted((tmp_path / "photos" / "test").glob("*/*"))
    assert_files_are_classified_as_in_evaluation(run_of(config).path, files)
    shutil.rmtree(tmp_path / "photos")
    assert load_classifier(run_of(config).path).class_names == ("cat", "dog")  # without the data set


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_has_any_encoding(original, photo, command, tmp_path, monkeypatch, encoding):
    photo.save(tmp_path / "größe 猫.png")
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding))
    assert command("predict", original, "größe 猫.png")[0] == 0
    text = written.getvalue().decode(encoding)
    assert r"e \u732b.png" in text
    assert "#" in text  # its bars


def test_classes_json_of_an_old_or_damaged_run(run, original, command):
    wanted = load_classifier(original).header
    said = json.loads((run / "classes.json").read_text())
    (run / "classes.json").unlink()  # an old run: the data set tells its classes
    found = load_classifier(run).header
    assert (found.class_names, found.mean) == (wanted.class_names, wanted.mean)
    (run / "classes.json").write_text('{"names": 3}')
    code, _, err = command("predict", run, "x.png")
    assert (code, "classes.json is damaged" in err) == (5, True)
    said["names"][0] = "\x1b[2J"  # what a terminal would obey
    (run / "classes.json").write_text(json.dumps(said))
    code, _, err = command("predict", run, "x.png")
    assert (code, "class name '\\x1b[2J' cannot be printed" in err) == (6, True)


def test_kinds_of_pictures(tmp_path, photo):
    photo.save(tmp_path / "a.png")
    wanted = prepare(tmp_path / "a.png", 32, 1.0)
    assert wanted.shape == (3, 32, 32)
    for given in (photo, np.asarray(photo), photo.convert("RGBA")):
        assert torch.equal(prepare(given, 32, 1.0), wanted)
    ink = Image.new("LA", (2, 1))
    ink.putpixel((0, 0), (0, 64))  # a quarter of black on white, and white
    ink.save(tmp_path / "ink.png")
    palette = ink.convert("RGBA").quantize(2)
    palette.save(tmp_path / "palette.png")
    for given in (ink, palette, tmp_path / "ink.png", tmp_path / "palette.png"):
        assert inference_images._decode(given).tolist() == [[[191, 255]]] * 3
    for name in ("a.webp", "a.bmp", "a.tif", "a.ppm"):
        photo.save(tmp_path / name, lossless=True)
        assert torch.equal(prepare(tmp_path / name, 32, 1.0), wanted)
    gray = np.asarray(photo.convert("L"))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "16.png")
    assert torch.equal(prepare(tmp_path / "16.png", 32, 1.0), prepare(photo.convert("L"), 32, 1.0))


def test_pictures_that_cannot_be_used(tmp_path, photo, original):
    photo.save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("hello")
    photo.save(tmp_path / "moving.gif", save_all=True, append_images=[photo.rotate(20)])
    photo.save(tmp_path / "postscript.png", "EPS")  # which Pillow would hand to Ghostscript
    os.mkfifo(tmp_path / "pipe.png")
    photo.save(tmp_path / "odd.jpg")
    (tmp_path / "odd.jpg").write_bytes((tmp_path / "odd.jpg").read_bytes()[:-2] + bytes(9) + b"\xff\xd9")
    names = ["cut.png", "text.png", "postscript.png", "moving.gif", "pipe.png", "none.png", "odd.jpg"]
    found = list(load_classifier(original).stream([tmp_path / "whole.png", *(tmp_path / name for name in names)]))
    assert [type(item).__name__ for item in found] == ["Prediction"] + ["Unreadable"] * len(names)
    assert found.pop().reason.startswith("damaged: Corrupt JPEG data: ")
    assert [item.reason for item in found[1:]] == [
        "cut short or damaged", "not an image", "not an image", "an animation of 2 frames", "not a file",
        "cannot be read: it does not exist, or is a broken link",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"(?s)cut\.png: cut short.*none\.png: cannot be read: it does not exist"):
        load_classifier(original).predict([tmp_path / "cut.png", tmp_path / "whole.png", tmp_path / "none.png"])
    with Image.open(tmp_path / "cut.png") as opened, pytest.raises(DataError, match="image 1: cut short"):
        load_classifier(original).predict(opened)
    for wrong in (np.zeros((4, 4, 3)), np.zeros((3, 4, 5), np.uint8), np.zeros((0, 4, 3), np.uint8), 5):
        with pytest.raises(DataError, match=r"uint8 .*\(H, W, 3\)"):
            load_classifier(original).predict([wrong])


def test_files_and_folders(tmp_path):
    for name in ("b.png", "a.jpg", "deep/er/c.webp", "deep/.hidden/d.png", "deep/notes.txt", "e.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "bare").mkdir()

    def names(*arguments):
        return [
            (item.source, item.reason) if isinstance(item, Unreadable) else str(item.relative_to(tmp_path))
            for item in find(str(tmp_path / argument) for argument in arguments)
        ]

    assert names("") == ["a.jpg", "b.png", "e.tiff", "deep/er/c.webp"]
    assert names("deep/notes.txt", "b.png") == ["deep/notes.txt", "b.png"]
    assert names("bare") == [(str(tmp_path / "bare"), "contains no images")]
    (tmp_path / "bare" / "linked").symlink_to(tmp_path / "deep")  # as training follows it
    (tmp_path / "deep" / "er" / "back").symlink_to(tmp_path / "bare")
    assert names("bare") == ["bare/linked/er/c.webp"]


def test_predict_command(original, tmp_path, photo, command):
    photo.save(tmp_path / "b[bold].png")
    photo.save(tmp_path / "a.png")
    code, out, err = command("predict", original, tmp_path, "--top", "2", "--device", "cpu")
    assert code == 0
    assert out.count("%") == 4
    assert "b[bold].png" in out
    assert "2 images in " in err
    assert "images/s on cpu" in err
    (tmp_path / "c.png").write_text("x")
    files, options = ("a.png", "c.png", "b[bold].png"), ("--json", "--tta", "--batch-size", "1")
    code, out, err = command("predict", original, *files, *options)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 4
    assert [line["image"] for line in lines] == ["a.png", "b[bold].png"]
    assert sum(guess["probability"] for guess in lines[0]["top"]) <= 1
    assert sorted(lines[0]["top"], key=lambda guess: -guess["probability"]) == lines[0]["top"]
    assert "c.png: not an image" in err
    assert "error: 1 of 3 images could not be used" in err


def test_a_stream_leaves_the_filters_of_warnings_alone(original, photo):
    before = list(warnings.filters)
    stream = load_classifier(original).stream([photo] * 9, batch_size=1)
    next(stream)
    assert warnings.filters == before


def test_tta_is_the_mean_with_the_mirror_image(original, images):
    classifier = load_classifier(original)
    both = [classifier.logits(each) for each in (images, images.flip(3))]
    torch.testing.assert_close(classifier.logits(images, tta=True), (both[0] + both[1]) / 2)
    assert not torch.equal(*both)


def test_a_run_and_a_file_on_an_object_store(run, exported, s3, tmp_path, photo, images):
    from pyarrow import fs

    base, _, query = s3.partition("%s")
    store, _ = fs.FileSystem.from_uri(f"{base}{query}")
    store.create_dir("bucket/predict/tiny")
    for local, name in ((run, "predict/tiny"), (exported("safetensors"), "tiny.safetensors")):
        fs.copy_files(str(local), f"bucket/{name}", fs.LocalFileSystem(), store)
    found = [load_classifier(s3 % name).logits(images) for name in ("/predict/tiny", "/tiny.safetensors")]
    torch.testing.assert_close(found[0], found[1])
    with pytest.raises(StorageError, match=r"none\.onnx cannot be read"):
        load_classifier(s3 % "/none.onnx")

"""A person's own pictures: the same command, what cannot be used is said first, and what breaks later is lived with."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from distributed import run_ranks
from photos import write_photos
from runs import notes_of, run_of, tiny, train, trainer_of, weights_of
from torch.multiprocessing import ProcessRaisedException

from densenet_dist.errors import CheckpointError, ConfigError, DataError, StorageError
from densenet_dist.inference.exporting import export
from densenet_dist.train.evaluation import evaluate, prepare_evaluation
from densenet_dist.train.inputs import train_and_val

ROOT = Path(__file__).parents[2]
SETTINGS = ["data.name=folder", "data={limit: null, test_limit: null}", "data.image_size=16", "train.eval_batch_size=7"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of 24 pictures."""
    write_photos(tmp_path / "my photos", ("apple", "bär", "cat"), 24)
    return tmp_path / "my photos"


def settings(photos: Path, *more: str) -> list[str]:
    return [*SETTINGS, f"data.root={photos}", *more]


def test_images_larger_than_memory_are_refused_before_anything_is_built(photos, tmp_path, command):
    place = [f"storage={tmp_path}", "cluster.engine=local"]
    code, _, said = command("train", "quickstart", *settings(photos), "data.image_size=1000000", *place)
    assert code == 2
    assert "parameters and 32 images of 1000000x1000000 at a time need" in said
    assert not (tmp_path / "quickstart" / "checkpoints").exists()


def test_the_command_trains_on_a_folder(photos, tmp_path, command):
    small = ["model.variant=densenet", "model.num_layers=[1,1]", "model.growth_rate=4", "data.image_size=32"]
    small += ["train.epochs=4", "train.lr=0.05", "train.global_batch_size=8", "data.loader=torch"]
    place = [f"data.root={photos}", f"storage={tmp_path}", "cluster.engine=local"]
    code, out, err = command("train", ROOT / "configs/folder.yaml", *small, *place)
    assert code == 0, err
    assert "folder, 59 training and 6 validation images\n3 classes: apple, bär, cat\n" in out
    assert "\nonly 6 validation images\nonly 7 test images\n" in out
    summary = json.loads((tmp_path / "folder" / "summary.json").read_text())
    assert summary["test/top1"] > 0.6  # of three classes: color is easy
    assert not any("top5" in key for key in summary)  # below six classes
    assert "top-5" not in (tmp_path / "folder" / "report.html").read_text()
    figures = evaluate(tmp_path / "folder")
    assert figures["top1"] == pytest.approx(summary["test/top1"])
    assert figures["images"] == 7


def test_unused_folders_are_told(photos, command):
    for part in ("train", "test"):
        shutil.copytree(photos, photos.parent / "intel" / part)
    shutil.copytree(photos / "cat", photos.parent / "intel" / "pred")
    code, out, err = command("data", "prepare", "folder", "--root", photos.parent / "intel")
    assert code == 0, err
    assert out.endswith("intel: 3 classes: apple, bär, cat\n  pred: not used (no class folders, or no part)\n")


def test_every_class_keeps_a_training_picture(photos, tmp_path):
    for name, count in (("apple", 1), ("bär", 2)):
        for path in sorted((photos / name).iterdir())[count:]:
            path.unlink()
    config = tiny(tmp_path / "runs", *settings(photos, "seed=0", "train.epochs=1"))
    assert notes_of(config) == [
        "only 22 training images",
        "there are no validation images of 2 of 3 classes: apple, bär",
        "only 2 validation images",
        "there are no test images of 2 of 3 classes: apple, bär",
        "only 3 test images",
    ]
    found = prepare_evaluation(run_of(config), split="train")
    assert np.bincount(found.engine.split.labels[found.indices]).tolist() == [1, 2, 19]


def test_validation_images_may_be_a_folder_of_their_own(photos, tmp_path):
    config = tiny(tmp_path, *settings(photos, "data.val_fraction=0", "train.early_stopping.enabled=true"))
    said = r"val_fraction: there are no validation images, .*train\.early_stopping.*\n.* a folder val"
    with pytest.raises(ConfigError, match=said):
        trainer_of(config)
    for name in ("train", "test", "val"):
        shutil.copytree(photos, tmp_path / "parts" / name)
    assert trainer_of(replace(config, data=replace(config.data, root=str(tmp_path / "parts")))).num_images[1] == 72


def test_with_skip_bad_pictures_are_left_out(photos, tmp_path):
    (photos / "cat" / "empty.jpg").touch()
    notes = notes_of(tiny(tmp_path / "runs", *settings(photos, "data.on_bad_image=skip", "train.epochs=1")))
    assert "left out of data.root: 1\n  cat/empty.jpg: empty file" in notes


def test_a_run_whose_validation_pictures_are_lost_goes_on_once_they_are_back(photos, tmp_path):
    config = tiny(tmp_path / "runs", *settings(photos, "checkpoint.monitor=val/loss"))
    dataset = trainer_of(config).dataset
    path = dataset.train.images.path(train_and_val(config, dataset)[1][0])
    content = path.read_bytes()

    def lose(event: dict[str, Any]) -> None:
        if event["kind"] == "start":
            path.write_bytes(b"")

    with pytest.raises(DataError, match=f"{path.name}: empty file"):
        train(config, listener=lose)
    assert run_of(config).read_records() == []
    path.write_bytes(content)
    starts: list[dict[str, Any]] = []
    assert train(config, listener=starts.append)["best"]["val/loss"] > 0
    start = next(event for event in starts if event["kind"] == "start")
    assert start["global_step"] == start["steps_per_epoch"]  # what was trained was kept
    run_of(config).remove("split.json.gz")
    with pytest.raises(ConfigError, match="no images of this split"):
        evaluate(run_of(config).path, split="val", overrides=("data.val_fraction=0",))


def parts_of(run: Path) -> dict[str, list[str]]:
    """The names of the pictures in each part of a run's split."""
    found = {part: prepare_evaluation(run, split=part, notify=str) for part in ("train", "val", "test")}
    return {part: [each.engine.split.images.names[row] for row in each.indices] for part, each in found.items()}


@pytest.mark.parametrize("with_parts", [False, True], ids=["flat", "train and test"])
def test_pictures_that_come_later_change_neither_evaluation_nor_training(photos, tmp_path, with_parts, command):
    for name in ("apple", "bär", "cat") if with_parts else ():
        (photos / "test" / name).mkdir(parents=True)
        (photos / "train").mkdir(exist_ok=True)
        (photos / name / "00.jpg").rename(photos / "test" / name / "00.jpg")
        (photos / name).rename(photos / "train" / name)
    more = ["train.schedule.name=constant", "data.val_fraction=0.2"]
    short, long = (settings(photos, *more, f"train.epochs={epochs}") for epochs in (1, 2))
    undisturbed = tiny(tmp_path / "undisturbed", *long)
    train(undisturbed)
    config = tiny(tmp_path / "runs", *short)
    train(config)
    run = run_of(config).path
    parts, figures = parts_of(run), evaluate(run)
    assert [len(parts[part]) for part in parts] == ([55, 14, 3] if with_parts else [52, 13, 7])
    for picture in sorted(photos.glob("train/*/0*" if with_parts else "*/0*")):
        shutil.copy(picture, picture.with_name(f"0 new {picture.name}"))  # before all others
    assert parts_of(run) == parts
    with pytest.warns(UserWarning, match=r"left out of data.root: \d\d\n  (train/)?apple/0 new .*split"):
        assert evaluate(run) == figures
    code, out, err = command("evaluate", run, "--json")
    assert (code, json.loads(out)["top1"], "not in the run's split" in err) == (0, figures["top1"], True)
    train(tiny(tmp_path / "runs", *long))
    assert weights_of(config) == weights_of(undisturbed)

    (photos / parts["train"][0]).unlink()  # which cannot be helped, and is said
    notes = notes_of(tiny(tmp_path / "runs", *settings(photos, *more, "train.epochs=3")))
    assert "will differ too" in "".join(notes)
    if not with_parts:
        for name in parts["test"]:
            (photos / name).unlink()
        with pytest.raises(DataError, match="has none of the run's test images any more"):
            evaluate(run)
    for damaged in (gzip.compress(b"[]"), (run / "split.json.gz").read_bytes()[:-20]):
        (run / "split.json.gz").write_bytes(damaged)
        with pytest.raises(StorageError, match=r"split\.json\.gz is damaged"):
            evaluate(run)


def test_weights_meet_only_the_classes_they_were_trained_on(photos, tmp_path, command):
    config = tiny(tmp_path / "runs", *settings(photos, "train.epochs=1"))
    train(config)
    run, figures = run_of(config).path, evaluate(run_of(config).path)
    (run / "test_results.json").unlink()
    classes = (run / "classes.json").read_text()
    (photos / "cat").rename(photos / "Cat")  # comes before apple now
    both = r"(?s)\['apple', 'bär', 'cat'\].*\['Cat', 'apple', 'bär'\]"
    go_on = tiny(tmp_path / "runs", *settings(photos, "train.epochs=2"))
    for meet in (evaluate, export, lambda run: train(go_on)):
        with pytest.raises(CheckpointError, match=both):
            meet(run)
    assert command("report", run)[0] == 0
    assert (run / "classes.json").read_text() == classes
    # Handed over to another run, which knows the new names.
    other = replace(go_on, name="other")
    shutil.copytree(run, run_of(other).path)
    names = {"names": ["Cat", "apple", "bär"]}
    run_of(other).write("classes.json", json.dumps(json.loads(classes) | names))
    for meet in (evaluate, lambda run: train(other)):
        with pytest.raises(CheckpointError, match=both):
            meet(run_of(other).path)
    (photos / "Cat").rename(photos / "cat")
    (run / "split.json.gz").unlink()
    assert evaluate(run) == figures  # the same split is drawn again
    shutil.copy(photos / "cat" / "00.jpg", photos / "cat" / "new.jpg")
    with pytest.warns(UserWarning, match="the images differ from those at the start of the run"):
        evaluate(run)


def other_files(storage: str, photos: str) -> None:
    # Each rank looks into a folder of its own, which only the first one's holds all the pictures of.
    trainer_of(tiny(storage, *SETTINGS, f"data.root={photos}/{dist.get_rank()}"))


def test_ranks_that_see_other_files_are_told_apart(photos, tmp_path):
    for rank in range(2):
        shutil.copytree(photos, tmp_path / "nodes" / str(rank))
    (tmp_path / "nodes" / "1" / "cat" / "03.jpg").unlink()
    with pytest.raises(ProcessRaisedException, match="the nodes do not see the same images"):
        run_ranks(other_files, 2, str(tmp_path / "runs"), str(tmp_path / "nodes"))

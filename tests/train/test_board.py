"""TensorBoard: pictures, curves of precision and recall, graph and table; in a browser: test_tensorboard_browser.py."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import next_second, run_of, tiny, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator

from densenet_dist.schema import ModelConfig
from densenet_dist.train.board import Board
from densenet_dist.train.board_graph import model_graph
from densenet_dist.train.logs import best_scalars
from densenet_dist.train.network import build_model
from densenet_dist.train.results import Mistake, ResultsAccumulator, read_test_results

METRICS = {"loss": 1.0, "top1": 0.5, "top5": 1.0, "images": 300.0}


def board_of(config, reader=EventAccumulator):
    """What TensorBoard reads; with the other reader, what it reads without its data server (on an object store)."""
    guidance = {"images": 0, "scalars": 0, "tensors": 0} if reader is EventAccumulator else None
    board = reader(str(run_of(config).path / "tb"), size_guidance=guidance)
    board.Reload()
    return board


def curve_of(board, tag):
    """(6, thresholds): true and false positives, true and false negatives, precision, recall."""
    (event,) = board.Tensors(tag)
    return np.array(event.tensor_proto.float_val).reshape(6, -1)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory):
    """A finished run's configuration."""
    config = tiny(tmp_path_factory.mktemp("board"), "train.epochs=2")
    train(config)
    return config


def test_a_run_shows_settings_and_graph_and_ends_with_its_test_results(done):
    board, results = board_of(done), read_test_results(run_of(done))
    assert b"global_batch_size: 16" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert b"val/loss" in board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert board.Graph().node
    for name in ("loss", "top1", "top5"):
        (event,) = board.Scalars(f"test/{name}")
        assert event.value == np.float32(getattr(results, name))
    images = {tag: board.Images(tag) for tag in board.Tags()["images"]}
    assert {tag: [event.step for event in events] for tag, events in images.items()} == {
        "train/augmented": [0],
        "test/confusion": [10],
        "test/worst_mistakes": [10],
    }
    sheet = np.asarray(Image.open(io.BytesIO(images["test/worst_mistakes"][0].encoded_image_string)).convert("RGB"))
    colours = {tuple(pixel) for pixel in np.asarray(Image.open(io.BytesIO(results.mistakes[0].png))).reshape(-1, 3)}
    assert len(colours & {tuple(pixel) for pixel in sheet.reshape(-1, 3)}) > len(colours) / 2
    curves = {tag.removeprefix("test_pr/") for tag in board.Tags()["tensors"] if tag.startswith("test_pr/")}
    shown = [label for label, row in enumerate(results.confusion) if row.sum()]
    assert curves == {results.class_names[label] for label in shown}
    right, false, *_ = curve_of(board, f"test_pr/{results.class_names[shown[0]]}")
    assert right[0] == results.confusion[shown[0]].sum()
    assert right[0] + false[0] == results.images


def test_many_classes_have_the_averages_of_their_curves_and_names_may_hold_anything(tmp_path):
    labels = torch.arange(300) % 12
    logits = torch.randn(300, 12, generator=torch.Generator().manual_seed(3))
    accumulator = ResultsAccumulator(12)
    accumulator.update(logits[labels != 5], labels[labels != 5], np.arange(300)[labels != 5])
    names = ("a $x_1$ 猫 \n<b>" * 4, "/../é", *(f"class {label}" for label in range(10)))
    png = io.BytesIO()
    Image.new("RGB", (40, 40)).save(png, "PNG")
    results = accumulator.compute(METRICS, names, torch.device("cpu"))
    board = Board(tmp_path / "tiny" / "tb")
    board.test_results(replace(results, mistakes=(Mistake(3, 0, 1, 0.9, 0.1, png.getvalue()),)), 7)
    board.close()
    shown = board_of(tiny(tmp_path))
    assert set(shown.Tags()["images"]) == {"test/confusion", "test/worst_mistakes"}
    micro, macro = (curve_of(shown, f"test_pr/{name}_average") for name in ("micro", "macro"))
    assert (micro[5, 0], macro[5, 0]) == (1, 1)  # all are found where all is claimed
    assert micro[4, 0] == pytest.approx(1 / 12)
    assert macro[4, 0] == pytest.approx(1 / 11)  # a class without images has no curve


def test_the_best_epoch_so_far_is_kept():
    records = [{"epoch": 1, "train/loss": 3.0}]
    assert best_scalars(records, "val/loss") == {}
    records += [{"epoch": e, "val/loss": loss, "val/top1": e / 10} for e, loss in ((2, 2.0), (3, 2.5), (4, 2.0))]
    assert best_scalars(records, "val/loss") == {"best/epoch": 2, "best/val_loss": 2.0, "best/val_top1": 0.2}
    assert best_scalars(records, "val/top1")["best/epoch"] == 4
    records.append({"epoch": 4, "test/loss": 1.0, "test/top1": 0.6, "test/top5": 1.0})
    assert best_scalars(records, "val/loss") == {"best/test_loss": 1.0, "best/test_top1": 0.6}


@pytest.mark.parametrize(("variant", "side"), [("notebook", 32), ("densenet_bc", 32), ("densenet121", 64)])
def test_the_graph_has_every_layer_and_draws_no_random_number(variant, side):
    config = ModelConfig(variant=variant, drop_rate=0.2)
    before = torch.get_rng_state()
    graph = model_graph(config, 7, side)
    assert torch.equal(before, torch.get_rng_state())
    nodes = {node.name: node for node in graph.node}
    assert len(nodes) == len(graph.node)
    assert {name for node in graph.node for name in node.input} <= set(nodes)
    assert [dim.size for dim in nodes["logits"].attr["_output_shapes"].list.shape[0].dim] == [-1, 7]
    with torch.device("meta"):
        model = build_model(replace(config, block="reference"), 7, side)
    leaves = {name.replace(".", "/") for name, module in model.named_modules() if not list(module.children())}
    assert leaves <= set(nodes)


def test_a_run_that_starts_again_shows_everything_once(tmp_path):
    config = tiny(tmp_path, "train.epochs=2", "checkpoint.every_steps=7")

    def stop(event):
        if event["kind"] == "epoch":
            raise KeyboardInterrupt

    for loses in (True, False):
        with pytest.raises(KeyboardInterrupt):
            train(config, listener=stop)
        if loses:  # with the machine: it starts from nothing
            shutil.rmtree(run_of(config).path / "checkpoints")
        next_second()
    train(config)
    board = board_of(config)
    assert len(list((run_of(config).path / "tb").iterdir())) == 2  # nothing of the first one
    assert [event.step for event in board.Images("train/augmented")] == [0]
    assert [event.step for event in board.Images("test/confusion")] == [10]
    assert [event.step for event in board.Scalars("val/loss")] == [5, 10]
    assert [event.step for event in board.Scalars("best/val_top1")] == [5, 10]
    assert len(board.Tensors("config/text_summary")) == 1


def test_a_test_that_was_cut_off_is_shown_once(done, tmp_path):
    config = replace(done, storage=str(tmp_path))
    shutil.copytree(run_of(done).path, run_of(config).path)
    (run_of(config).path / "summary.json").unlink()  # lost with the machine, when all else was written
    next_second()
    train(config)
    assert len(list((run_of(config).path / "tb").iterdir())) == 2
    # The other reader has everything as tensors.
    readers = {"Scalars": EventAccumulator, "Images": EventAccumulator, "Tensors": PluginEventAccumulator}
    for kind, reader in readers.items():
        boards = board_of(done, reader), board_of(config, reader)
        once, twice = (board.Tags()[kind.lower()] for board in boards)
        assert twice == once
        for tag in once:
            steps = [[event.step for event in getattr(board, kind)(tag)] for board in boards]
            assert steps[0] == steps[1], tag


@pytest.mark.parametrize(
    ("function", "note"),
    [
        ("results._png", "the images of the worst mistakes could not be read: no font"),
        ("board.printed_confusion", "TensorBoard's view of the test could not be made: OSError: no font"),
    ],
)
def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(tmp_path, monkeypatch, function, note):
    def fail(*arguments):
        raise OSError("no font")

    monkeypatch.setattr(f"densenet_dist.train.{function}", fail)
    notes = []
    config = tiny(tmp_path, "train.epochs=1")
    summary = train(config, listener=lambda event: event["kind"] == "note" and notes.append(event["text"]))
    assert summary["status"] == "finished"
    assert note in notes
    assert read_test_results(run_of(config)).top1 == summary["test/top1"]

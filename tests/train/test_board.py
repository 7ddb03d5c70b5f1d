"""TensorBoard: pictures, curves of precision and recall, graph and table; in a browser: test_tensorboard_browser.py."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from PIL import Image
from runs import next_second, run_of, tiny, train
from sklearn.metrics import precision_score, recall_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator
from tensorboard.compat.proto.graph_pb2 import GraphDef

from densenet_dist.report.judged import confusion_matrix, judge
from densenet_dist.schema import ModelConfig
from densenet_dist.train.board import Results
from densenet_dist.train.board_graph import model_graph
from densenet_dist.train.judging import MOST_MISTAKES, THRESHOLDS, Tally
from densenet_dist.train.network import build_model

VARIANTS = {"notebook": 32, "densenet": 32, "densenet_bc": 32, "densenet121": 64, "densenet161": 64}


def board_of(config) -> EventAccumulator:
    board = EventAccumulator(str(run_of(config).path / "tb"), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    board.Reload()
    return board


def page_of(config) -> PluginEventAccumulator:
    """As TensorBoard's page reads it where it runs without its data server: on an object store, say."""
    page = PluginEventAccumulator(str(run_of(config).path / "tb"))
    page.Reload()
    return page


def curve_of(board: EventAccumulator, tag: str) -> np.ndarray:
    """(6, thresholds): true and false positives, true and false negatives, precision, recall."""
    (event,) = board.Tensors(tag)
    return np.array(event.tensor_proto.float_val).reshape(6, -1)


# What is counted


def case(count: int = 300, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    labels = torch.randint(classes, (count,), generator=draw)
    logits = torch.randn(count, classes, generator=draw) * 2
    logits[torch.arange(count), labels] += 1.5
    return logits, labels


def tally_of(logits: torch.Tensor, labels: torch.Tensor, places: np.ndarray, size: int = 64) -> Tally:
    tally = Tally(logits.shape[1])
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        tally.add(logits[part], labels[part], places[part])
    return tally


def test_curves_are_those_of_scikit_learn():
    logits, labels = case()
    curves = tally_of(logits, labels, np.arange(300)).curves()
    scores = logits.double().softmax(1).numpy()
    for label in range(4):
        true = (labels == label).numpy()
        for index in (0, 1, 30, 63, 100):
            claimed = scores[:, label] >= index / (THRESHOLDS - 1)
            right, false, rejected, missed = curves[label, :, index]
            assert right + false + rejected + missed == 300
            assert right / (right + missed) == pytest.approx(recall_score(true, claimed))
            assert right / (right + false) == pytest.approx(precision_score(true, claimed))


def test_mistakes_are_the_surest_ones_and_the_matrix_is_the_reports():
    logits, labels = case()
    places = np.arange(300) + 1000
    tally = tally_of(logits, labels, places)
    confidence, predicted = (values.numpy() for values in logits.double().softmax(1).max(1))
    np.testing.assert_array_equal(tally.confusion, confusion_matrix(labels.numpy(), predicted, 4))
    wrong = [row for row in np.argsort(-confidence) if predicted[row] != labels[row]][:MOST_MISTAKES]
    assert [found.place for found in tally.mistakes] == [1000 + row for row in wrong]
    assert [(found.label, found.predicted) for found in tally.mistakes] == [
        (labels[row].item(), predicted[row]) for row in wrong
    ]
    assert [found.confidence for found in tally.mistakes] == pytest.approx(confidence[wrong])


def share_of_a_rank() -> tuple[torch.Tensor, torch.Tensor, list]:
    logits, labels = case()
    part = slice(dist.get_rank(), None, dist.get_world_size())
    tally = tally_of(logits[part], labels[part], np.arange(300)[part])
    tally.reduce(torch.device("cpu"))
    return tally.confusion, tally.scores, tally.mistakes


def test_ranks_together_count_what_one_counts():
    whole = tally_of(*case(), np.arange(300))
    for confusion, scores, mistakes in run_ranks(share_of_a_rank, 2):
        torch.testing.assert_close(confusion, whole.confusion)
        torch.testing.assert_close(scores, whole.scores)
        assert mistakes == whole.mistakes


def test_the_best_epoch_so_far_is_kept():
    results = Results("val/loss")
    assert results.add({"epoch": 1, "train/loss": 3.0}) == {}
    first = {"epoch": 1, "val/loss": 2.0, "val/top1": 0.5}
    assert results.add(first) == {"best/epoch": 1, "best/val_loss": 2.0, "best/val_top1": 0.5}
    assert results.add({"epoch": 2, "val/loss": 2.5, "val/top1": 0.9})["best/epoch"] == 1
    assert results.add({"epoch": 3, "val/loss": 1.5, "val/top1": 0.4})["best/val_top1"] == 0.4
    assert results.add({"epoch": 3, "test/loss": 1.0, "test/top1": 0.6, "test/top5": 1.0}) == {
        "best/test_loss": 1.0,
        "best/test_top1": 0.6,
    }


# The graph


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_graph_has_every_layer_and_draws_no_random_number(variant):
    config, side = ModelConfig(variant=variant, drop_rate=0.2), VARIANTS[variant]
    before = torch.get_rng_state()
    graph = model_graph(config, 7, side)
    assert torch.equal(before, torch.get_rng_state())
    nodes = {node.name: node for node in graph.node}
    assert len(nodes) == len(graph.node)
    assert {name for node in graph.node for name in node.input} <= set(nodes)
    assert [dim.size for dim in nodes["logits"].attr["_output_shapes"].list.shape[0].dim] == [-1, 7]
    with torch.device("meta"):
        model = build_model(ModelConfig(variant=variant, drop_rate=0.2, block="reference"), 7, side)
    leaves = {name.replace(".", "/") for name, module in model.named_modules() if not list(module.children())}
    assert leaves <= set(nodes)


# A whole run


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory):
    """A finished run's configuration."""
    config = tiny(tmp_path_factory.mktemp("board"), "train.epochs=2")
    train(config)
    return config


def test_a_run_ends_with_pictures_of_its_test(done):
    board = board_of(done)
    judged = judge(run_of(done))
    images = {tag: board.Images(tag) for tag in board.Tags()["images"]}
    assert {tag: [event.step for event in events] for tag, events in images.items()} == {
        "train/augmented": [0],
        "test/confusion": [10],
        "test/worst_mistakes": [10],
    }
    sheet = np.asarray(Image.open(io.BytesIO(images["test/worst_mistakes"][0].encoded_image_string)))
    # The first picture is the surest mistake of the report, 32 pixels made 128, below its two lines.
    first = np.asarray(Image.open(io.BytesIO(judged.mistakes[0].picture)))
    np.testing.assert_array_equal(sheet[46:174:4, 16:144:4], first)
    assert (sheet[:46] == 255).all(2).mean() < 0.99  # something is written there
    curves = {tag for tag in board.Tags()["tensors"] if tag.startswith("test_pr/")}
    assert curves == {
        f"test_pr/{name}" for name, row in zip(judged.class_names, judged.confusion, strict=True) if row.sum()
    }
    label = judged.class_names.index(sorted(curves)[0].removeprefix("test_pr/"))
    right, false, *_ = curve_of(board, sorted(curves)[0])
    assert right[0] == judged.confusion[label].sum()
    assert right[0] + false[0] == judged.confusion.sum()


def test_many_classes_have_their_averages(tmp_path):
    from densenet_dist.train.board import Board

    logits, labels = case(classes=12)
    tally = tally_of(logits[labels != 5], labels[labels != 5], np.arange(300))
    board = Board(tmp_path / "tiny" / "tb")
    board.judged(tally, [f"class {label}" for label in range(12)], {}, 7)
    board.close()
    shown = board_of(tiny(tmp_path))
    assert shown.Tags()["images"] == ["test/confusion"]
    micro, macro = (curve_of(shown, f"test_pr/{name}_average") for name in ("micro", "macro"))
    assert (micro[5, 0], macro[5, 0]) == (1, 1)  # all are found where all is claimed
    assert micro[4, 0] == pytest.approx(1 / 12)
    assert macro[4, 0] == pytest.approx(1 / 11)  # a class without images has no curve


def test_settings_graph_and_layout_are_there_from_the_start(done):
    board = board_of(done)
    assert b"global_batch_size: 16" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert b"val/loss" in board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert isinstance(board.Graph(), GraphDef)


def test_a_run_that_starts_again_shows_everything_once(tmp_path):
    config = tiny(tmp_path, "train.epochs=2", "checkpoint.every_steps=7")

    def stop_at(step):
        def heard(event):
            if event["kind"] == "epoch" and event["global_step"] >= step:
                raise KeyboardInterrupt

        return heard

    with pytest.raises(KeyboardInterrupt):
        train(config, listener=stop_at(5))
    for path in (run_of(config).path / "checkpoints").iterdir():  # lost with the machine: it starts from nothing
        path.unlink() if path.is_file() else [file.unlink() for file in path.iterdir()]
    next_second()
    with pytest.raises(KeyboardInterrupt):
        train(config, listener=stop_at(5))
    next_second()
    train(config)
    board = board_of(config)
    assert len(list((run_of(config).path / "tb").iterdir())) == 2  # nothing of the first one
    assert [event.step for event in board.Images("train/augmented")] == [0]
    assert [event.step for event in board.Images("test/confusion")] == [10]
    assert [event.step for event in board.Scalars("val/loss")] == [5, 10]
    assert [event.step for event in board.Scalars("best/val_top1")] == [5, 10]
    assert len(board.Tensors("config/text_summary")) == 1
    assert isinstance(board.Graph(), GraphDef)


def test_a_test_that_was_cut_off_is_shown_once(done, tmp_path):
    config = replace(done, storage=str(tmp_path))
    shutil.copytree(run_of(done).path, run_of(config).path)
    (run_of(config).path / "summary.json").unlink()  # lost with the machine, when all else was written
    next_second()
    train(config)
    assert len(list((run_of(config).path / "tb").iterdir())) == 2
    once, twice = board_of(done), board_of(config)
    assert twice.Tags() == once.Tags()
    for tag in once.Tags()["scalars"]:
        assert [event.step for event in twice.Scalars(tag)] == [event.step for event in once.Scalars(tag)], tag
    for tag in once.Tags()["images"]:
        assert [event.step for event in twice.Images(tag)] == [event.step for event in once.Images(tag)], tag
    once, twice = page_of(done), page_of(config)
    tags = once.Tags()["tensors"]  # everything, on that page
    assert twice.Tags()["tensors"] == tags
    assert sum(tag.startswith("test_pr/") for tag in tags) == 10
    for tag in tags:
        assert [event.step for event in twice.Tensors(tag)] == [event.step for event in once.Tensors(tag)], tag


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(tmp_path, monkeypatch):
    config = tiny(tmp_path, "train.epochs=1")

    def fail(*arguments):
        raise OSError("no font")

    monkeypatch.setattr("densenet_dist.train.board._draw_mistakes", fail)
    notes = []
    summary = train(config, listener=lambda event: event["kind"] == "note" and notes.append(event["text"]))
    assert summary["status"] == "finished"
    assert any("TensorBoard's view of the test could not be made" in note for note in notes)
    assert "test/confusion" in board_of(config).Tags()["images"]


def test_a_class_name_may_hold_anything(tmp_path):
    from densenet_dist.train.board import Board
    from densenet_dist.train.judging import Mistake

    tally = tally_of(*case(classes=2), np.arange(300))
    tally.mistakes = [Mistake(0.9, 3, 0, 1)]
    board = Board(tmp_path / "tiny" / "tb")
    board.judged(tally, ["a $x_1$ 猫 \n<b>" * 4, "/../é"], {3: torch.zeros(40, 40, 3, dtype=torch.uint8)}, 1)
    board.close()
    assert set(board_of(tiny(tmp_path)).Tags()["images"]) == {"test/confusion", "test/worst_mistakes"}

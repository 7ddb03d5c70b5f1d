"""What the best checkpoint says of the test images."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from densenet_dist.config import load_config
from densenet_dist.data.datasets import load_dataset
from densenet_dist.errors import CheckpointError, DataError
from densenet_dist.report.judged import BINS, calibrate, confusion_matrix, judge, judge_within
from densenet_dist.train.evaluation import evaluate, pictures_at, predict, prepare_evaluation


def test_calibration_by_hand():
    confidence = np.array([0.5, 0.5, 0.9, 1.0, 0.61])
    correct = np.array([True, False, True, True, False])
    found = calibrate(confidence, correct, bins=5)
    # (0.4, 0.6]: two images, accuracy 0.5, confidence 0.5; (0.6, 0.8]: one, 0 and 0.61; (0.8, 1]: two, 1 and 0.95.
    assert found.images.tolist() == [0, 0, 2, 1, 2]
    assert found.accuracy.tolist() == [0, 0, 0.5, 0, 1]
    assert found.confidence == pytest.approx([0, 0, 0.5, 0.61, 0.95])
    assert found.ece == pytest.approx((2 * 0 + 1 * 0.61 + 2 * 0.05) / 5)


def test_a_confidence_on_an_edge_is_in_the_bin_below():
    edges = np.arange(1, BINS + 1) / BINS
    assert calibrate(edges, np.ones(BINS, dtype=bool)).images.tolist() == [1] * BINS


def test_sure_and_right_is_calibrated():
    assert calibrate(np.ones(7), np.ones(7, dtype=bool)).ece == 0
    assert calibrate(np.ones(7), np.zeros(7, dtype=bool)).ece == 1


def test_confusion_by_hand():
    found = confusion_matrix(np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 0, 0]), 3)
    assert found.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 0]]


def test_one_pass_says_what_evaluate_says(finished):
    judged, figures = judge(finished), evaluate(finished)
    assert judged.figures == figures
    assert judged.confusion.sum() == figures["images"] == 75
    assert np.trace(judged.confusion) / 75 == pytest.approx(figures["top1"])
    labels = load_dataset("shapes", "", limit=75).test.labels
    assert judged.confusion.sum(1).tolist() == np.bincount(labels, minlength=10).tolist()
    assert np.nanmean(judged.class_accuracy) > 0
    assert judged.calibration.images.sum() == 75


def test_mistakes_are_the_surest_and_shown_as_they_are(finished):
    judged = judge(finished)
    test = load_dataset("shapes", "", limit=75).test
    sure = [mistake.confidence for mistake in judged.mistakes]
    assert len(sure) == 24
    assert sure == sorted(sure, reverse=True)
    evaluation = prepare_evaluation(finished)
    predictions = predict(evaluation)
    probabilities = predictions.logits.double().softmax(1)
    wrong = probabilities.argmax(1) != predictions.labels
    assert sure[0] == pytest.approx(float(probabilities.amax(1)[wrong].max()))
    for mistake in judged.mistakes:
        assert mistake.label == test.labels[mistake.place] != mistake.predicted
        pixels = np.asarray(Image.open(io.BytesIO(mistake.picture)))
        assert np.array_equal(pixels, test.images[mistake.place])


def test_places_of_pictures_that_can_no_longer_be_read(tmp_path):
    rng = np.random.default_rng(0)
    for kind, level in (("dark", 20), ("bright", 220)):
        for part, count in (("train", 4), ("test", 5)):
            (tmp_path / "set" / part / kind).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((16, 16, 3), level + i, dtype=np.uint8) + rng.integers(0, 2, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / part / kind / f"{i}.png")
    from runs import tiny, train

    settings = ("data.name=folder", f"data.root={tmp_path / 'set'}", "data.image_size=16", "data.limit=null")
    more = ("data.on_bad_image=skip", "train.global_batch_size=4", "train.eval_batch_size=2", "train.epochs=1")
    config = tiny(tmp_path, *settings, *more, "data.val_fraction=0.25", "data.augment=none")
    train(config)
    evaluation = prepare_evaluation(tmp_path / "tiny")
    files = evaluation.split.images
    for place in (0, 1, 4):  # a whole batch, and one of two
        files.path(place).write_bytes(b"")
    predictions = predict(evaluation)
    assert predictions.indices.tolist() == [2, 3, 5, 6, 7, 8, 9]
    assert predictions.labels.tolist() == evaluation.split.labels[predictions.indices].tolist()
    shown = pictures_at(evaluation, np.array([3, 0, 9]))
    assert sorted(shown) == [3, 9]
    assert np.array_equal(shown[9].numpy(), np.asarray(Image.open(files.path(9))))


def test_a_pass_that_would_take_too_long_is_given_up(finished):
    assert judge_within(finished, (), limit_s=0.0) is None
    assert judge_within(finished, (), limit_s=1e9).figures["images"] == 75


def test_missing_data_says_how_to_go_on_without(run, tmp_path):
    config = load_config(run / "config.yaml")
    assert config.data.name == "shapes"
    changes = ("data.name=cifar10", f"data.root={tmp_path / 'nowhere'}", "data.download=false")
    with pytest.raises(DataError, match="--no-judge"):
        judge(run, changes)


def test_no_checkpoint(run):
    (run / "checkpoints" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        judge(run)

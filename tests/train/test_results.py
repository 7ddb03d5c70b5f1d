"""Results on the test set: against NumPy, over ranks, of bounded size, and read back from the run's folder."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from PIL import Image
from runs import context_of, run_of, tiny, train
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score

from densenet_dist.errors import StorageError
from densenet_dist.run_folder import RunFolder
from densenet_dist.train import results as module
from densenet_dist.train.evaluation import evaluate, evaluate_test_set, prepare_evaluation
from densenet_dist.train.results import BINS, Metrics, read_test_results


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    config = tiny(tmp_path_factory.mktemp("results"), "train.epochs=1")
    train(config)
    return run_of(config).path


def evaluated(run: Path) -> module.TestResults:
    found = prepare_evaluation(run)
    return evaluate_test_set(replace(found, context=context_of(found.config)))


def test_results_are_those_that_numpy_computes(run):
    found = prepare_evaluation(run)
    labels = found.dataset.test.labels
    with torch.no_grad():
        logits = torch.cat([found.model.eval()(batch.images) for batch in found.loader()]).double().numpy()
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    correct = predicted == labels

    results = evaluated(run)
    assert results.images == len(labels) == 75
    assert results.top1 == correct.mean()
    assert results.top5 == (np.argsort(-logits, 1)[:, :5] == labels[:, None]).any(1).mean()
    assert results.loss == pytest.approx(-np.log(probabilities[np.arange(75), labels]).mean(), rel=1e-6)
    confusion = np.zeros((10, 10), dtype=int)
    np.add.at(confusion, (labels, predicted), 1)
    np.testing.assert_array_equal(results.confusion, confusion)
    recalls = recall_score(labels, predicted, average=None, zero_division=0)
    scores = {"balanced_accuracy": balanced_accuracy_score(labels, predicted), "worst_class_accuracy": recalls.min()}
    scores["macro_f1"] = f1_score(labels, predicted, average="macro")
    for found_scores in (results.metrics, evaluate(run)):
        assert {name: found_scores[name] for name in scores} == pytest.approx(scores)
    bins = np.ceil(confidence * BINS).astype(int) - 1
    gaps = [abs(correct[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).sum() for b in set(bins)]
    assert results.calibration.images.tolist() == np.bincount(bins, minlength=BINS).tolist()
    assert results.calibration.ece == pytest.approx(sum(gaps) / 75, rel=1e-6)

    wrong = [index for index in np.argsort(-confidence, kind="stable") if not correct[index]][:24]
    assert [mistake.index for mistake in results.mistakes] == wrong
    for mistake in results.mistakes:
        index = mistake.index
        assert (mistake.label, mistake.predicted) == (labels[index], predicted[index])
        assert mistake.confidence == pytest.approx(confidence[index])
        assert mistake.label_probability == pytest.approx(probabilities[index, labels[index]])
        pixels = np.asarray(Image.open(io.BytesIO(mistake.png)))
        np.testing.assert_array_equal(pixels, found.dataset.test.images[index])


def test_without_memory_for_heat_maps_there_are_images_and_without_images_there_are_no_pairs(run, monkeypatch):
    expected = evaluated(run).mistakes

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(module, "grad_cam", full)
    assert evaluated(run).mistakes == tuple(replace(mistake, heat=None) for mistake in expected)
    empty = module.ResultsAccumulator().compute(dict.fromkeys(("loss", "top1", "images"), 0.0), (), torch.device("cpu"))
    assert empty.pairs.shape == (0, 3)


def test_a_hit_on_a_mixed_image_counts_as_much_as_its_label():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 10, generator=generator), torch.randint(10, (50,), generator=generator)

    def metrics_of(targets: torch.Tensor) -> dict[str, float]:
        metrics = Metrics(torch.device("cpu"), 10)
        metrics.update(F.cross_entropy(logits, targets, reduction="sum"), logits, targets)
        return metrics.compute()

    one, other = metrics_of(labels), metrics_of(labels.roll(1))
    mixed = metrics_of(0.7 * F.one_hot(labels, 10).float() + 0.3 * F.one_hot(labels.roll(1), 10).float())
    assert mixed == pytest.approx({name: 0.7 * one[name] + 0.3 * other[name] for name in one}, rel=1e-5)


def test_two_ranks_together_have_the_results_of_one(run):
    whole, (first, second) = evaluated(run), run_ranks(evaluated, 2, run)
    for part in (first, second):
        assert (part.top1, part.top5, part.images) == (whole.top1, whole.top5, whole.images)
        assert part.loss == pytest.approx(whole.loss, rel=1e-6)
        np.testing.assert_array_equal(part.confusion, whole.confusion)
        np.testing.assert_array_equal(part.calibration.images, whole.calibration.images)
        assert [m.index for m in part.mistakes] == [m.index for m in whole.mistakes]
    assert [m.png for m in first.mistakes] == [m.png for m in whole.mistakes]
    assert first.loss == second.loss


def test_what_is_stored_is_what_was_computed_and_a_damaged_file_is_named(run, tmp_path):
    results, stored = evaluated(run), read_test_results(RunFolder(str(run.parent), run.name))
    summary = json.loads((run / "summary.json").read_text())
    assert (stored.loss, stored.top1, stored.top5) == tuple(summary[f"test/{key}"] for key in ("loss", "top1", "top5"))
    assert stored.mistakes == results.mistakes
    np.testing.assert_array_equal(stored.confusion, results.confusion)
    np.testing.assert_array_equal(stored.calibration.confidence, results.calibration.confidence)
    text, folder = (run / "test_results.json").read_text(), RunFolder(str(tmp_path), "run")
    assert summary["test/images"] == stored.pairs[:, 2].sum() == 75
    changes = [{"pairs": [[1]]}, {"class_names": 3}, {"top1": "?"}, {"mistakes": [{"index": 0, "label": 99}]}]
    changes += [{"pairs": [[0, 10, 1]]}, {"pairs": [[0, 1]]}, {"pairs": [[0, 1, -1]]}]
    for damaged in [text[:-9], *(json.dumps(json.loads(text) | change) for change in changes)]:
        folder.write("test_results.json", damaged)
        with pytest.raises(StorageError, match=r"test_results.json is damaged: .*\n  delete it"):
            read_test_results(folder)

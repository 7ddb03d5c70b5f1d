"""What a run leaves to read: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import io
import re
import shutil
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from runs import notes_of, records, run_of, stop_after, tiny, train, trainer_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

from densenet_dist import load_run
from densenet_dist.train.logs import TensorBoardWriter
from densenet_dist.train.results import Mistake, ResultsAccumulator, read_test_results

METRICS = ("loss", "top1", "top5", "balanced_accuracy", "worst_class_accuracy", "macro_f1")
TAGS = {
    *("train/loss", "train/top1", "train/top5", *(f"{split}/{name}" for split in ("val", "test") for name in METRICS)),
    *("lr", "perf/images_per_s", "perf/data_wait", "perf/device_hours", "goodput/ratio", "perf/tflops"),
    *("perf/memory_gib", "perf/step_ms_p50", "perf/step_ms_p95", "perf/step_ms_max"),
    *(f"goodput/lost_to_{loss}" for loss in ("start", "wait", "validate", "save", "recovery", "test")),
}
BEST = {f"best/{name}" for name in ("epoch", "val_loss", "val_top1", "test_loss", "test_top1")}


def board_of(config):
    board = EventAccumulator(str(run_of(config).path / "tb"), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    board.Reload()
    return board


def picture(event):
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory):
    """A finished run's configuration."""
    settings = ("train.epochs=2", "data.augment=notebook", "train.optimizer.betas=[0.5, 0.75]")
    config = tiny(tmp_path_factory.mktemp("board"), *settings)
    train(config)
    return config


def test_every_figure_is_in_one_tensorboard_run(done):
    run, board = run_of(done), board_of(done)
    assert set(board.Tags()["scalars"]) == TAGS | BEST
    lines = run.read_records()
    assert len(lines) == 3
    for tag in TAGS:
        events = [(event.step, event.value) for event in board.Scalars(tag)]
        wanted = [(line["global_step"], line[tag]) for line in lines if tag in line]
        assert events == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]
        assert [step for step, _ in wanted] == ([10] if tag.startswith("test") else [5, 10])
    # All in one folder: another one would be another run on the board.
    assert all(path.is_file() for path in (run.path / "tb").iterdir())


def test_a_run_shows_settings_and_ends_with_its_test_results(done):
    board, results = board_of(done), read_test_results(run_of(done))
    assert b"global_batch_size: 16" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert b"val/loss" in board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    images = {tag: board.Images(tag) for tag in board.Tags()["images"]}
    assert {tag: [event.step for event in events] for tag, events in images.items()} == {
        "train/augmented": [0],
        "test/confusion": [10],
        "test/worst_mistakes": [10],
    }
    colors = {tuple(pixel) for pixel in np.asarray(Image.open(io.BytesIO(results.mistakes[0].png))).reshape(-1, 3)}
    sheet = {tuple(pixel) for pixel in picture(images["test/worst_mistakes"][0]).reshape(-1, 3)}
    assert len(colors & sheet) > len(colors) / 2

    sheet = picture(images["train/augmented"][0])
    assert sheet.shape == (2 * 32, 8 * 32, 3)  # 16 images in rows of 8
    trainer = trainer_of(done)
    first = next(iter(trainer.train_loader.epoch(0))).images[9]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (trainer.dataset.mean, trainer.dataset.std))
    pixels = (first * std + mean).clamp(0, 1).permute(1, 2, 0).numpy() * 255
    np.testing.assert_allclose(sheet[32:, 32:64], pixels, atol=1)


def test_the_settings_are_beside_the_results(done):
    content = board_of(done).summary_metadata
    data = {tag: meta.plugin_data for tag, meta in content.items() if meta.plugin_data.plugin_name == "hparams"}
    parsed = {tag: plugin_data_pb2.HParamsPluginData.FromString(plugin.content) for tag, plugin in data.items()}
    settings = parsed["_hparams_/session_start_info"].session_start_info.hparams
    assert settings["train.lr"].number_value == 0.05
    assert settings["model.variant"].string_value == "densenet_bc"
    assert settings["train.optimizer.betas"].string_value == "[0.5, 0.75]"
    assert "train.ema_decay" not in settings  # null
    assert "_hparams_/experiment" not in parsed
    assert parsed["_hparams_/session_end_info"].session_end_info.status == api_pb2.STATUS_SUCCESS


def test_class_names_may_contain_anything(tmp_path):
    labels = torch.arange(300) % 12
    logits = torch.randn(300, 12, generator=torch.Generator().manual_seed(3))
    accumulator = ResultsAccumulator()
    accumulator.update(logits[labels != 5], labels[labels != 5], np.arange(300)[labels != 5])
    names = ("a $x_1$ 猫 \n<b>" * 4, "/../é", *(f"class {label}" for label in range(10)))
    png = io.BytesIO()
    Image.new("RGB", (40, 40)).save(png, "PNG")
    metrics = {"loss": 1.0, "top1": 0.5, "top5": 1.0, "images": 300.0}
    results = accumulator.compute(metrics, names, torch.device("cpu"))
    board = TensorBoardWriter(tmp_path / "tiny" / "tb")
    board.test_results(replace(results, mistakes=(Mistake(3, 0, 1, 0.9, 0.1, png.getvalue()),)), 7)
    board.close()
    shown = board_of(tiny(tmp_path))
    assert set(shown.Tags()["images"]) == {"test/confusion", "test/worst_mistakes"}


def test_a_run_that_starts_again_shows_everything_once(tmp_path):
    config = tiny(tmp_path, "train.epochs=2", "checkpoint.every_steps=7")
    stop_after(1, config)
    shutil.rmtree(run_of(config).path / "checkpoints")  # lost with the machine: it starts from nothing
    stop_after(1, config)
    (events,) = (run_of(config).path / "tb").iterdir()
    events.rename(events.with_name(re.sub(r"\d+", lambda time: str(int(time[0]) + 3600), events.name, count=1)))
    train(config)  # with a clock that is an hour behind
    (run_of(config).path / "summary.json").unlink()  # lost too, when all else was written: it is tested again
    train(config)
    board = board_of(config)
    for kind, tags in (
        ("Images", {"train/augmented": [0], "test/confusion": [10]}),
        ("Scalars", {"val/loss": [5, 10], "best/val_top1": [5, 10], "test/loss": [10]}),
        ("Tensors", {"config/text_summary": [0]}),
    ):
        assert {tag: [event.step for event in getattr(board, kind)(tag)] for tag in tags} == tags


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(tmp_path, monkeypatch):
    for function in ("results._png", "logs.confusion_figure", "loop._show_images"):
        monkeypatch.setattr(f"densenet_dist.train.{function}", Mock(side_effect=OSError("no font")))
    config = tiny(tmp_path, "train.epochs=1")
    notes = notes_of(config)
    assert "the images of the worst mistakes could not be read: no font" in notes
    assert "TensorBoard is incomplete: OSError: no font" in notes
    assert read_test_results(run_of(config)).top1 == run_of(config).read_records()[-1]["test/top1"]


def test_the_figures_of_every_so_many_steps_are_those_of_these_steps(tmp_path):
    each, fourth = (tiny(tmp_path, "train.epochs=2", f"log.every_steps={n}", f"name=every-{n}") for n in (1, 4))
    train(each), train(fourth)
    ones, fours = ([line for line in records(config) if "epoch" not in line] for config in (each, fourth))
    sizes, epochs = np.array([16, 16, 16, 16, 3] * 2), run_of(each).read_records()
    assert [line["global_step"] for line in ones] == list(range(1, 11))
    assert len(epochs) == len(load_run(run_of(each).path).history) + 1 == 3
    for name in ("loss", "top1"):
        values = np.array([line[f"step/{name}"] for line in ones])
        for line, part in zip(fours, (slice(4), slice(4, 8)), strict=True):  # across the end of an epoch
            assert line[f"step/{name}"] == pytest.approx(np.average(values[part], weights=sizes[part]))
        for record, part in zip(epochs[:2], (slice(5), slice(5, 10)), strict=True):
            assert record[f"train/{name}"] == pytest.approx(np.average(values[part], weights=sizes[part]))
    assert [event.step for event in board_of(fourth).Scalars("step/loss")] == [4, 8]
    assert ones[5]["step/lr"] == epochs[1]["lr"]  # at the start of the second epoch

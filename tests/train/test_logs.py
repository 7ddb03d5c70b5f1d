"""What a run leaves to read: metrics.jsonl and TensorBoard."""

import io
import json
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from runs import job_of, run_of, tiny, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

from densenet_dist.run_folder import RunFolder
from densenet_dist.schema import Config
from densenet_dist.train.environment import describe_environment, git_commit
from densenet_dist.train.logs import read_records

TAGS = {
    *("train/loss", "train/top1", "train/top5", "val/loss", "val/top1", "val/top5", "test/loss", "test/top1"),
    *("test/top5", "lr", "perf/images_per_s", "perf/data_wait", "goodput/ratio"),
    "perf/device_hours",
    *(f"goodput/lost_to_{loss}" for loss in ("start", "wait", "validate", "save", "recovery", "test")),
}
BEST = {f"best/{name}" for name in ("epoch", "val_loss", "val_top1", "test_loss", "test_top1")}


def board_of(run: RunFolder) -> EventAccumulator:
    board = EventAccumulator(str(run.path / "tb"), size_guidance={"images": 0, "scalars": 0})
    board.Reload()
    return board


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = tiny(
        tmp_path_factory.mktemp("finished"),
        *("train.epochs=2", "data.augment=notebook", "train.optimizer.betas=[0.5, 0.75]"),
    )
    train(config)
    return config


def test_a_run_leaves_these_tags_in_one_tensorboard_run(finished):
    run = run_of(finished)
    board = board_of(run)
    assert set(board.Tags()["scalars"]) == TAGS | BEST
    lines = read_records(run.path / "metrics.jsonl")
    assert len(lines) == 3
    for tag in TAGS:
        events = [(event.step, event.value) for event in board.Scalars(tag)]
        wanted = [(line["global_step"], line[tag]) for line in lines if tag in line]
        assert [step for step, _ in wanted] == ([10] if tag.startswith("test") else [5, 10])
        assert events == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]
    # All in one folder: another one would be another run on the board.
    assert all(path.is_file() for path in (run.path / "tb").iterdir())


def test_the_board_shows_the_augmented_images_as_they_were(finished):
    (event,) = board_of(run_of(finished)).Images("train/augmented")
    assert event.step == 0
    shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert shown.shape == (2 * 32, 8 * 32, 3)  # 16 images in rows of 8
    job = job_of(finished)
    first = next(iter(job.train_loader.epoch(0))).images
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (job.dataset.mean, job.dataset.std))
    for index in (0, 9):
        top, left = 32 * (index // 8), 32 * (index % 8)
        pixels = (first[index] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy() * 255
        np.testing.assert_allclose(shown[top : top + 32, left : left + 32], pixels, atol=1)


def test_the_settings_are_beside_the_results(finished):
    content = board_of(run_of(finished)).summary_metadata
    data = {tag: meta.plugin_data for tag, meta in content.items() if meta.plugin_data.plugin_name == "hparams"}
    parsed = {tag: plugin_data_pb2.HParamsPluginData.FromString(plugin.content) for tag, plugin in data.items()}
    settings = parsed["_hparams_/session_start_info"].session_start_info.hparams
    assert settings["train.lr"].number_value == 0.05
    assert settings["model.variant"].string_value == "densenet_bc"
    assert settings["train.optimizer.nesterov"].number_value == 1  # torch makes numbers of truths
    assert settings["train.optimizer.betas"].string_value == "[0.5, 0.75]"
    assert "train.ema_decay" not in settings  # null
    # The tab shows all scalars as metrics, and first the settings that differ between runs, if told nothing of either.
    assert "_hparams_/experiment" not in parsed
    assert parsed["_hparams_/session_end_info"].session_end_info.status == api_pb2.STATUS_SUCCESS


def test_the_environment_is_plain_and_holds_nothing_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-tell")
    found = describe_environment()
    assert "do-not-tell" not in json.dumps(found)
    assert found["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert git_commit(tmp_path) is None  # somebody else's checkout, which does not track this package

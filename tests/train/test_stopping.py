"""A run that is asked to stop or to save at any time loses nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed import run_ranks
from runs import context_of, records, tiny, train, weights_of

from densenet_dist.config import to_yaml
from densenet_dist.errors import CheckpointError
from densenet_dist.run_folder import CONFIG_FILE
from densenet_dist.schema import Config
from densenet_dist.train.context import Stopped, StopRequest, WorkerStatus
from densenet_dist.train.loop import fit

# Each epoch: 5 steps and a batch of validation; then 4 batches of the test.
MOVES = 3 * 6 + 1
SETTINGS = ("model.drop_rate=0.2", "train.ema_decay=0.9", "train.schedule.name=plateau", "data.mixup=0.2")


class Asking(WorkerStatus):
    """Asks for something itself after so many moves."""

    def __init__(self, at: int, request: StopRequest) -> None:
        super().__init__()
        self.at, self.asked = at, request

    def advance(self, step: int | None = None) -> None:
        super().advance(step)
        if self.progress == self.at:
            self.request(self.asked)


def asked(config: Config, at: int, request: StopRequest) -> list[dict[str, Any]]:
    """Train with that asked for; the events."""
    events: list[dict[str, Any]] = []
    context = replace(context_of(config), listener=events.append, status=Asking(at, request))
    if context.rank == 0:
        context.run.write(CONFIG_FILE, to_yaml(config))
    try:
        fit(config, context)
    except Stopped:
        events.append({"kind": "stopped"})
    return events


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Config:
    torch.set_num_threads(1)  # as every test here: a fixture of the module comes before them
    config = tiny(tmp_path_factory.mktemp("undisturbed"), *SETTINGS)
    train(config)
    return config


# A step within an epoch, the last of an epoch, in validation, and in the test.
@pytest.mark.parametrize("at", [3, 5, 6, MOVES])
def test_stopped_at_any_move_and_resumed_it_ends_as_if_it_had_not_been(tmp_path, undisturbed, at):
    config = tiny(tmp_path, *SETTINGS)
    events = asked(config, at, StopRequest.STOP)
    assert events[-1]["kind"] == "stopped"
    saved = max(weights_of(config))
    assert saved.endswith("-trained") == (at in (5, 6))  # an epoch whose validation is still to come
    step = int(saved[5:13])
    assert events[-2] == {"kind": "note", "text": f"stopped; the checkpoint of step {step} is saved"}
    summary = train(config)
    assert records(config) == records(undisturbed)
    assert weights_of(config)[f"step-{summary['global_step']:08d}"] == weights_of(undisturbed)["step-00000015"]


def test_asked_to_save_it_saves_once_and_goes_on_and_without_its_folder_it_writes_nothing_more(tmp_path):
    config = tiny(tmp_path / "saves", "checkpoint.keep=20", "checkpoint.every_epochs=3")
    assert asked(config, 2, StopRequest.SAVE)[-1]["kind"] == "end"
    assert set(weights_of(config)) == {"step-00000002", "step-00000015"}
    config = tiny(tmp_path / "leaves", "train.epochs=1")
    assert asked(config, 2, StopRequest.ABANDON)[-1]["kind"] == "stopped"
    assert not weights_of(config)


def test_a_checkpoint_within_an_epoch_is_of_one_order_of_images(tmp_path):
    asked(tiny(tmp_path), 3, StopRequest.STOP)
    for setting, difference in (
        ("model.growth_rate=6", "model.growth_rate: 4 there, 6 here"),
        ("data.limit=60", "data.limit: 75 there, 60 here"),
        ("data.val_fraction=0.2", "data.val_fraction: 0.1 there, 0.2 here"),
        ("train.global_batch_size=8", "train.global_batch_size: 16 there, 8 here"),
        ("seed=1", "seed: 0 there, 1 here"),
    ):
        with pytest.raises(CheckpointError, match=f"(?s)step 3 does not fit this run:.*{difference}") as caught:
            train(tiny(tmp_path, setting))
        assert caught.value.exit_code == 6
    # How it is computed may differ.
    assert train(tiny(tmp_path, "train.lr=0.1", "model.block=reference"))["global_step"] == 15


def stop_on_one_rank(storage: str, rank_asked: int, at: int) -> list[str]:
    config = tiny(storage, "data.limit=300")
    rank = torch.distributed.get_rank()
    events = asked(config, at if rank == rank_asked else 10**6, StopRequest.STOP)
    return [event["kind"] for event in events[-2:]] + sorted(weights_of(config))


@pytest.mark.parametrize(("rank", "at"), [(1, 4), (0, 18)])  # within an epoch of 17 steps, and in its validation
def test_all_ranks_stop_where_one_is_asked(tmp_path, rank, at):
    first, second = run_ranks(stop_on_one_rank, 2, str(tmp_path), rank, at)
    assert first[:2] == ["note", "stopped"]
    assert second[0] == "stopped"
    assert len(first) == 3
    assert min(at, 17) <= int(first[2][5:13]) <= 17


def test_every_so_many_steps_it_saves_at_the_end_of_an_epoch_too(tmp_path):
    config = tiny(tmp_path, "checkpoint.every_steps=5", "checkpoint.every_epochs=9", "checkpoint.keep=9")
    train(config)
    assert set(weights_of(config)) == {f"step-{step:08d}" for step in (5, 10, 15)}


def test_auto_saves_within_an_epoch_once_the_last_checkpoint_is_old_enough(tmp_path, monkeypatch):
    config = tiny(tmp_path, "data.limit=300", "checkpoint.keep=50", "train.epochs=1")
    monkeypatch.setattr("densenet_dist.train.checkpoint.MIN_INTERVAL_S", 0.0)
    monkeypatch.setattr("densenet_dist.train.checkpoint.MAX_COST", 1e9)
    train(config)
    assert len(weights_of(config)) > 1

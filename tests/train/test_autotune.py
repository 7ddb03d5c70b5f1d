"""``data.loader=auto`` measures once, says so, writes it down, and keeps to it; what it chose changes no batch."""

import json
from typing import Any

import pytest
import torch
from distributed import run_ranks
from runs import run_of, tiny, train, trainer_of

from densenet_dist.cluster.launch import fit
from densenet_dist.cluster.resuming import resume_config
from densenet_dist.model.fused_block import FusedDenseBlock
from densenet_dist.run_folder import ENV_FILE, SUMMARY_FILE
from densenet_dist.train import autotune
from densenet_dist.train.autotune import Speed, compare_loaders


def environment(config: Any) -> dict[str, Any]:
    return run_of(config).read_json(ENV_FILE)


def fused(trainer: Any) -> bool:
    return any(isinstance(module, FusedDenseBlock) for module in trainer.model.modules())


@pytest.mark.parametrize(
    ("device", "torch_rate", "dali_rate", "chosen"),
    [
        ("cpu", 100, 105, "torch"),  # not clearly better: the usual one
        ("cuda", 100, 60, "torch"),
        ("cuda", 105, 100, "dali"),
    ],
)
def test_the_usual_one_of_a_device_is_taken_unless_the_other_is_clearly_faster(device, torch_rate, dali_rate, chosen):
    def speed(rate: int) -> Speed:
        # On a CPU its seconds count, on a GPU those of the clock; the other figure would lead astray.
        return Speed(rate, 1000.0) if device == "cuda" else Speed(1000.0, rate)

    name, reason, _ = compare_loaders({"torch": speed(torch_rate), "dali": speed(dali_rate)}, device)
    assert name == chosen
    assert reason.startswith(str({"torch": torch_rate, "dali": dali_rate}[name]))


def test_auto_measures_both_says_so_writes_it_down_and_a_resumed_run_keeps_it(tmp_path):
    config = tiny(tmp_path, "data.loader=auto", "train.epochs=1")
    events: list[dict[str, Any]] = []
    fit(config, listener=events.append)
    written = environment(config)
    choice = written["loader"]
    assert choice["device"] == "cpu"
    assert choice["torch_images_per_cpu_s"] > 0
    assert choice["dali_images_per_cpu_s"] > 0
    (note,) = [event["text"] for event in events if event["kind"] == "note"]
    assert note == f"loader: {choice['name']} ({choice['reason']})"
    assert [event["loader"] for event in events if event["kind"] == "start"] == [choice["name"]]
    assert written["packages"]["torch"] == torch.__version__.partition("+")[0]  # the rest is still there

    kept = {"torch": "dali", "dali": "torch"}[choice["name"]]  # which it would not measure again
    run_of(config).write(ENV_FILE, json.dumps(written | {"loader": choice | {"name": kept}}))
    run_of(config).remove(SUMMARY_FILE)  # a finished run would be left as it is
    events.clear()
    fit(resume_config(run_of(config), []), resume=True, listener=events.append)
    assert [event["loader"] for event in events if event["kind"] == "start"] == [kept]
    assert not [event for event in events if event["kind"] == "note"]  # nothing was measured
    assert environment(config)["loader"]["name"] == kept


def choice(storage: str) -> str:
    return trainer_of(tiny(storage, "data.loader=auto")).loader_name


def test_all_ranks_take_the_same_loader(tmp_path):
    assert len(set(run_ranks(choice, 2, str(tmp_path)))) == 1


@pytest.mark.parametrize("faster", ["fused", "reference"])
def test_the_faster_dense_block_is_chosen_once_and_a_resumed_run_keeps_it(tmp_path, monkeypatch, faster):
    config = tiny(tmp_path, "data.loader=torch", "model.block=auto")
    assert fused(trainer_of(config))
    assert "block" not in environment(config)  # the run is too short to measure
    monkeypatch.setattr(autotune, "MIN_IMAGES", 1)
    monkeypatch.setattr(autotune, "MAX_SECONDS", 0.1)
    measured, seconds = autotune._step_seconds, []

    def slow_down(model, count, *how):
        seconds.append(measured(model, count, *how))
        return 1.0 if isinstance(model.features[1], FusedDenseBlock) == (faster == "fused") else 2.0

    monkeypatch.setattr(autotune, "_step_seconds", slow_down)
    assert fused(trainer_of(config)) == (faster == "fused")
    choice = environment(config)["block"]
    assert choice["name"] == faster
    rates = sorted((choice[f"{form}_images_per_s"], form) for form in autotune.FORMS)
    assert rates[1] == (2 * rates[0][0], faster)
    assert min(seconds) > 0

    monkeypatch.setattr(autotune, "_measure_blocks", pytest.fail)  # it is not called again
    assert fused(trainer_of(config)) == (faster == "fused")
    # A run that began before the choice was measured keeps the form it had.
    train(tiny(tmp_path / "old", "data.loader=torch", "model.block=fused", "train.epochs=1"))
    assert fused(trainer_of(tiny(tmp_path / "old", "data.loader=torch", "model.block=auto")))

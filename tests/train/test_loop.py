"""The training loop in one process: what a step does, what an epoch counts, when a run ends and what it leaves."""

import copy
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu import without_waiting
from runs import notes_of, records, run_of, tiny, train, trainer_of, weights_of
from torch import nn

from densenet_dist.errors import ConfigError, TrainingError
from densenet_dist.schema import Config
from densenet_dist.train.checkpoint import CheckpointStore
from densenet_dist.train.context import RunContext
from densenet_dist.train.evaluation import evaluate, evaluate_model
from densenet_dist.train.inputs import train_and_val
from densenet_dist.train.loop import train_epoch, train_step
from densenet_dist.train.network import build_model
from densenet_dist.train.preflight import check_batches, check_device
from densenet_dist.train.snapshot import Position
from densenet_dist.train.trainer import Trainer


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return copy.deepcopy(trainer.model.state_dict())


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    torch.testing.assert_close(dict(found), dict(expected), rtol=tolerance, atol=tolerance)


COMMON = {"lr": 0.005, "weight_decay": 0.01, "foreach": False}
PLAIN = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, momentum=0.8, nesterov=True, **COMMON),
    "adam": lambda parameters: torch.optim.Adam(parameters, betas=(0.8, 0.99), eps=1e-3, **COMMON),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, betas=(0.8, 0.99), eps=1e-3, **COMMON),
}


@pytest.mark.parametrize(
    ("trained", "evaluated", "precision", "need"),
    # Blocks of 12 maps of 32x32 and 10 of 16x16: 14,848 values of an image, 12,288 of them in the larger block.
    [(10**9, 500, "fp32", "55,313.1"), (10**9, 500, "bf16", "27,656.6"), (64, 10**9, "fp32", "45,776.4")],
)
def test_batches_larger_than_memory_are_refused(tmp_path, trained, evaluated, precision, need):
    config, cpu = tiny(tmp_path, f"train.precision={precision}"), torch.device("cpu")
    check_device(config, 10, cpu, 64, 500)
    with pytest.raises(ConfigError, match=f"1,000,000,000 images of 32x32 at a time need {need} GiB"):
        check_device(config, 10, cpu, trained, evaluated)


def test_a_gpu_without_bf16_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(ConfigError, match=r"train\.precision=bf16: needs a GPU"):
        check_device(tiny(tmp_path, "train.precision=bf16"), 10, torch.device("cuda"), 64, 500)


@pytest.mark.parametrize("name", PLAIN)
def test_an_epoch_is_that_of_a_plain_loop(tmp_path, name):
    """Without channels_last, fused kernels, autocast, loss scaling and all else that the engine has."""
    settings = [f"train.optimizer.name={name}", "train.optimizer.weight_decay=0.01", "train.optimizer.decay=all"]
    settings += ["train.optimizer.eps=1e-3", "train.schedule.warmup_epochs=0.5", "train.lr=0.005"]
    settings += ["train.optimizer.momentum=0.8", "train.optimizer.betas=[0.8, 0.99]"]
    config = tiny(tmp_path, *settings, "train.label_smoothing=0.1", "train.clip_grad_norm=0.25")
    trainer = trainer_of(config)
    figures = train_epoch(trainer)

    model = build_model(config.model, 10, 32, config.seed).to(memory_format=torch.contiguous_format)
    assert_close(dict(model.state_dict()), state(trainer_of(config)), 0)
    optimizer, losses, hits, clipped = PLAIN[name](model.parameters()), [], [], 0
    for step, (images, labels, size) in enumerate(trainer_of(config).train_loader.epoch(0)):
        optimizer.param_groups[0]["lr"] = trainer.lr_controller.lr(step)
        log_probabilities = model(images.contiguous()).log_softmax(1)
        of_label = log_probabilities[torch.arange(size), labels]
        each = -(0.9 * of_label + 0.1 * log_probabilities.mean(1))
        optimizer.zero_grad()
        each.mean().backward()
        norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
        clipped += int(norm > 0.25)
        for parameter in model.parameters():
            parameter.grad *= min(1.0, 0.25 / float(norm))
        optimizer.step()
        losses += each.tolist()
        hits += (log_probabilities.argmax(1) == labels).tolist()
    assert clipped >= 2  # it was at work
    assert_close(state(trainer), dict(model.state_dict()), 2e-5)
    assert figures["train/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert figures["train/top1"] == pytest.approx(np.mean(hits))
    assert len(losses) == 67


ONE_PIXEL = ("model.variant=densenet", "model.num_layers=[1, 1, 1, 1, 1, 1]")  # 32 pixels, halved five times
DENSENET121 = ("model.variant=densenet121", "model.num_layers=[6, 12, 24, 16]", "train.global_batch_size=64")


@pytest.mark.parametrize(
    ("images", "ranks", "settings", "remedies"),
    [
        (45_000, 8, DENSENET121, ["batch_size=65", "sync_bn=true"]),
        (9, 1, [*ONE_PIXEL, "train.global_batch_size=8", "train.sync_bn=true"], ["batch_size=9"]),
        (48, 2, [*ONE_PIXEL, "train.grad_accum_steps=5"], ["batch_size=23", "sync_bn=true"]),
        (36, 5, ["train.global_batch_size=32"], ["batch_size=33"]),  # of any model: a rank without images
        (1, 1, ONE_PIXEL, []),
    ],
)
def test_batches_that_are_too_small_are_refused_with_values_that_work(tmp_path, images, ranks, settings, remedies):
    with pytest.raises(ConfigError, match=r"train\.global_batch_size: .* leave a batch of") as caught:
        check_batches(tiny(tmp_path, *settings), images, [ranks])
    offered = re.findall(r"train\.\S+=[^\s,]+", str(caught.value).splitlines()[1])
    assert [setting.removeprefix("train.").removeprefix("global_") for setting in offered] == remedies
    for setting in offered:
        check_batches(tiny(tmp_path, *settings, setting), images, [ranks])
    if settings is ONE_PIXEL:
        check_batches(tiny(tmp_path, *settings, "train.freeze=[6]"), images, [ranks])  # no BatchNorm of one pixel


def test_dropout_is_a_function_of_seed_step_and_rank(tmp_path):
    def masks(config: Config, *, step: int = 0, rank: int = 0, noise: bool = False) -> bytes:
        trainer = trainer_of(config)
        trainer.context, trainer.position = replace(trainer.context, rank=rank), Position(global_step=step)
        if noise:
            torch.manual_seed(99)
        trainer.prepare_step()
        return nn.functional.dropout(torch.ones(100), 0.5).numpy().tobytes()

    config = tiny(tmp_path, "model.drop_rate=0.5")
    assert masks(config) == masks(config, noise=True)
    others = [masks(config, step=1), masks(config, rank=1), masks(tiny(tmp_path, "model.drop_rate=0.5", "seed=1"))]
    assert len({masks(config), *others}) == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_computes_in_it_and_keeps_weights_in_float32(tmp_path, precision):
    half, full = (trainer_of(tiny(tmp_path, f"train.precision={name}")) for name in (precision, "fp32"))
    seen = []
    half.model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for trainer in (half, full):
        train_epoch(trainer)
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {tensor.dtype for tensor in half.model.state_dict().values()} == {torch.float32, torch.int64}
    assert_close(state(half), state(full), 0.05)
    assert not torch.equal(half.model.classifier.weight, full.model.classifier.weight)
    assert half.scaler.is_enabled() == (precision == "fp16")


def test_a_step_whose_scaled_gradient_overflows_is_left_out_and_the_scale_falls(tmp_path):
    trainer = trainer_of(tiny(tmp_path, "train.precision=fp16", "train.clip_grad_norm=1"))
    batch = next(iter(trainer.train_loader.epoch(0)))
    before, scale = state(trainer), trainer.scaler.get_scale()
    trainer.scaler._init_scale = 2.0**120  # far beyond what fp16 holds
    trainer.train_model.eval()  # BatchNorm's statistics stay
    train_step(trainer, batch)
    assert_close(state(trainer), before, 0)
    assert not any(kept["momentum_buffer"].any() for kept in trainer.optimizer.state.values())  # also at the first step
    assert trainer.scaler.get_scale() == 2.0**119
    trainer.scaler._scale.fill_(scale)
    train_step(trainer, batch)
    assert not torch.equal(state(trainer)["classifier.weight"], before["classifier.weight"])


def test_every_image_is_counted_once(tmp_path):
    config = tiny(tmp_path, "checkpoint.every_steps=1", "checkpoint.keep=100", "train.epochs=2")
    train(config)
    store = CheckpointStore(run_of(config))
    counted = [float(store.load(entry).state["sums"][:, 3].sum()) for entry in store.entries]
    assert counted == [16, 32, 48, 64, 0] * 2  # a checkpoint at an epoch's end has none left over
    for split, images in (("test", 75), ("val", 8), ("train", 67)):
        assert evaluate(config.storage + "/tiny", split=split)["images"] == images


def test_the_events_and_files_of_a_run(tmp_path):
    events = []
    summary = train(tiny(tmp_path, "train.epochs=2"), listener=events.append)
    told = [event for event in events if event["kind"] != "progress"]
    assert [event["kind"] for event in told] == ["start", "epoch", "epoch", "phase", "end"]
    start, first, second, _, end = told
    assert (start["train_images"], start["val_images"], start["steps_per_epoch"]) == (67, 8, 5)
    assert (start["world_size"], start["device"], start["global_step"]) == (1, "CPU", 0)
    assert (second["epoch"], second["global_step"], second["checkpoint"]) == (2, 10, "step-00000010")
    assert first["is_best"] is True
    assert 0 <= first["perf/data_wait"] <= 1
    assert first["perf/images_per_s"] > 0
    json.dumps(events)  # plain values only
    assert end == {"kind": "end", **summary}
    assert {"status": "finished", "epochs": 2, "global_step": 10}.items() <= summary.items()
    assert json.loads((tmp_path / "tiny" / "summary.json").read_text()) == summary
    found = {path.name for path in (tmp_path / "tiny").iterdir()}
    files = {"config.yaml", "classes.json", "metrics.jsonl", "test_results.json", "summary.json"}
    assert found == files | {"tb", "checkpoints"}


def test_early_stopping_ends_the_run(tmp_path):
    # Nothing is an improvement of 100 but the first epoch: it stops after two more.
    settings = ["train.early_stopping.enabled=true", "train.early_stopping.patience=2"]
    summary = train(tiny(tmp_path, *settings, "train.early_stopping.min_delta=100", "train.epochs=9"))
    assert (summary["status"], summary["epochs"], summary["global_step"]) == ("early stop", 3, 15)


def test_the_best_checkpoint_is_what_is_tested_not_the_last(tmp_path):
    rise = ["train.schedule.name=one_cycle", "train.schedule.pct_start=0.99", "train.schedule.div_factor=1000"]
    config = tiny(tmp_path, *rise, "train.lr=5", "train.epochs=3", "checkpoint.monitor=val/loss")
    summary = train(config)
    *lines, tested = records(config)
    losses = [record["val/loss"] for record in lines]
    best = int(np.argmin(losses)) + 1
    assert best < 3
    assert summary["best"]["epoch"] == best == tested["epoch"]
    assert summary["best"]["val/loss"] == min(losses)
    first, last = (evaluate(run_of(config).path, checkpoint=which)["loss"] for which in ("best", "last"))
    assert summary["test/loss"] == pytest.approx(first, rel=1e-6)
    assert last > 2 * first
    assert len(weights_of(config)) == 2  # the best and the newest
    # Without validation there is no best one: the newest is tested.
    config = tiny(tmp_path / "unvalidated", "data.val_fraction=0", "train.epochs=2")
    summary = train(config)
    assert "val/loss" not in records(config)[0]
    assert summary["best"] == {"epoch": 2}


def test_if_the_best_checkpoint_is_lost_during_the_run_the_next_best_is_tested(tmp_path):
    config = tiny(tmp_path, "train.epochs=2", "checkpoint.keep=2")
    notes, lost = [], []

    def listen(event):
        if event["kind"] == "note":
            notes.append(event["text"])
        if event["kind"] == "epoch" and event["epoch"] == 2:
            store = CheckpointStore(run_of(config))
            lost.append(store.best)
            shutil.rmtree(run_of(config).path / "checkpoints" / store.best)

    summary = train(config, listener=listen)
    (left,) = {"step-00000005", "step-00000010"} - set(lost)
    assert summary["best"]["epoch"] == int(left[-2:]) // 5
    assert [note.endswith("it is skipped") for note in notes if lost[0] in note] == [True]
    assert CheckpointStore(run_of(config)).best == left
    assert evaluate(run_of(config).path)["loss"] == pytest.approx(summary["test/loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("every", "problem"),
    [
        # The loss of step 5 is still that of the old weights; from step 6 on there is none.
        ("auto", r"the loss is NaN or infinite at step 6 \(epoch 2\); the checkpoint of step 5 is kept"),
        ("1", r"the norm of the weights is NaN or infinite at step 5 \(epoch 2\); .* step 5 is"),
    ],
)
def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(tmp_path, every, problem):
    settings = ["train.schedule.name=constant", f"checkpoint.every_steps={every}"]
    train(tiny(tmp_path, *settings, "train.epochs=1"))
    config = tiny(tmp_path, *settings, "train.epochs=3", "train.lr=1e30")
    good, lines = weights_of(config), records(config)
    with pytest.raises(TrainingError, match=problem) as caught:
        train(config)
    assert caught.value.exit_code == 1
    assert "train.clip_grad_norm=1" in str(caught.value)
    assert weights_of(config) == good
    assert records(config) == lines[:-1]  # without the test of the first, which was the end of another run


@pytest.mark.parametrize(
    ("split", "settings"),
    [
        ("validation", ["data.limit=18", "data.test_limit=18", "train.lr=1e30"]),
        ("test", ["data.limit=16", "data.test_limit=16", "train.lr=1e15", "data.val_fraction=0", "train.epochs=1"]),
    ],
)
def test_a_loss_that_is_not_finite_in_an_evaluation_ends_the_run(tmp_path, split, settings):
    # One step an epoch: its own loss is finite, and only an evaluation sees the weights that it leaves.
    config = tiny(tmp_path, *settings, "train.schedule.name=constant")
    with pytest.raises(TrainingError, match=rf"the {split} loss is NaN or infinite at step 0 \(epoch 1\)"):
        train(config)
    assert bool(weights_of(config)) == (split == "test")
    assert not run_of(config).exists("summary.json")


def test_classes_are_weighted_in_the_loss(tmp_path):
    trainer = trainer_of(tiny(tmp_path, "train.class_weights=balanced"))
    labels = trainer.dataset.train.labels[train_and_val(trainer.config, trainer.dataset)[0]]
    assert trainer.class_weights[labels].mean() == pytest.approx(1)
    assert trainer.class_weights.numpy() * np.bincount(labels) == pytest.approx(np.full(10, len(labels) / 10))
    batch = next(trainer.train_loader.epoch(0))
    loss, logits = trainer.forward_backward(batch.images, batch.targets, 1.0)
    losses = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    assert loss == pytest.approx(float((losses * trainer.class_weights[batch.targets]).sum()))
    with pytest.raises(ConfigError, match=r"class_weights: 2 weights for 10 classes; give one per class, .* circle"):
        trainer_of(tiny(tmp_path, "train.class_weights=[1, 2]"))


def test_the_average_of_the_weights_is_what_is_validated_and_saved_beside(tmp_path):
    config = tiny(tmp_path, "train.ema_decay=0.9", "train.epochs=1")
    train(config)
    snapshot = CheckpointStore(run_of(config)).load_latest()
    trainer = trainer_of(config)
    trainer.model.load_state_dict(snapshot.average)
    found = evaluate_model(trainer.model, trainer.val_loader, trainer.context, "fp32")
    assert found["loss"] == pytest.approx(records(config)[0]["val/loss"], rel=1e-6)
    assert not torch.equal(snapshot.average["classifier.weight"], snapshot.model["classifier.weight"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("data", [(), ("data.cutout=8", "data.mixup=0.4"), ("data.trivial_augment=true",)], ids=str)
def test_captured_steps_equal_launched_ones(tmp_path, monkeypatch, optimizer, data):
    """Making the batch included where the device can do it alone.

    Ten steps, the last of an epoch smaller than the others, with dropout and a changing learning rate.
    """
    settings = ["model.drop_rate=0.2", "cluster.device=cuda", "data.loader=torch", f"train.optimizer.name={optimizer}"]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # it would amplify the last bit to 1e-3
    weights = []
    for cuda_graph in ("false", "true"):
        config = tiny(tmp_path, *settings, *data, f"train.cuda_graph={cuda_graph}")
        trainer = Trainer(config, RunContext(run_of(config), torch.device("cuda")))
        assert (trainer.step_graph is not None) == (cuda_graph == "true")
        for epoch in range(2):
            trainer.position = Position(epoch, 0, trainer.position.global_step)
            train_epoch(trainer)
        weights.append({name: value.cpu() for name, value in trainer.model.state_dict().items()})
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [("train.precision=fp32",), ("train.precision=bf16", "train.optimizer.name=adam")])
def test_a_step_never_waits_for_the_device(tmp_path, settings):
    config = tiny(tmp_path, "model.drop_rate=0.2", "train.ema_decay=0.9", "data.loader=torch", *settings)
    trainer = Trainer(config, RunContext(run_of(config), torch.device("cuda")))
    for batch in trainer.train_loader.epoch(0):  # kernels are chosen, the optimizer makes its state
        train_step(trainer, batch)
    with without_waiting():
        for batch in trainer.train_loader.epoch(1):
            train_step(trainer, batch)


def test_a_step_on_a_recipe_is_a_step_on_its_batch(tmp_path):
    trainers = [trainer_of(tiny(tmp_path, "data.loader=torch", "data.cutout=8", "data.mixup=0.4")) for _ in range(2)]
    for batch in trainers[0].train_loader.epoch(0):
        train_step(trainers[0], batch)
    for recipe in trainers[1].train_loader.recipes(0):
        train_step(trainers[1], recipe)
    for one, other in zip(*(trainer.model.state_dict().values() for trainer in trainers), strict=True):
        assert torch.equal(one, other)


def test_without_a_compiler_the_reference_form_trains_and_the_run_says_so(tmp_path, monkeypatch):
    for block, form in (("auto", "FusedDenseBlock"), ("reference", "DenseBlock")):
        assert type(trainer_of(tiny(tmp_path, f"model.block={block}")).model.features.denseblock1).__name__ == form
    monkeypatch.setattr("densenet_dist.train.autotune.unavailable", lambda _: "no C++ compiler is found (c++)")
    notes = notes_of(tiny(tmp_path, "model.block=auto", "train.epochs=1"))
    assert "block: reference (no C++ compiler is found (c++))" in notes

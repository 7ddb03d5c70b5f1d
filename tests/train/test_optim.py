"""Optimizers, learning rates, early stopping and the average of weights, against torch's own and against tables."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from densenet_dist.config import load_config
from densenet_dist.model import DenseNet
from densenet_dist.model.variants import densenet
from densenet_dist.schedules import SCHEDULES
from densenet_dist.schema import OptimizerConfig, ScheduleConfig, TrainConfig
from densenet_dist.train.optim import LRController, WeightAverage, _is_conv, build_optimizer, load_optimizer_state

STEPS_PER_EPOCH = 7


def net() -> DenseNet:
    torch.manual_seed(0)
    return densenet("densenet_bc", num_classes=10, growth_rate=4, num_layers=2)


def controller(*settings: str) -> LRController:
    config = load_config("train.epochs=20", *(f"train.{setting}" for setting in settings))
    return LRController(config.train, STEPS_PER_EPOCH)


def rates(epochs: int, lr: float = 0.5, steps_per_epoch: int = STEPS_PER_EPOCH, **options: Any) -> list[float]:
    controller = LRController(TrainConfig(schedule=ScheduleConfig(**options), lr=lr, epochs=epochs), steps_per_epoch)
    return [controller.lr(step) for step in range(epochs * steps_per_epoch)]


def torch_rates(make: Callable[[torch.optim.Optimizer], Any], steps: int, lr: float = 0.5) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(found) < steps:
            scheduler.step()
    return found


def test_multistep_with_its_defaults_is_the_notebooks_step_function():
    table = [1e-3] * 50 + [1e-4] * 25 + [1e-5] * 25
    expected = [rate for rate in table for _ in range(STEPS_PER_EPOCH)]
    assert rates(100, lr=1e-3, name="multistep") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("anneal", "pct_start", "epochs"), [("cos", 0.3, 10), ("linear", 0.71, 1)])
def test_one_cycle_is_torchs(anneal, pct_start, epochs):
    options = {"pct_start": pct_start, "div_factor": 20, "final_div_factor": 100}
    steps = epochs * STEPS_PER_EPOCH

    def make(optimizer):
        return lr_scheduler.OneCycleLR(optimizer, 0.5, steps, anneal_strategy=anneal, cycle_momentum=False, **options)

    found = rates(epochs, name="one_cycle", anneal=anneal, **options)
    assert found == pytest.approx(torch_rates(make, steps), rel=1e-9)


def test_warmup_and_cosine_are_torchs_with_the_warmup_one_step_ahead():
    # torch starts at the start factor itself and reaches 1 after the last warm-up step, ours in it.
    warm = 2 * STEPS_PER_EPOCH
    ours = rates(10, name="cosine", final_lr=0.01, warmup_epochs=2, warmup_start=0.1)
    linear = torch_rates(lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, 1.0, warm), warm + 1)[1:]
    cosine = torch_rates(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 70 - warm, 0.01), 70 - warm)
    assert ours == pytest.approx(linear + cosine, rel=1e-9)


def test_milestones_and_warmup_may_end_within_an_epoch_and_do_not_move_each_other():
    assert rates(1, lr=1.0, steps_per_epoch=4, name="multistep", milestones=(0.6,)) == [1.0, 1.0, 1.0, 0.1]
    assert rates(1, lr=1.0, steps_per_epoch=4, name="constant", warmup_epochs=0.3) == [0.5, 1.0, 1.0, 1.0]
    both = rates(6, lr=1.0, steps_per_epoch=1, name="multistep", milestones=(3, 5), warmup_epochs=2)
    assert both == pytest.approx([0.5, 1.0, 1.0, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("options", ["one_cycle", "cosine", "cosine,schedule.warmup_epochs=6"])
def test_a_schedule_fitted_to_the_time_is_that_of_a_run_with_as_many_steps(options):
    name, *warmup = options.split(",")
    long = controller(f"schedule.name={name}", "max_minutes=1", *warmup)  # of 20 epochs
    long.rescale_to(0, 10 * STEPS_PER_EPOCH)
    short = rates(10, lr=0.1, name=name, warmup_epochs=3.0 if warmup else 0.0)
    assert [long.lr(step) for step in range(70)] == pytest.approx(short, abs=0.003)
    # Estimates that change: the rate continues where it is, and completes its course where the last one says.
    for step, end in ((5, 8), (6, 80), (30, 50), (45, 95)):
        before = long.lr(step)
        long.rescale_to(step, end)
        assert long.lr(step) == pytest.approx(before, rel=1e-9)
    found = [long.lr(step) for step in range(45, 95)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.01 * found[0]
    restored = controller(f"schedule.name={name}", "max_minutes=1", *warmup)
    restored.load_state_dict(long.state_dict())
    assert [restored.lr(step) for step in range(45, 95)] == found


@pytest.mark.parametrize(("end", "resumed"), [(20 * STEPS_PER_EPOCH, math.inf), (100, 100)])
def test_more_epochs_lift_the_end_unless_the_time_set_it(end, resumed):
    before, after = controller("max_minutes=1"), controller("max_minutes=1", "epochs=30")
    before.rescale_to(10, end)
    after.load_state_dict(before.state_dict())
    assert after.end_step == resumed


def test_a_run_of_one_step_has_a_rate():
    for name in SCHEDULES:
        (rate,) = rates(1, steps_per_epoch=1, name=name)
        assert 0 < rate <= 0.5, name


KERAS = [
    (1.000, 1e-0),  # best
    (0.995, 1e-0),  # 1
    (0.990, 1e-0),  # 2: exactly min_delta lower is no improvement
    (1.200, 1e-0),  # 3
    (0.991, 1e-0),  # 4
    (0.9901, 1e-1),  # 5: reduced, count starts anew
    (0.990, 1e-1),  # 1: the best is still 1.000
    (0.980, 1e-1),  # best
    *[(0.975, 1e-1)] * 4,
    (0.960, 1e-1),  # best, just in time
    *[(0.970, 1e-1)] * 4,
    (0.970, 1e-2),  # 5: reduced
]


def test_plateau_follows_keras_to_the_epoch():
    plateau = controller("schedule.name=plateau", "lr=1.0")
    for epoch, (loss, rate) in enumerate(KERAS, start=1):
        plateau.end_epoch(loss)
        assert plateau.lr(epoch * STEPS_PER_EPOCH) == pytest.approx(rate), epoch


def test_plateau_stops_at_the_lowest_rate_but_a_warmup_may_be_below_it():
    settings = ("schedule.name=plateau", "lr=1.0", "schedule.patience=1", "schedule.min_lr=0.02")
    plateau = controller(*settings, "schedule.warmup_epochs=10")
    assert plateau.lr(0) == pytest.approx(1 / 70)
    for expected in (1.0, 0.1, 0.02, 0.02):
        plateau.end_epoch(1.0)
        assert plateau.lr(19 * STEPS_PER_EPOCH) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("min_delta", "losses", "stops_after"),
    [
        (0.1, [3, 2.95, 2.92, 2.85, 9, 9, 9], 7),  # 2.85 < 3 - 0.1, just in time
        (0.0, [3, float("nan"), 3, 5], 4),  # equal is no improvement
        (0.0, [3, None, None, None, None], None),  # epochs without validation count for nothing
    ],
)
def test_early_stopping(min_delta, losses, stops_after):
    settings = ("enabled=true", "patience=3", f"min_delta={min_delta}")
    run = controller(*(f"early_stopping.{setting}" for setting in settings))
    stopped = []
    for loss in losses:
        run.end_epoch(loss)
        stopped.append(run.stopped)
    assert stopped == [epoch == stops_after for epoch in range(1, len(losses) + 1)]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_muon_updates_matrices_of_convolutions_and_adamw_the_rest(memory_format):
    ours, plain = (net().to(memory_format=memory_format) for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.5}
    optimizer = build_optimizer(ours, OptimizerConfig("muon", weight_decay=0.5, decay="all", momentum=0.8), 0.1)
    others = torch.optim.AdamW([p for p in plain.parameters() if p.ndim < 4], eps=1e-8, **settings)
    order = (0, 2, 3, 1) if memory_format == torch.channels_last else (0, 1, 2, 3)
    weights = [p for p in plain.parameters() if p.ndim == 4]
    matrices = [nn.Parameter(p.detach().permute(order).flatten(1)) for p in weights]  # in the memory of the weights
    muon = torch.optim.Muon(matrices, momentum=0.8, adjust_lr_fn="match_rms_adamw", **settings)
    for lr in (0.1, 0.02):
        for theirs, mine in zip(plain.parameters(), ours.parameters(), strict=True):
            theirs.grad = torch.randn_like(theirs)
            mine.grad = theirs.grad.clone()
        for matrix, weight in zip(matrices, weights, strict=True):
            matrix.grad = weight.grad.permute(order).flatten(1)
        for group in (*optimizer.param_groups, *others.param_groups, *muon.param_groups):
            group["lr"] = lr
        for each in (optimizer, others, muon):
            each.step()
    assert all(p.grad is None for group in optimizer._muon.param_groups for p in group["params"])
    assert not _is_conv(torch.empty(3, 4, 2, 2).transpose(0, 1))  # a view as a matrix is impossible
    torch.testing.assert_close(dict(ours.state_dict()), dict(plain.state_dict()), rtol=1e-5, atol=1e-6)


def test_batchnorm_and_biases_are_spared_the_decay_and_frozen_parameters_left_out():
    model = net()
    model.features.conv0.weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.01), 0.1)
    names = {parameter: key for key, parameter in model.named_parameters() if parameter.requires_grad}
    by_decay = {group["weight_decay"]: {names[p] for p in group["params"]} for group in optimizer.param_groups}
    spared = {key for key in names.values() if "norm" in key or key.endswith("bias")}
    assert by_decay == {0.01: set(names.values()) - spared, 0.0: spared}
    assert "classifier.weight" in by_decay[0.01]


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_state_may_lack_parameters_without_a_gradient_so_far(name):
    def optimizer() -> torch.optim.Optimizer:
        return build_optimizer(nn.Linear(2, 2), OptimizerConfig(name=name, decay="all"), 0.1)

    first, second = optimizer(), optimizer()
    first.param_groups[0]["params"][0].grad = torch.ones(2, 2)  # the bias has none
    first.step()
    saved = first.state_dict()
    load_optimizer_state(second, saved)
    assert saved["state"].keys() == second.state_dict()["state"].keys()
    del saved["state"][0]["exp_avg" if name == "adam" else "momentum_buffer"]
    with pytest.raises(ValueError, match="not complete"):
        load_optimizer_state(second, saved)


def test_the_average_of_the_weights_follows_its_formula_statistics_too():
    model, generator = net(), torch.Generator().manual_seed(0)
    average = WeightAverage(model, 0.8)
    expected = {key: value.double() for key, value in model.state_dict().items() if value.is_floating_point()}
    for step in range(60):
        decay = min(0.8, (1 + step) / (10 + step))
        for key in expected:
            value = model.state_dict()[key].copy_(torch.randn(expected[key].shape, generator=generator))
            expected[key] = decay * expected[key] + (1 - decay) * value.double()
        average.update(step)
    assert any("running_" in key for key in expected)
    for key, value in expected.items():
        torch.testing.assert_close(average.model.state_dict()[key].double(), value, rtol=1e-4, atol=1e-5)
    assert not average.model.training
    assert not any(parameter.requires_grad for parameter in average.model.parameters())

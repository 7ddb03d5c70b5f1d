"""Optimizers, learning rates, early stopping and the average of weights, against torch's own and against tables."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from densenet_dist.config import load_config
from densenet_dist.model import DenseNet, densenet
from densenet_dist.schedules import SCHEDULES, settings_of
from densenet_dist.schema import OptimizerConfig, ScheduleConfig
from densenet_dist.train.checkpoint import load_weights
from densenet_dist.train.optim import Course, Patience, Schedule, WeightAverage, build_optimizer

STEPS_PER_EPOCH = 7


def net() -> DenseNet:
    torch.manual_seed(0)
    return densenet("densenet_bc", num_classes=10, growth_rate=4, num_layers=2)


def course(*settings: str, epochs: int = 20) -> Course:
    config = load_config(f"train.epochs={epochs}", *(f"train.{setting}" for setting in settings))
    return Course.build(config.train, STEPS_PER_EPOCH)


def rates(epochs: int, lr: float = 0.5, steps_per_epoch: int = STEPS_PER_EPOCH, **options: Any) -> list[float]:
    schedule = Schedule(ScheduleConfig(**options), lr, steps_per_epoch, epochs)
    return [schedule(step) for step in range(epochs * steps_per_epoch)]


def torch_rates(make: Callable[[torch.optim.Optimizer], Any], steps: int, lr: float = 0.5) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, seen = make(optimizer), []
    for step in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        if step < steps - 1:
            optimizer.step()
            scheduler.step()
    return seen


# Schedules


def test_constant():
    assert rates(3, name="constant") == [0.5] * 21


def test_multistep_is_torchs():
    def make(optimizer):
        return lr_scheduler.MultiStepLR(optimizer, [STEPS_PER_EPOCH * epoch for epoch in (3, 4, 8)], gamma=0.3)

    ours = rates(10, name="multistep", milestones=(3, 4, 8), gamma=0.3)
    assert ours == pytest.approx(torch_rates(make, 70), rel=1e-12)


def test_multistep_with_its_defaults_is_the_notebooks_step_function():
    ours = rates(100, lr=1e-3, name="multistep")
    table = [1e-3] * 50 + [1e-4] * 25 + [1e-5] * 25
    for epoch, rate in enumerate(table):
        of_epoch = ours[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]
        assert of_epoch == pytest.approx([rate] * STEPS_PER_EPOCH, rel=1e-12), epoch


def test_a_milestone_may_lie_within_an_epoch():
    assert rates(1, lr=1.0, steps_per_epoch=4, name="multistep", milestones=(0.5,)) == [1.0, 1.0, 0.1, 0.1]
    assert rates(1, lr=1.0, steps_per_epoch=4, name="multistep", milestones=(0.6,)) == [1.0, 1.0, 1.0, 0.1]


@pytest.mark.parametrize("final_lr", [0.0, 0.01])
def test_cosine_is_torchs(final_lr):
    def make(optimizer):
        return lr_scheduler.CosineAnnealingLR(optimizer, 70, eta_min=final_lr)

    ours = rates(10, name="cosine", final_lr=final_lr)
    assert ours == pytest.approx(torch_rates(make, 70), rel=1e-9)


@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("pct_start", [0.3, 0.25, 0.71])
@pytest.mark.parametrize("epochs", [1, 2, 10])
def test_one_cycle_is_torchs(anneal, pct_start, epochs):
    def make(optimizer):
        return lr_scheduler.OneCycleLR(
            optimizer,
            0.5,
            total_steps=epochs * STEPS_PER_EPOCH,
            pct_start=pct_start,
            anneal_strategy=anneal,
            cycle_momentum=False,
            div_factor=20,
            final_div_factor=100,
        )

    ours = rates(epochs, name="one_cycle", anneal=anneal, pct_start=pct_start, div_factor=20, final_div_factor=100)
    assert ours == pytest.approx(torch_rates(make, epochs * STEPS_PER_EPOCH), rel=1e-9)


@pytest.mark.parametrize("pct_start", [0.01, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("anneal", ["cos", "linear"])
def test_one_cycle_of_few_steps_stays_within_its_bounds(pct_start, anneal):
    for steps in range(1, 13):
        ours = rates(1, steps_per_epoch=steps, name="one_cycle", pct_start=pct_start, anneal=anneal)
        last = 0.5 / 25 / 1e4
        assert all(last * 0.999 <= rate <= 0.5 for rate in ours)
        assert ours[-1] == pytest.approx(last)


@pytest.mark.parametrize("warmup_start", [0.1, 0.0])
def test_warmup_is_torchs_linear_one_step_ahead_and_then_the_course_follows(warmup_start):
    # torch starts at the start factor itself and reaches 1 after the last warm-up step, ours in it. For 0, torch
    # refuses: a table instead.
    warm = 2 * STEPS_PER_EPOCH
    ours = rates(10, name="cosine", warmup_epochs=2, warmup_start=warmup_start)
    if warmup_start:
        linear = torch_rates(lambda optimizer: lr_scheduler.LinearLR(optimizer, warmup_start, 1.0, warm), warm + 1)[1:]
    else:
        linear = [0.5 * step / warm for step in range(1, warm + 1)]
    cosine = torch_rates(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 70 - warm), 70 - warm)
    assert ours == pytest.approx(linear + cosine, rel=1e-9)


def test_warmup_leaves_the_milestones_where_they_are():
    ours = rates(6, lr=1.0, steps_per_epoch=1, name="multistep", milestones=(3, 5), warmup_epochs=2)
    assert ours == pytest.approx([0.5, 1.0, 1.0, 0.1, 0.1, 0.01])


def test_warmup_may_be_a_part_of_an_epoch():
    assert rates(1, lr=1.0, steps_per_epoch=4, name="constant", warmup_epochs=0.3) == [0.5, 1.0, 1.0, 1.0]
    assert rates(1, lr=1.0, steps_per_epoch=4, name="cosine", warmup_epochs=0.75)[2:] == [1.0, 1.0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_of_one_step_has_a_rate(name):
    (rate,) = rates(1, steps_per_epoch=1, name=name)
    assert 0 < rate <= 0.5


# Plateau and early stopping


# Keras 3, ReduceLROnPlateau(factor=0.1, patience=5, min_delta=0.01): each epoch's loss and the rate after it. Counted
# by hand: an improvement is a loss below best - 0.01, and the fifth epoch in a row without one reduces at once.
KERAS = [
    (1.000, 1e-0),  # best
    (0.995, 1e-0),  # 1
    (0.990, 1e-0),  # 2: exactly min_delta lower is no improvement
    (1.200, 1e-0),  # 3
    (0.991, 1e-0),  # 4
    (0.9901, 1e-1),  # 5: reduced, count starts anew
    (0.990, 1e-1),  # 1: the best is still 1.000
    (0.980, 1e-1),  # best
    (0.975, 1e-1),  # 1
    (0.975, 1e-1),  # 2
    (0.975, 1e-1),  # 3
    (0.975, 1e-1),  # 4
    (0.960, 1e-1),  # best, just in time
    (0.970, 1e-1),  # 1
    (0.970, 1e-1),  # 2
    (0.970, 1e-1),  # 3
    (0.970, 1e-1),  # 4
    (0.970, 1e-2),  # 5: reduced
    (0.970, 1e-2),  # 1
    (0.970, 1e-2),  # 2
    (0.970, 1e-2),  # 3
    (0.970, 1e-2),  # 4
    (0.970, 1e-3),  # 5: reduced
]


def test_plateau_follows_keras_to_the_epoch():
    plateau = course("schedule.name=plateau", "lr=1.0")
    assert (plateau.schedule.config.factor, plateau.schedule.config.patience) == (0.1, 5)
    assert plateau.schedule.config.min_delta == 0.01
    for epoch, (loss, rate) in enumerate(KERAS, start=1):
        plateau.epoch_end(loss)
        assert plateau.lr(epoch * STEPS_PER_EPOCH) == pytest.approx(rate), epoch


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_plateau_is_torchs_with_one_more_epoch_of_patience(patience):
    losses = (
        1 + torch.rand(200, generator=torch.Generator().manual_seed(1)) * 0.2 - 0.002 * torch.arange(200)
    ).tolist()
    ours = course("schedule.name=plateau", "lr=1.0", "schedule.factor=0.9", f"schedule.patience={patience}")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.9, patience=patience - 1, threshold=0.01, threshold_mode="abs", eps=0
    )
    for epoch, loss in enumerate(losses):
        ours.epoch_end(loss)
        theirs.step(loss)
        assert ours.lr(0) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), epoch
    assert ours.lr(0) < 0.9**3  # it was at work


def test_plateau_stops_at_the_lowest_rate_but_a_warmup_may_be_below_it():
    settings = ("schedule.name=plateau", "lr=1.0", "schedule.patience=1", "schedule.min_lr=0.02")
    plateau = course(*settings, "schedule.warmup_epochs=10")
    assert plateau.lr(0) == pytest.approx(1 / 70)
    for expected in (1.0, 0.1, 0.02, 0.02):
        plateau.epoch_end(1.0)
        assert plateau.lr(19 * STEPS_PER_EPOCH) == pytest.approx(expected)


def test_other_schedules_know_no_plateau():
    constant = course("schedule.name=constant", "lr=1.0")
    for _ in range(20):
        constant.epoch_end(1.0)
    assert constant.lr(0) == 1.0
    assert not constant.stopped


@pytest.mark.parametrize(
    ("min_delta", "losses", "stops_after"),
    [
        (0.0, [3, 2, 1, 1, 1, 1], 6),  # equal is no improvement
        (0.0, [3, 2, 1, 2, 2, 0.9, 1, 1, 1], 9),
        (0.1, [3, 2.95, 2.92, 2.85, 9, 9, 9], 7),  # 2.85 < 3 - 0.1, just in time
        (0.1, [3, 2.95, 2.92, 2.91, 1], 4),
        (0.0, [3, 2, 1, 0], None),
        (0.0, [3, float("nan"), 4, 5], 4),
    ],
)
def test_early_stopping(min_delta, losses, stops_after):
    run = course("early_stopping.enabled=true", "early_stopping.patience=3", f"early_stopping.min_delta={min_delta}")
    stopped = None
    for epoch, loss in enumerate(losses, start=1):
        run.epoch_end(loss)
        if run.stopped:
            stopped = epoch
            break
    assert stopped == stops_after


def test_early_stopping_waits_ten_epochs_by_default():
    watch = course("early_stopping.enabled=true").early
    assert watch == Patience(10, 0.0)
    assert [watch.exhausted(1.0) for _ in range(12)] == [False] * 10 + [True, True]


def test_epochs_without_validation_count_for_nothing():
    run = course("schedule.name=plateau", "early_stopping.enabled=true", "early_stopping.patience=1")
    for _ in range(10):
        run.epoch_end(None)
    assert not run.stopped
    assert run.lr(0) == 0.1


def test_a_course_goes_on_from_its_saved_state():
    settings = (
        "schedule.name=plateau",
        "schedule.patience=2",
        "early_stopping.enabled=true",
        "early_stopping.patience=5",
        "lr=1.0",
    )
    losses = [1.0, 0.9, 0.95, 0.95, 0.8, 0.85, 0.85, 0.85, 0.85, 0.85]
    whole, expected = course(*settings), []
    for loss in losses:
        whole.epoch_end(loss)
        expected.append((whole.lr(0), whole.stopped))
    assert expected[-1][1]
    assert len({rate for rate, _ in expected}) >= 3
    for cut in range(len(losses) + 1):
        first = course(*settings)
        for loss in losses[:cut]:
            first.epoch_end(loss)
        stored = io.BytesIO()
        torch.save(first.state_dict(), stored)
        stored.seek(0)
        second = course(*settings)
        second.load_state_dict(torch.load(stored, weights_only=True))
        seen = [(second.lr(0), second.stopped)] if cut else []
        assert seen == expected[:cut][-1:]
        for loss, outcome in zip(losses[cut:], expected[cut:], strict=True):
            second.epoch_end(loss)
            assert (second.lr(0), second.stopped) == outcome


# Optimizers


PLAIN = {
    "sgd": lambda params: torch.optim.SGD(
        params, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01, foreach=False, fused=False
    ),
    "adam": lambda params: torch.optim.Adam(
        params, lr=0.1, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.01, foreach=False, fused=False
    ),
    "adamw": lambda params: torch.optim.AdamW(
        params, lr=0.1, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.01, foreach=False, fused=False
    ),
}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_updates_are_those_of_plain_torch(name):
    config = OptimizerConfig(name=name, momentum=0.8, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.01, decay="all")
    ours, theirs = net(), net()
    optimizers = build_optimizer(ours, config, 0.1), PLAIN[name](theirs.parameters())
    start = copy.deepcopy(ours.state_dict())
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            # In the parameter's own memory format, as backward makes it: the fused kernels look at nothing else.
            mine.grad = torch.empty_like(mine).copy_(torch.randn(mine.shape, generator=generator))
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        assert not torch.equal(mine, start[key])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_batchnorm_and_biases_are_spared_the_decay(name):
    model = net()
    optimizer = build_optimizer(model, OptimizerConfig(name=name, weight_decay=0.01), 0.1)
    names = {parameter: key for key, parameter in model.named_parameters()}
    by_decay = {group["weight_decay"]: {names[p] for p in group["params"]} for group in optimizer.param_groups}
    spared = {key for key in names.values() if "norm" in key or key.endswith("bias")}
    assert by_decay == {0.01: set(names.values()) - spared, 0.0: spared}
    assert {"classifier.weight", "features.conv0.weight"} <= by_decay[0.01]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {key: parameter.detach().clone() for parameter, key in names.items()}
    optimizer.step()
    moved = {key for parameter, key in names.items() if not torch.equal(parameter, before[key])}
    assert moved == by_decay[0.01]


def test_all_may_decay():
    model = net()
    (group,) = build_optimizer(model, OptimizerConfig(weight_decay=0.01, decay="all"), 0.1).param_groups
    assert group["weight_decay"] == 0.01
    assert len(group["params"]) == len(list(model.parameters()))


def test_what_takes_no_gradient_is_left_out():
    model = net()
    model.classifier.weight.requires_grad_(False)
    groups = build_optimizer(model, OptimizerConfig(), 0.1).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) - 1


# The average of weights


def scramble(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def test_the_average_is_the_sum_of_what_it_has_seen_weighted_by_its_decay():
    model = net()
    average = WeightAverage(model, 0.8)
    seen = [copy.deepcopy(model.state_dict())]
    for step in range(60):
        scramble(model, step)
        seen.append(copy.deepcopy(model.state_dict()))
        average.update(step)
    decays = [min(0.8, (1 + step) / (10 + step)) for step in range(60)]
    assert decays[34] < 0.8 == decays[35]
    shares = [1.0, *(1 - decay for decay in decays)]
    weights = [share * math.prod(decays[number:]) for number, share in enumerate(shares)]
    assert sum(weights) == pytest.approx(1)
    for key, value in average.model.state_dict().items():
        if value.is_floating_point():
            expected = sum(weight * state[key].double() for weight, state in zip(weights, seen, strict=True))
            torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
            if "running_" in key:  # statistics are averaged too
                assert not torch.equal(value, seen[0][key])


def test_the_average_is_a_model_of_its_own_that_takes_no_gradient():
    model = net()
    average = WeightAverage(model, 0.5)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert not average.model.training
    assert not {t.data_ptr() for t in model.state_dict().values()} & {
        t.data_ptr() for t in average.model.state_dict().values()
    }


def test_the_average_goes_on_after_a_restore():
    def walk(model, average, steps):
        for step in steps:
            scramble(model, step)
            average.update(step)

    whole = net()
    expected = WeightAverage(whole, 0.9)
    walk(whole, expected, range(10))

    model = net()
    first = WeightAverage(model, 0.9)
    walk(model, first, range(5))
    saved, saved_average = copy.deepcopy(model.state_dict()), copy.deepcopy(first.model.state_dict())

    other = net()
    second = WeightAverage(other, 0.9)
    load_weights(other, saved, "model")
    load_weights(second.model, saved_average, "average")
    walk(other, second, range(5, 10))
    for key, value in second.model.state_dict().items():
        assert torch.equal(value, expected.model.state_dict()[key]), key


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_takes_settings_that_there_are(name):
    assert set(settings_of(SCHEDULES[name], ScheduleConfig())) <= set(vars(ScheduleConfig()))

"""The page of a sweep."""

from __future__ import annotations

import math
import random

import matplotlib
import pytest
from html_page import Page

from densenet_dist.run_folder import RunFolder
from densenet_dist.sweep.definition import load_sweep
from densenet_dist.sweep.page import importance, write_page
from densenet_dist.sweep.results import Trial
from densenet_dist.sweep.space import sample

SPACE = {
    "model.growth_rate": "[8, 12, 16]",
    "model.num_layers": "[[2, 2], [4, 4, 4]]",
    "model.drop_rate": "{uniform: [0, 0.3]}",
    "train.lr": "{loguniform: [0.001, 1]}",
    "data.trivial_augment": "[true, false]",
    "train.schedule.name": "[one_cycle, cosine, constant]",
}
PLOTS = ["Metric against epoch", "Metric against each key", "Importance of each key"]


def sweep_of(*settings, space=SPACE):
    return load_sweep(*(f"space.{key}={domain}" for key, domain in space.items()), "name=wide", *settings)


def trial_of(number, overrides, history=(), status="finished", maximize=True):
    """A trial as its record would have it, from its metric after each epoch."""
    trial = Trial(f"trial-{number:03d}", overrides, status, parameters=10_000 + number)
    trial.epochs, trial.seconds = len(history), 2.5 * len(history)
    trial.history = dict(enumerate(history, 1))
    if trial.history:
        trial.best_epoch = (max if maximize else min)(trial.history, key=trial.history.get)
        trial.metric = trial.history[trial.best_epoch]
    return trial


def trials_of(sweep, count, epochs=4):
    """Trials whose metric the learning rate alone decides."""
    rng, maximize = random.Random(0), sweep.settings.maximize
    found = []
    for number in range(count):
        overrides = sample(sweep.space, rng)
        distance = abs(math.log10(overrides.get("train.lr", rng.uniform(0.001, 1)) / 0.1))
        history = [0.9 - 0.2 * distance - 0.3 / epoch for epoch in range(1, epochs + 1)]
        history = history if maximize else [2 - value for value in history]
        found.append(trial_of(number, overrides, history, maximize=maximize))
    return found


@pytest.fixture
def write(tmp_path):
    folder = RunFolder(str(tmp_path), "wide")
    folder.create()

    def write_and_read(sweep, trials):
        write_page(folder, sweep, trials)
        return Page((folder.path / "sweep.html").read_text(encoding="utf-8"))

    return write_and_read


def test_shows_the_best_trial_and_all_others(write, tmp_path):
    sweep = sweep_of("trials=8", "scheduler.reduction_factor=4")
    trials = trials_of(sweep, 6)
    trials[1].status = "stopped"
    trials[2].metric, trials[2].best_epoch, trials[2].history = None, None, {}
    trials[3].status, trials[3].error, trials[3].metric = "failed", "out of memory", 0.999  # before it failed
    trials[0].metrics = {"test/top1": 0.765}
    page = write(sweep, trials)
    ranked = sorted((trials[i] for i in (0, 1, 4, 5)), key=lambda trial: -trial.metric)
    best = ranked[0]
    assert f"{best.name}: {best.metric * 100:.2f}\xa0%" in page.shown
    assert "6 of 8: 4 finished, 1 stopped, 1 failed" in page.shown
    assert f"densenet-dist tune --resume {tmp_path}/wide" in page.shown  # two were never started
    assert page.titles == ["All trials", *PLOTS]
    assert page.tags["svg"] == len(PLOTS)
    assert "Left out: 2 trials that failed" in page.shown
    _, *rows = page.rows
    names = [trial.name for trial in [*ranked, trials[2], trials[3]]]
    assert [row[0].removeprefix("★ ") for row in rows] == names
    assert rows[0][2:4] == [f"{best.metric * 100:.2f}", "4 of 4"]
    assert rows[names.index("trial-000")][-4:] == ["10,000", "10.0", "76.50", ""]
    assert rows[-1][-1] == "out of memory"


def test_needs_nothing_else_and_is_the_same_whatever_matplotlib_is_set_to(write, capfd):
    sweep = sweep_of()
    trials = trials_of(sweep, 6)
    first = write(sweep, trials)
    assert first.needs_nothing_else()
    assert "default-src 'none'" in first.text
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert write(sweep, trials).text == first.text
    assert capfd.readouterr() == ("", "")


def test_text_is_escaped(write):
    nasty = '</td><script>alert("x")</script> & \x00\x1b[31m \udc80 $\\frac$ ' + "long " * 2000
    sweep = sweep_of(space={"train.lr": SPACE["train.lr"], "data.root": r'["$x^{$ <b>", "a\tb", "漢字"]'})
    trials = trials_of(sweep, 5)
    for trial, error in zip(trials[:4], (nasty, f"first line\n{nasty}", "", "<b>"), strict=True):
        trial.status, trial.error = "failed", error
    trials[1].overrides["data.root"] = "<i>$x^{$</i>\n"  # a failed trial, whose values are not drawn
    page = write(sweep, trials)
    assert page.is_harmless()
    assert not {"b", "i"} & set(page.tags)
    assert not {"\x00", "\x1b"} & set(page.text)
    assert "<i>$x^{$</i>" in {cell.strip() for row in page.rows for cell in row}
    assert "漢字" in page.shown
    errors = [row[-1] for row in page.rows[1:]]
    assert sum('<script>alert("x")' in error for error in errors) == 2
    assert max(map(len, errors)) < 2500


def test_few_trials_or_none(write):
    sweep = sweep_of("trials=8")
    page = write(sweep, [])
    assert "0 of 8" in page.shown
    assert "None: no trial" in page.shown
    assert "best.yaml" not in page.text
    assert page.tags["svg"] == 0
    assert page.shown.count("Not shown") == len(PLOTS)
    page = write(sweep, trials_of(sweep, 1, epochs=1))
    assert page.tags["svg"] == len(PLOTS) - 1
    failed = [trial_of(i, trial.overrides, (0.3, 0.4), "failed") for i, trial in enumerate(trials_of(sweep, 5))]
    page = write(sweep, failed)
    assert "None: no trial" in page.shown
    assert page.tags["svg"] == 1  # the curves


def test_values_that_cannot_be_drawn(write):
    sweep = sweep_of("metric=val/loss")
    trials = trials_of(sweep, 10)
    trials[2].parameters, trials[2].seconds = None, 0.0
    trials[3].history = {}
    trials[4].overrides, trials[4].status = {}, "failed"  # its trial.json is damaged
    trials[7] = trial_of(7, trials[7].overrides, (3.0, 4e9, 1e30), "stopped", maximize=False)
    page = write(sweep, trials)
    assert not {"nan", "inf"} & {cell.strip() for row in page.rows for cell in row}
    assert ' d="nan' not in page.text
    assert page.tags["svg"] == len(PLOTS)
    assert "are beyond the upper edge" in page.shown
    assert "lowest is best" in page.shown


@pytest.mark.parametrize("mode", ["max", "min"])
def test_importance_finds_what_decides(mode):
    sweep = sweep_of(f"mode={mode}")
    shares = importance(sweep, trials_of(sweep, 60))
    assert shares["train.lr"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)

"""The page of a sweep."""

from __future__ import annotations

import logging
import math
import random
import re
from html.parser import HTMLParser

import matplotlib
import pytest

from densenet_dist.run_folder import RunFolder
from densenet_dist.sweep.definition import load_sweep
from densenet_dist.sweep.importance import importance
from densenet_dist.sweep.page import write_page
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
VOID = {"meta", "br", "hr", "img", "input", "link"}
PLOTS = ["Metric against epoch and time", "Settings and metric", "Importance of each key"]


class Page(HTMLParser):
    """A page whose tags are closed in the order in which they were opened."""

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.tags = text, [], []
        self.links, self.ids, self.rows, self.captions, self.titles = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.said = " ".join(self.captions)

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "tr":
            self.rows.append((dict(attrs), []))
        elif tag in ("td", "th"):
            self.rows[-1][1].append("")
        elif tag == "figcaption":
            self.captions.append("")
        elif tag == "h2":
            self.titles.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][1][-1] += data
        elif "figcaption" in self.open:
            self.captions[-1] += data
        elif "h2" in self.open:
            self.titles[-1] += data


def sweep_of(*settings, space=SPACE):
    return load_sweep(*(f"space.{key}={domain}" for key, domain in space.items()), "name=wide", *settings)


def trial_of(number, overrides, history=(), status="finished", maximise=True, **more):
    """A trial as its record would have it, from its metric after each epoch."""
    trial = Trial(f"trial-{number:03d}", overrides, status, parameters=10_000 + number, **more)
    trial.epochs, trial.seconds = len(history), 2.5 * len(history)
    trial.history = dict(enumerate(history, 1))
    if trial.history:
        trial.best_epoch = (max if maximise else min)(trial.history, key=trial.history.get)
        trial.metric = trial.history[trial.best_epoch]
    return trial


def trials_of(sweep, count, epochs=4, seed=0):
    """Trials whose metric the learning rate alone decides."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        overrides = sample(sweep.space, rng)
        distance = abs(math.log10(overrides.get("train.lr", rng.uniform(0.001, 1)) / 0.1))
        history = [0.9 - 0.2 * distance - 0.3 / epoch for epoch in range(1, epochs + 1)]
        if not sweep.settings.maximise:
            history = [2 - value for value in history]
        found.append(trial_of(number, overrides, history, maximise=sweep.settings.maximise))
    return found


@pytest.fixture
def write(tmp_path):
    folder = RunFolder(str(tmp_path), "wide")
    folder.create()

    def write_and_read(sweep, trials):
        write_page(folder, sweep, trials)
        return Page((folder.path / "sweep.html").read_text(encoding="utf-8"))

    return write_and_read


def test_says_what_came_out(write, tmp_path):
    sweep = sweep_of("trials=8", "scheduler.reduction_factor=4")
    trials = trials_of(sweep, 6)
    trials[1].status = "stopped"
    trials[2].status, trials[2].cause = "failed", "the loss is NaN"
    trials[0].figures = {"test/top1": 0.765}
    best = max((trial for trial in trials if trial.status != "failed"), key=lambda trial: trial.metric)
    page = write(sweep, trials)
    assert "6 of 8: 4 finished, 1 stopped, 1 failed" in page.text
    assert "val/top1 of each trial's best epoch; highest is best" in page.text
    assert "one of 4 continues" in page.text
    assert f"{best.name}: {best.metric:.2%}".replace("%", "\xa0%") in page.text
    assert f"densenet-dist train {tmp_path}/wide/best.yaml" in page.text
    assert f"densenet-dist tune --resume {tmp_path}/wide" in page.text  # two were never started
    assert "reduction_factor: 4" in page.text  # the settings
    assert page.titles == ["All trials", *PLOTS, "Accuracy and cost against growth rate"]
    assert page.tags.count("svg") == 2 + 1 + 1 + 3
    assert "Left out: 1 trial that failed or never had a figure." in page.said


def test_table(write):
    sweep = sweep_of()
    trials = trials_of(sweep, 5)
    trials[3].status, trials[3].cause = "failed", "out of memory"
    trials[3].metric = 0.999  # before it failed
    trials[2].metric, trials[2].best_epoch, trials[2].history = None, None, {}
    trials[0].figures = {"test/top1": 0.765}
    page = write(sweep, trials)
    (_, heads), *rows = page.rows
    assert heads[:4] == ["trial", "status", "val/top1 (%)", "best epoch"]
    assert heads[-4:] == ["parameters", "seconds", "test top-1 (%)", "cause of failure"]
    assert len({len(cells) for _, cells in page.rows}) == 1
    judged = sorted((trials[i] for i in (0, 1, 4)), key=lambda trial: -trial.metric)
    names = [trial.name for trial in [*judged, trials[2], trials[3]]]
    assert [cells[0].removeprefix("★ ") for _, cells in rows] == names
    assert [attrs.get("class") for attrs, _ in rows] == ["best", None, None, None, None]
    assert rows[0][1][0].startswith("★")
    assert rows[0][1][2:4] == [f"{judged[0].metric * 100:.2f}", "4 of 4"]
    assert rows[names.index("trial-000")][1][-4:] == ["10,000", "10.0", "76.50", ""]
    assert rows[-1][1][-1] == "out of memory"
    assert rows[-2][1][2:4] == ["", ""]


def test_nothing_from_outside(write):
    sweep = sweep_of()
    page = write(sweep, trials_of(sweep, 6))
    assert "http" not in page.text.lower().replace("http-equiv", "")
    assert page.links  # signs within pictures
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert set(re.findall(r"url\((.*?)\)", page.text)) <= {f"#{name}" for name in page.ids}
    assert len(page.ids) == len(set(page.ids))
    assert "default-src 'none'" in page.text
    variables = set(re.findall(r"var\((--\w+)\)", page.text))
    assert variables <= set(re.findall(r"(--\w+):", page.text))


def test_text_is_escaped(write):
    nasty = '</td><script>alert("x")</script> & \x00\x1b[31m \udc80 $\\frac$ ' + "long " * 2000
    sweep = sweep_of(space={**SPACE, "train.schedule.name": "[one_cycle, cosine]"})
    trials = trials_of(sweep, 5)
    for trial, cause in zip(trials, (nasty, f"first line\n{nasty}", None, "", "<b>"), strict=True):
        trial.status, trial.cause = "failed", cause
    trials[1].overrides["train.schedule.name"] = "<i>$x^{$</i>\n"
    page = write(sweep, trials)
    assert "<b>" not in page.text
    assert page.tags.count("script") == 1
    assert "\x00" not in page.text
    assert "\x1b" not in page.text
    causes = [cells[-1] for _, cells in page.rows[1:]]
    assert sum('<script>alert("x")' in cause for cause in causes) == 2
    assert max(map(len, causes)) < 2500


def test_choices_may_hold_anything(write):
    sweep = sweep_of(space={"data.root": r'["$x^{$ <b>", "a\tb", "漢字", "a very long name of a folder"]'})
    page = write(sweep, trials_of(sweep, 8))
    assert "<b>" not in page.text
    assert "$x^{$ &lt;b&gt;" in page.text
    assert "漢字" in page.text
    assert "no searched key is a number" in page.said


def test_same_bytes(write):
    sweep = sweep_of()
    trials = trials_of(sweep, 6)
    first = write(sweep, trials)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert write(sweep, trials).text == first.text
        assert matplotlib.rcParams["font.size"] == 30


def test_leaves_the_process_as_it_was(write, capfd):
    import optuna
    from matplotlib import pyplot as plt

    sweep = sweep_of()
    optuna.logging.set_verbosity(logging.INFO)
    before = dict(matplotlib.rcParams)
    write(sweep, trials_of(sweep, 6))
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []
    assert optuna.logging.get_verbosity() == logging.INFO
    assert capfd.readouterr() == ("", "")


def test_no_trials(write):
    page = write(sweep_of("trials=8"), [])
    assert "0 of 8" in page.text
    assert "None: no trial" in page.text
    assert "best.yaml" not in page.text
    assert page.tags.count("svg") == 0
    assert page.said.count("Not shown") == 4


def test_one_trial_of_one_epoch(write):
    sweep = sweep_of()
    page = write(sweep, trials_of(sweep, 1, epochs=1))
    assert page.tags.count("svg") == 2 + 1 + 3
    assert "It needs 4 trials with a figure, and there are 1." in page.said


@pytest.mark.parametrize("history", [(), (0.3, 0.4)])
def test_all_failed(write, history):
    sweep = sweep_of()
    trials = [trial_of(i, trial.overrides, history, "failed") for i, trial in enumerate(trials_of(sweep, 5))]
    page = write(sweep, trials)
    assert "None: no trial" in page.text
    assert page.tags.count("svg") == (2 if history else 0)
    assert page.said.count("Not shown") == (3 if history else 4)


def test_figures_that_are_none(write):
    sweep = sweep_of("metric=val/loss")
    trials = trials_of(sweep, 8)
    trials[0].metric = trials[0].history[2] = math.nan
    trials[1].history = {1: math.inf}
    trials[2].parameters, trials[2].seconds = None, 0.0
    trials[3].history = {}
    trials[4].overrides = {}
    trials[5].overrides["train.lr"] = 7.0  # not of the space any more
    trials[6].overrides["model.num_layers"] = None
    page = write(sweep, trials)
    assert ">nan<" not in page.text
    assert ">inf<" not in page.text
    assert not re.search(r'="[^"]*\bnan\b', page.text)
    assert page.tags.count("svg") == 2 + 1 + 1 + 3


@pytest.mark.parametrize("domain", ["{integer: [8, 40]}", "{loginteger: [8, 400]}", "[8, 800]"])
@pytest.mark.parametrize("metric", ["val/top1", "val/loss"])
def test_one_key(write, domain, metric):
    sweep = sweep_of(f"metric={metric}", space={"model.growth_rate": domain})
    page = write(sweep, trials_of(sweep, 6))
    assert page.tags.count("svg") == 2 + 1 + 1 + 3
    assert ("lowest" if metric == "val/loss" else "highest") + " is best" in page.text


def test_losses_that_exploded(write):
    sweep = sweep_of("metric=val/loss")
    trials = trials_of(sweep, 6)
    trials[0] = trial_of(0, trials[0].overrides, (3.0, 4e9, 1e30), "stopped", maximise=False)
    trials[1] = trial_of(1, trials[1].overrides, (5e20,), "stopped", maximise=False)
    page = write(sweep, trials)
    assert "are beyond the upper edge" in page.said
    assert "It is the logarithm of val/loss that is explained." in page.said


def test_without_growth_rate_the_most_important_key(write):
    space = {key: SPACE[key] for key in ("data.trivial_augment", "model.drop_rate", "train.lr")}
    sweep = sweep_of(space=space)
    page = write(sweep, trials_of(sweep, 30))
    assert page.titles[-1] == "Metric against train.lr"
    assert "Shown is the most important key that is a number" in page.said
    assert page.tags.count("svg") == 2 + 1 + 1 + 1


def test_population_based_training(write):
    sweep = sweep_of("scheduler.name=pbt", space={key: SPACE[key] for key in ("model.drop_rate", "train.lr")})
    trials = trials_of(sweep, 8)
    best = max(trials, key=lambda trial: trial.metric)
    best.origin = "trial-000"
    page = write(sweep, trials)
    assert "Population based training changes" in page.said
    assert "these are the last ones" in page.said
    assert "its weights came from trial-000" in page.text


@pytest.mark.parametrize("mode", ["max", "min"])
def test_importance_finds_what_decides(mode):
    sweep = sweep_of(f"mode={mode}")
    found = importance(sweep, trials_of(sweep, 60))
    assert found.reason is None
    assert found.trials == 60
    key, share = next(iter(found.shares.items()))
    assert key == "train.lr"
    assert share > 0.8
    assert 0 <= sum(found.shares.values()) - share < 0.1


def test_importance_of_a_choice():
    sweep = sweep_of()
    trials = trials_of(sweep, 60)
    for trial in trials:
        trial.metric = 0.5 + 0.1 * len(trial.overrides["model.num_layers"])
    assert importance(sweep, trials).shares["model.num_layers"] > 0.99


def test_importance_weighs_a_logarithmic_range_as_it_was_drawn():
    sweep = sweep_of(space={"train.lr": "{loguniform: [0.0001, 1]}", "model.drop_rate": "{uniform: [0, 0.3]}"})
    rng = random.Random(0)
    trials = [trial_of(i, sample(sweep.space, rng), [0.0]) for i in range(120)]
    for trial in trials:  # half of all drawn are below; measured by its values, that is 1 % of the range
        trial.metric = (trial.overrides["train.lr"] < 0.01) + 0.5 * (trial.overrides["model.drop_rate"] < 0.15)
    shares = importance(sweep, trials).shares
    assert shares["train.lr"] == pytest.approx(0.8, abs=0.06)
    assert shares["model.drop_rate"] == pytest.approx(0.2, abs=0.06)


def test_importance_says_why_not():
    sweep = sweep_of()
    trials = trials_of(sweep, 6)
    assert "needs 4 trials" in importance(sweep, trials[:3]).reason
    assert (
        "same settings" in importance(sweep, [Trial("t", trials[0].overrides, metric=i / 10) for i in range(5)]).reason
    )
    for trial in trials:
        trial.metric = 0.5
    assert "same figure" in importance(sweep, trials).reason


def test_five_hundred_trials(write):
    sweep = sweep_of("trials=500")
    trials = trials_of(sweep, 500, epochs=100)
    for trial in trials[::10]:
        trial.status, trial.cause = "failed", "a long story\n" * 1000
    page = write(sweep, trials)
    assert len(page.rows) == 501
    assert len(page.text.encode()) < 3_000_000
    assert "One epoch in" in page.said

"""``densenet-dist bench time-to-accuracy``: it trains as training does, and goes on where it was."""

import json
from pathlib import Path

import pytest
from runs import tiny, train

from densenet_dist.bench.accuracy_report import print_table
from densenet_dist.bench.time_to_accuracy import summary
from densenet_dist.cli import main
from densenet_dist.config import to_yaml

SETTINGS = ("train.epochs=3", "data.val_fraction=0", "train.ema_decay=0.5", "train.lr=0.05", "cluster.device=cpu")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(tiny(tmp_path, *SETTINGS)))
    return path


def bench(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "time-to-accuracy", *map(str, arguments)])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_it_trains_as_training_does_and_goes_on_with_other_seeds(tmp_path, config_file, capsys):
    out, plot = tmp_path / "found.json", tmp_path / "found.png"
    assert bench(config_file, "--targets", "1,100", "--seeds", 1, "--out", out) == 0
    (first,) = json.loads(out.read_text())["runs"]
    assert bench(config_file, "--targets", "1,100", "--seeds", 2, "--out", out, "--plot", plot) == 0
    found = json.loads(out.read_text())
    assert found["runs"][0] == first
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    for run in found["runs"]:
        trained = train(tiny(tmp_path / str(run["seed"]), *SETTINGS, f"seed={run['seed']}"))
        last = run["epochs"][-1]
        assert {key: last[key] for key in ("test/loss", "test/top1")} == {
            key: trained[key] for key in ("test/loss", "test/top1")
        }
        seconds = [epoch["seconds"] for epoch in run["epochs"]]
        assert 0 < seconds[0] < seconds[1] < seconds[2] < run["wall_s"]
    one, all_of_them = found["summary"]["targets"]
    assert (one["seeds"], all_of_them["seeds"]) == (2, 0)
    assert "seconds" not in all_of_them
    shown = capsys.readouterr().out
    assert "2 of 2" in shown
    assert f"{one['seconds']['mean']:.2f} +- {one['seconds']['half']:.2f}" in shown
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_seed_that_would_take_too_long_is_not_begun(tmp_path, config_file, capsys):
    out = tmp_path / "found.json"
    assert bench(config_file, "--seeds", 1, "--out", out) == 0
    found = json.loads(out.read_text())
    found["runs"][0]["wall_s"] = 1e6
    out.write_text(json.dumps(found))
    assert bench(config_file, "--seeds", 3, "--minutes", 9, "--out", out) == 0
    assert "1 of 3 seeds; the same command goes on with the others" in capsys.readouterr().out
    assert [run["seed"] for run in json.loads(out.read_text())["runs"]] == [0]


def test_an_outcome_of_another_configuration_is_kept(tmp_path, config_file, capsys):
    out = tmp_path / "found.json"
    assert bench(config_file, "--seeds", 1, "--out", out) == 0
    before = out.read_text()
    assert bench(config_file, "train.lr=0.1", "--seeds", 1, "--out", out) == 2
    assert "train.lr: 0.05 there, 0.1 here" in capsys.readouterr().err
    assert out.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train.early_stopping.enabled=true", "data.val_fraction=0.2"), "nothing is validated here"),
        (("train.schedule.name=plateau", "data.val_fraction=0.2"), "nothing is validated here"),
        (("--targets", "94 %"), "--targets: '94 %' are no percentages"),
        (("--targets", "0"), "are no percentages"),
        (("--targets", "101"), "are no percentages"),
        (("--plot", "x.txt"), "must end in .png"),
    ],
)
def test_what_cannot_be_is_refused(config_file, capsys, arguments, said):
    assert bench(config_file, *arguments) == 2
    assert said in capsys.readouterr().err


def test_means_are_of_the_seeds_that_reached_a_target(capsys):
    courses = {0: (0.5, 0.93, 0.95), 1: (0.6, 0.9, 0.93), 2: (0.94, 0.92, 0.94)}
    runs = [
        {
            "seed": seed,
            "epochs": [
                {"epoch": number, "seconds": 10.0 * number, "test/top1": top1, "test/top5": 1.0}
                for number, top1 in enumerate(course, start=1)
            ],
        }
        for seed, course in courses.items()
    ]
    found = summary(runs, (0.93, 0.945))
    low, high = found["targets"]
    assert (low["seeds"], low["seconds"]["mean"], low["epochs"]["mean"]) == (3, 20.0, 2.0)
    # Student's t of 2 degrees of freedom, 4.303, times 10 / sqrt(3)
    assert low["seconds"]["half"] == pytest.approx(24.84, abs=0.01)
    assert (high["seeds"], high["of"], high["seconds"]) == (1, 3, {"mean": 30.0, "half": None})
    assert found["last"]["test/top1"]["mean"] == pytest.approx(0.94)
    config = {"model.variant": "densenet", "data.name": "shapes", "train.epochs": 3}
    print_table({"runs": runs, "summary": found, "config": config, "environment": {"gpus": ["H"], "cpu": "C"}})
    shown = capsys.readouterr().out
    assert "20.00 +- 24.84" in shown
    assert "1 of 3" in shown
    assert "94.00 +- 2.48 % top-1" in shown

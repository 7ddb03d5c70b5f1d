"""``benchmarks/time_to_accuracy.py``."""

import json

import pytest
from runs import tiny, train

from densenet_dist.config import to_yaml
from densenet_dist.errors import ConfigError


def test_time_to_accuracy_trains_as_training_does_and_goes_on(tmp_path, script, capsys):
    settings = ("train.epochs=2", "data.val_fraction=0", "train.ema_decay=0.5", "train.lr=0.05", "cluster.device=cpu")
    config, out, plot = tmp_path / "tiny.yaml", tmp_path / "found.json", tmp_path / "found.png"
    config.write_text(to_yaml(tiny(tmp_path, *settings)))
    main = script("time_to_accuracy").main
    arguments = [str(config), "--targets", "1", "100", "--out", str(out), "--plot", str(plot), "--seeds"]
    main([*arguments, "1"])
    (first,) = json.loads(out.read_text())["runs"]
    main([*arguments, "2"])
    found = json.loads(out.read_text())
    assert found["runs"][0] == first
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    trained, last = train(tiny(tmp_path / "trained", *settings, "seed=1")), found["runs"][1]["epochs"][-1]
    assert [last[key] for key in ("test/loss", "test/top1")] == [trained[key] for key in ("test/loss", "test/top1")]
    reached, missed = found["summary"]["targets"]
    assert (reached["seeds"], missed["seeds"]) == (2, 0)
    assert f"{reached['seconds']['mean']:.2f} +- {reached['seconds']['half']:.2f}" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"train\.lr: 0\.05 there, 0\.1 here"):
        main([*arguments, "1", "train.lr=0.1"])

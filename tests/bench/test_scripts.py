"""Scripts in ``benchmarks/``: time to accuracy, the first visit of a GPU, and the nets of other libraries."""

import json

import pytest
from runs import tiny, train

from densenet_dist.config import load_config, to_yaml
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
    found["runs"][0]["wall_s"] = 1e6
    out.write_text(json.dumps(found))
    main([*arguments, "3", "--minutes", "9"])
    assert "2 of 3 seeds; the same command goes on with the others" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"train\.lr: 0\.05 there, 0\.1 here"):
        main([*arguments, "1", "train.lr=0.1"])


def test_every_step_of_a_visit_can_be_given_and_is_taken_once(tmp_path, monkeypatch, script):
    visit, commands = script("visit"), []

    def run(self, command, seconds, output):
        commands.append(command)
        if "--seeds" in command:
            seeds = int(command[command.index("--seeds") + 1])
            (self.runs / f"{output.stem}.json").write_text(json.dumps({"runs": [{}] * seeds, "summary": None}))
        return 0

    monkeypatch.setattr(visit.Visit, "_run", run)
    monkeypatch.chdir(visit.ROOT)
    for _ in range(2):
        assert visit.Visit(tmp_path / "out", tmp_path / "runs", "CIFAR", small=False).go_on(600, [])
        assert len(commands) == len(visit.STEPS)
    for command in commands:
        load_config(*(word for word in command if word.startswith("configs/") or ("=" in word and word[0] != "-")))
    assert "| notebook10 |" in visit.table(tmp_path / "out")


def test_torchvisions_net_is_ours_and_another_one_is_refused(script):
    peer_nets = script("peer_nets")
    net = peer_nets.NETS["densenet121"]._replace(image_size=32)
    assert max(peer_nets.check_same(net, "torchvision", "fused").values()) <= 1e-9
    with pytest.raises(peer_nets.DifferentNets, match=r"torchvision's net and ours differ in \d+ tensors"):
        peer_nets.check_same(peer_nets.NETS["notebook"], "torchvision")

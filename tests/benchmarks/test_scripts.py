"""Scripts in ``benchmarks/`` that measure loaders, models and training: their tables and files."""

import json

import pytest
import torch
from runs import tiny, train

from densenet_dist.config import to_yaml
from densenet_dist.errors import ConfigError

TINY = ["quickstart", "model.num_layers=[1,1]", "model.growth_rate=4", "cluster.cpus_per_worker=1"]
FAST = ["--seconds", "0.05", "--rounds", "2"]


def rows_of(path):
    return {(row["arm"], row["batch_size"]): row for row in json.loads(path.read_text())["rows"]}


def test_loaders(tmp_path, script, capsys):
    out = tmp_path / "loaders.json"
    script("data").main(["quickstart", "data.limit=600", *FAST, "--batch-sizes", "64", "100", "--out", str(out)])
    shown, found = capsys.readouterr().out, json.loads(out.read_text())["rows"]
    expected = [("dali", 64), ("dali", 100), ("torch", 64), ("torch", 100)]
    assert sorted((row["loader"], row["batch_size"]) for row in found) == expected
    for row in found:
        assert row["spread"][0] <= row["images_per_s"] <= row["spread"][1]
        assert row["images_per_cpu_s"] > 0
        assert f"{row['images_per_s']:,.0f}" in shown


def test_variants_of_a_model_and_the_roofline(tmp_path, script, capsys):
    out, plot = tmp_path / "model.json", tmp_path / "model.png"
    options = [*FAST, "--batch-sizes", "16", "256", "--variants", "reference", "fused", "graph", "--out", str(out)]
    script("model").main([*TINY, "cluster.device=cpu", *options])
    rows = rows_of(out)
    assert set(rows) == {(variant, size) for variant in ("reference", "fused") for size in (16, 256)}
    assert "graph skipped: it needs a GPU" in capsys.readouterr().out
    for (_, size), row in rows.items():
        reference = rows["reference", size]
        assert row["note"] == ""
        assert row["images_per_s"] == pytest.approx(1e3 * size / row["step_ms"], rel=1e-3)
        low, high = row["time_ratio_spread"]
        assert low <= row["time_ratio"] <= high
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    assert rows["reference", 256]["peak_mib"] > 4 * rows["reference", 16]["peak_mib"]
    script("roofline").main([str(out), "--seconds", "0.1", "--plot", str(plot)])
    assert "ceiling by arithmetic" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_with_a_graph(tmp_path, script):
    out = tmp_path / "model.json"
    settings = ["train.precision=bf16", "train.optimizer.name=adam"]
    options = [*FAST, "--batch-sizes", "64", "512", "--variants", "reference", "fused", "graph", "--out", str(out)]
    script("model").main([*TINY, *settings, *options])
    rows = rows_of(out)
    assert len(rows) == 6
    assert all(row["note"] == "" and row["images_per_s"] > 0 and row["peak_mib"] > 0 for row in rows.values())


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
    assert f"{reached['seconds']['mean']:.2f}  " in capsys.readouterr().out  # without an interval of two seeds
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"train\.lr: 0\.05 there, 0\.1 here"):
        main([*arguments, "1", "train.lr=0.1"])

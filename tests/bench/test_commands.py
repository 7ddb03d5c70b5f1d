"""``densenet-dist bench model`` and ``bench data``: what is asked for is in the table and in the file; mistakes."""

import json
import os

import pytest
import torch
from runs import tiny, train

from densenet_dist.bench.model import measuring_process, result_of
from densenet_dist.config import to_yaml
from densenet_dist.errors import ConfigError, EnvironmentProblem

TINY = ["quickstart", "model.num_layers=[1,1]", "model.growth_rate=4", "cluster.cpus_per_worker=1"]
ON_CPU = [*TINY, "cluster.device=cpu"]
FAST = ["--seconds", "0.05", "--rounds", "2"]


def rows_of(path):
    return {(row["arm"], row["batch_size"]): row for row in json.loads(path.read_text())["rows"]}


def test_mistakes_are_reported_before_anything_is_measured(tmp_path, command, monkeypatch):
    missing = tmp_path / "missing" / "result.json"
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, *arguments, expected, reason in (
        ("data", "quickstart", "--batch-sizes=64,,128", 2, "'' is not a number from 1 to 1,000,000; write them as 1,2"),
        ("data", "cifar10_small", f"data.root={tmp_path}", "data.download=false", 4, "cifar-10-batches-bin"),
        ("data", "quickstart", "--out=~/missing/result.json", 5, f"{missing} cannot be written: No such file"),
        ("model", *ON_CPU, "--variants=fast", 2, "there is no 'fast'; choose from reference, compiled, fused, graph"),
        ("model", *ON_CPU, "model.growth_rate=0", 2, "model.growth_rate"),
        ("scaling", *ON_CPU, "--workers=0", 2, "--workers: '0' is not a number from 1"),
        ("model", *ON_CPU, "--batch-sizes=1000000000000", 2, "'1000000000000' is not a number from 1 to 1,000,000"),
        ("scaling", *ON_CPU, "--workers=999", 2, "999 workers cannot share train.global_batch_size"),
        ("scaling", *ON_CPU, "--mode=large", 2, "'large' is not one of 'weak', 'strong', 'both'"),
    ):
        code, _, err = command("bench", name, *arguments)
        assert code == expected
        assert reason in err


def test_loaders(tmp_path, command):
    out = tmp_path / "loaders.json"
    options = [*FAST, "--batch-sizes", "64,100", "--out", out]
    code, shown, _ = command("bench", "data", "quickstart", "data.limit=600", *options)
    assert code == 0
    found = json.loads(out.read_text())["rows"]
    expected = [("dali", 64), ("dali", 100), ("torch", 64), ("torch", 100)]
    assert sorted((row["loader"], row["batch_size"]) for row in found) == expected
    for row in found:
        assert row["spread"][0] <= row["images_per_s"] <= row["spread"][1]
        assert row["images_per_cpu_s"] > 0
        assert f"{row['images_per_s']:,.0f}" in shown


def test_variants_of_a_model_and_the_roofline(tmp_path, command, script, capsys):
    out, plot = tmp_path / "model.json", tmp_path / "model.png"
    options = [*FAST, "--batch-sizes", "16,256", "--variants", "reference,fused,graph", "--out", out]
    code, shown, _ = command("bench", "model", *ON_CPU, *options)
    assert code == 0
    rows = rows_of(out)
    assert set(rows) == {(variant, size) for variant in ("reference", "fused") for size in (16, 256)}
    assert "graph skipped: it needs a GPU" in shown
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
def test_on_a_gpu_with_a_graph(tmp_path, command):
    out = tmp_path / "model.json"
    arguments = ["train.precision=bf16", "train.optimizer.name=adam", "--batch-sizes", "64,512", "--out", out]
    assert command("bench", "model", *TINY, *FAST, *arguments, "--variants", "reference,fused,graph")[0] == 0
    rows = rows_of(out)
    assert len(rows) == 6
    assert all(row["note"] == "" and row["images_per_s"] > 0 and row["peak_mib"] > 0 for row in rows.values())


def test_a_measuring_process_answers_or_reports_that_it_died():
    with measuring_process() as process:
        assert result_of(process.submit(divmod, 7, 2)) == (3, 1)
        with pytest.raises(EnvironmentProblem, match="the measuring process was killed, perhaps"):
            result_of(process.submit(os._exit, 3))


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

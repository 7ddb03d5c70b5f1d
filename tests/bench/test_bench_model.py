"""``densenet-dist bench model``: every arm and batch size is in the table and in the file, and its figures agree."""

import json
import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from densenet_dist.bench import data as bench_of_data
from densenet_dist.bench import model as bench_of_model
from densenet_dist.bench.arms import Measurement, OutOfMemory, _explained
from densenet_dist.bench.model_report import print_table
from densenet_dist.bench.roofline import PASSES, Roofline, count_flops, traffic
from densenet_dist.bench.workers import Worker
from densenet_dist.cli import main
from densenet_dist.config import load_config
from densenet_dist.errors import EnvironmentProblem
from densenet_dist.model import densenet

ROOT = Path(__file__).parents[2]
QUICK = str(ROOT / "configs" / "quickstart.yaml")
TINY = [QUICK, "model.num_layers=[1,1]", "model.growth_rate=4", "cluster.device=cpu", "cluster.cpus_per_worker=1"]
FAST = ["--seconds", "0.05", "--rounds", "2"]


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def rows_of(path: Path) -> dict[tuple[str, int | None], dict]:
    return {(row["arm"], row["batch_size"]): row for row in json.loads(path.read_text())["rows"]}


@pytest.mark.slow
def test_table_file_and_picture(tmp_path, capsys):
    out, plot = tmp_path / "model.json", tmp_path / "model.png"
    arguments = [*TINY, *FAST, "--batch-sizes", "16,256", "--out", str(out), "--plot", str(plot)]
    assert bench("model", *arguments, "--arms", "reference,fused,graph") == 0
    shown, found, rows = capsys.readouterr().out, json.loads(out.read_text()), rows_of(out)
    assert set(rows) == {(arm, size) for arm in ("reference", "fused") for size in (16, 256)}
    assert "graph is left out: it needs a GPU" in found["notes"]
    for (arm, size), row in rows.items():
        check_row(found, row, size)
        assert f"{row['images_per_s']:,.0f}" in shown or f"{row['images_per_s']:#.3g}" in shown
        reference = rows["reference", size]
        pairs = zip(row["rounds"], reference["rounds"], strict=True)
        ratios = [one["step_ms"] / other["step_ms"] for one, other in pairs]
        assert row["time_ratio"] == pytest.approx(sum(ratios) / 2, rel=1e-3)  # the median of two
        assert row["time_ratio_spread"] == pytest.approx([min(ratios), max(ratios)], rel=1e-3)
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert arm != "reference" or row["memory_ratio"] == row["time_ratio"] == 1
    assert rows["reference", 256]["peak_mib"] > 4 * rows["reference", 16]["peak_mib"]
    # The resident size of a net this small is known to some megabytes only.
    assert rows["fused", 256]["peak_mib"] < 1.2 * rows["reference", 256]["peak_mib"]
    assert rows["fused", 256]["saved_mib_per_image"] < 0.7 * rows["reference", 256]["saved_mib_per_image"]
    for arm in ("reference", "fused"):
        saved = [rows[arm, size]["saved_mib_per_image"] for size in (16, 256)]
        assert saved == pytest.approx([saved[0]] * 2, rel=0.05)
    assert found["roofline"]["gb_per_s"] > 0.1
    assert found["roofline"]["tflop_per_s"] > 1e-4
    assert found["model"]["growth_rate"] == 4
    assert found["environment"]["packages"]["torch"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def check_row(found: dict, row: dict, size: int) -> None:
    """Everything in it follows from its times and the net."""
    assert row["note"] == ""
    seconds, rate = row["step_ms"] / 1e3, row["images_per_s"]
    assert rate == pytest.approx(size / seconds, rel=1e-3)
    assert row["images_per_s_spread"][0] <= rate <= row["images_per_s_spread"][1]
    assert row["step_ms_spread"][0] <= row["step_ms"] <= row["step_ms_spread"][1]
    assert len(row["rounds"]) == 2
    for one in row["rounds"]:
        assert 0 < one["forward_ms"] + one["backward_ms"] < one["step_ms"]
    assert row["tflop_per_s"] == pytest.approx(rate * found["flops_per_image"] / 1e12, rel=1e-3)
    assert row["gb_per_s"] == pytest.approx(rate * found["bytes_per_image"][row["arm"]] / 1e9, rel=1e-3)
    roofline, ceilings = found["roofline"], found["ceilings"]
    assert row["share_of_compute"] == pytest.approx(row["tflop_per_s"] / roofline["tflop_per_s"], rel=1e-3)
    assert row["share_of_bandwidth"] == pytest.approx(row["gb_per_s"] / roofline["gb_per_s"], rel=1e-3)
    assert ceilings["compute"] == pytest.approx(rate / row["share_of_compute"], rel=1e-3)
    assert ceilings["bandwidth"][row["arm"]] == pytest.approx(rate / row["share_of_bandwidth"], rel=1e-3)
    assert row["peak_mib"] > 0


@pytest.mark.nightly
@pytest.mark.slow
def test_compiled_net_is_the_same_net_and_batches_too_large_are_not_tried(tmp_path, capsys):
    out = tmp_path / "model.json"
    small = ["model.num_layers=[1]", "--seconds", "0.05", "--rounds", "1", "--out", str(out)]
    assert bench("model", *TINY, *small, "--arms", "reference,compiled", "--batch-sizes", "16,1000000000") == 0
    rows, shown = rows_of(out), capsys.readouterr().out
    reference, compiled = rows["reference", 16], rows["compiled", 16]
    assert compiled["note"] == ""
    assert compiled["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    assert 0 < compiled["saved_mib_per_image"] <= reference["saved_mib_per_image"]
    for arm in ("reference", "compiled"):
        assert "not tried: it would take about" in rows[arm, 1000000000]["note"]
        assert rows[arm, 1000000000]["images_per_s"] is None
        assert f"{arm}, batch 1000000000: not tried" in shown


class FakeWorker:
    """Stands in for a process: reference takes 4 ms, others 1; and some fail."""

    started: ClassVar[list[str]] = []

    def __init__(self, prepare, *arguments):
        self.arm, self.rounds = arguments[0] if prepare is bench_of_model.prepare_arm else "roofline", 0
        self.started.append(self.arm)

    def wait(self):
        if self.arm == "fused":
            raise EnvironmentProblem("no kernels")

    def ask(self, *question):
        if self.arm == "roofline":
            return Roofline(10.0, 0.1)
        self.rounds += question[0] == 64
        if (self.arm, question[0]) == ("compiled", 16):
            raise EnvironmentProblem("no compiler")
        if (self.arm, question[0], self.rounds) == ("reference", 64, 2):
            raise OutOfMemory("out of memory")
        assert self.arm != "fused"
        return Measurement(4.0 if self.arm == "reference" else 1.0, 0.5, 0.4, 2, math.nan, 1.0, 2.3)

    def stop(self):
        pass


def test_what_cannot_work_is_a_row_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(bench_of_model, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "started", [])
    found = bench_of_model.bench_model(load_config(*TINY), batch_sizes=(16, 64), rounds=3)
    rows = {(row["arm"], row["batch_size"]): row for row in found["rows"]}
    notes = {key: row["note"] for key, row in rows.items() if row["note"]}
    assert notes == {
        ("fused", None): "no kernels", ("compiled", 16): "no compiler", ("reference", 64): "out of memory"
    }  # fmt: skip
    assert len(rows["reference", 16]["rounds"]) == 3
    assert len(rows["reference", 64]["rounds"]) == 1
    assert rows["compiled", 64]["time_ratio"] == 0.25
    assert rows["compiled", 64]["peak_mib"] is None
    assert rows["compiled", 16]["images_per_s"] is None
    # What failed for another reason than memory gets a process anew; what failed once is not tried again.
    assert sorted(FakeWorker.started) == ["compiled", "compiled", "fused", "reference", "roofline"]
    print_table(found)
    shown = capsys.readouterr().out
    assert "compiled, batch 16: no compiler" in shown
    assert "fused: no kernels" in shown
    json.loads(json.dumps(found, allow_nan=False))


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OutOfMemory, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), OutOfMemory, "out of memory"),
        (ValueError("a: \n\n b\nc"), EnvironmentProblem, "ValueError: a: b"),
        (RuntimeError("no compiler\n\nSet TORCH_LOGS=..."), EnvironmentProblem, "RuntimeError: no compiler"),
        (EnvironmentProblem("no\nkernels"), EnvironmentProblem, "no\nkernels"),
    ],
)
def test_errors_of_an_arm_are_one_line(error, kind, text):
    def fails():
        raise error

    with pytest.raises(EnvironmentProblem) as caught:
        _explained(fails)
    assert type(caught.value) is kind
    assert str(caught.value) == text


def test_a_process_answers_or_says_how_it_ended():
    worker = Worker(partial, divmod)
    assert worker.ask(7, 2) == (3, 1)
    worker.stop()
    for work, argument, reason in (
        (os._exit, 3, "code 3"),
        (signal.raise_signal, 9, "code -9: it was killed, perhaps"),
    ):
        worker = Worker(partial, work)
        with pytest.raises(EnvironmentProblem, match=f"the measuring process ended with {reason}"):
            worker.ask(argument)
        worker.stop()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--batch-sizes=64,,128"], "write them as 64,128,256"),
        (["--batch-sizes=0"], "write them as 64,128,256"),
        (["--arms=reference,fast"], "there is no 'fast'; choose from reference, compiled, fused, graph"),
        (["--plot=speed.txt"], "speed.txt must end in .png, .pdf or .svg"),
        (["model.depth=11", "model.num_layers=null"], "model.depth"),
        (["model.growth_rate=0"], "model.growth_rate"),
    ],
)
def test_wrong_arguments(arguments, reason, capsys):
    assert bench("model", *TINY, *arguments) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "option", "module"),
    [
        ("model", "--out", bench_of_model),
        ("model", "--plot", bench_of_model),
        ("data", "--out", bench_of_data),
    ],
)
def test_an_unwritable_file_is_said_before_anything_is_measured(what, option, module, tmp_path, monkeypatch, capsys):
    def measured(*_, **__):
        raise AssertionError("measured")

    monkeypatch.setattr(module, f"bench_{what}", measured)
    path = tmp_path / "missing" / "result.png"
    assert bench(what, QUICK, option, str(path)) == 5
    assert f"{path} cannot be written: No such file or directory" in capsys.readouterr().err


def test_flops_by_hand():
    # The stem makes 16 maps from 3, a layer 4 from 16, another 4 from 20, on 8x8 pixels; the classifier 10 of 24.
    net = densenet("densenet", num_classes=10, image_size=8, growth_rate=4, num_layers=[2], block="reference")
    stem, layers, classifier = 64 * 9 * 3 * 16, 64 * 9 * 4 * (16 + 20), 24 * 10
    # The backward pass computes two products of each, of the stem only that for the weights.
    by_hand = 2 * (2 * stem + 3 * (layers + classifier))
    assert count_flops(net) == by_hand
    assert count_flops(net.to("meta")) == by_hand


def test_flops_and_bytes_of_the_notebook_net():
    """The figures of the design, worked out apart from this code: 7.15 GFLOP, 188 and 120 MB an image in bf16."""
    with torch.device("meta"):
        net = densenet("notebook", num_classes=10, drop_rate=0.2, block="reference")
    assert count_flops(net) == pytest.approx(7.15e9, rel=1e-3)
    assert traffic(net.architecture, "reference", 2) == pytest.approx(188e6, rel=0.01)
    assert traffic(net.architecture, "compiled", 2) == pytest.approx(120e6, rel=0.01)


def test_bytes_by_hand():
    net = densenet("densenet", num_classes=10, image_size=8, growth_rate=4, num_layers=[1], block="reference")
    # An image is 3 values a pixel; the stem makes 16, the layer 4 from them, the head reads 20.
    stem = 2 * 3 + 2 * 16
    reference = stem + 16 * 16 + 3 * 4 + (2 * 20 + 3 * 16) + 15 * 20
    fused = stem + 5 * 16 + (8.75 * 16 + 8 * 4) + 5.75 * 20
    assert traffic(net.architecture, "reference", 4) == 4 * 64 * reference
    assert traffic(net.architecture, "fused", 2) == 2 * 64 * fused
    assert traffic(net.architecture, "graph", 2) == 2 * 64 * fused


@pytest.mark.parametrize("arm", PASSES)
@pytest.mark.parametrize("variant", ["notebook", "densenet", "densenet_bc", "densenet121"])
def test_every_part_of_every_net_has_its_passes(arm, variant):
    with torch.device("meta"):
        nets = [densenet(variant, num_classes=10, drop_rate=rate, block="reference") for rate in (0.0, 0.2)]
    plain, dropping = (traffic(net.architecture, arm, 2) for net in nets)
    assert 0 < plain <= dropping


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_with_a_graph(tmp_path):
    out = tmp_path / "model.json"
    tiny = [argument for argument in TINY if argument != "cluster.device=cpu"]
    arguments = ["train.precision=bf16", "train.optimizer.name=adam", "--batch-sizes", "64,512", "--out", str(out)]
    assert bench("model", *tiny, *FAST, *arguments, "--arms", "reference,fused,graph") == 0
    rows = rows_of(out)
    assert set(rows) == {(arm, size) for arm in ("reference", "fused", "graph") for size in (64, 512)}
    for row in rows.values():
        assert row["note"] == ""
        assert row["images_per_s"] > 0
        assert row["peak_mib"] > 0
        assert (row["forward_ms"] is None) == (row["arm"] == "graph")

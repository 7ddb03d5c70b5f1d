"""The pages of runs: what is on them, that they need nothing else, and where they go."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from matplotlib.image import imread
from pyarrow import fs
from runs import tiny

from densenet_dist.cli import main
from densenet_dist.cluster.launch import fit
from densenet_dist.config import load_config
from densenet_dist.errors import StorageError
from densenet_dist.report import report_at_end, report_run, report_runs
from densenet_dist.run_folder import RunFolder
from densenet_dist.train.evaluation import open_run

RECORDS = ["Accuracy and loss", "Learning rate, throughput, data wait and goodput", "Test images"]
JUDGED = ["Confusion matrix", "Accuracy of each class", "Calibration", "Most confident mistakes"]
SETUP = ["Model", "Configuration", "Environment"]


def lines(page, first):
    """The rows of the table whose first heading is so."""
    start = next(i for i, row in enumerate(page.rows) if row and row[0] == first)
    found = []
    for row in page.rows[start + 1 :]:
        if len(row) != len(page.rows[start]):
            break
        found.append(row)
    return found


def test_a_run_ends_with_its_page(finished, page_of, opened):
    page = page_of(finished / "report.html")
    assert page.titles == [*RECORDS, *JUDGED, *SETUP]
    assert page.needs_nothing_else()
    assert page.pictures[:6] == [
        "top-1 accuracy (%) against epoch",
        "cross-entropy (nats) against epoch",
        "top-5 accuracy (%) against epoch",
        "learning rate against epoch",
        "training images/s against time (s)",
        "waiting for data (% of time) against time (s)",
    ]
    assert len([picture for picture in page.pictures if "predicted" in picture]) == 24
    summary = json.loads((finished / "summary.json").read_text())
    assert f"top-1 {summary['test/top1'] * 100:.2f}\xa0%" in page.text
    environment = json.loads((finished / "env.json").read_text())
    assert environment["packages"]["torch"] in page.text
    assert (environment["git"] or "not known").partition("+")[0] in page.text
    assert "growth_rate: 4" in page.text
    hours = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-2])["perf/device_hours"]
    assert 0 < hours * 3600 < 600
    assert re.search(rf"{hours:.3g}\s(worker|GPU)-hours, of all workers", page.text)
    for picture in ("curves.png", "confusion.png"):
        assert imread(finished / picture).shape[2] == 4
    dom = opened(finished / "report.html")
    assert 'loading="lazy"' not in dom  # what is printed, or photographed as a whole, would miss them
    assert all(f">{title}</h2>" in dom for title in page.titles)


def test_model_summary(finished, page_of):
    rows = lines(page_of(finished / "report.html"), "layer")
    by_name = {row[0].strip("\xa0"): row[1:] for row in rows}
    # conv3x3 from 3 to 2k = 8 maps; a dense layer's bottleneck of 4k = 16 maps, then k = 4 maps.
    assert by_name["conv0"] == ["Conv2d", "(N, 8, 32, 32)", f"{3 * 8 * 9:,}"]
    assert by_name["denseblock1"] == ["DenseBlock", "(N, 12, 32, 32)", f"{4 * 8 + 8 * 16 + 4 * 16 + 16 * 4 * 9:,}"]
    assert by_name["transition1"][1] == "(N, 6, 16, 16)"
    assert by_name["norm5"] == ["BatchNorm2d", "(N, 10, 16, 16)", "40"]
    assert by_name["classifier"] == ["Linear", "(N, 10)", "110"]


def test_the_notebooks_net_has_as_many_parameters_as_keras_counted(tmp_path, page_of):
    net = {"model": {"variant": "notebook", "growth_rate": 35, "num_layers": [12, 12, 12, 12]}}
    config = load_config(tiny(tmp_path, "data.limit=8", "train.epochs=1"), net)
    result = fit(config, listener=lambda event: None)
    page = page_of(result.page)
    assert "notebook, 3,532,210 trainable parameters" in page.text
    assert "<dt>Trainable</dt><dd>3,532,210</dd>" in page.text
    rows = lines(page, "layer")
    assert sum(int(row[3].replace(",", "")) for row in rows if row[0].strip("\xa0") in ("features", "classifier")) == (
        3_532_210 + 25_480
    )


def test_without_judging_the_records_are_enough(run, page_of):
    (run / "confusion.png").unlink()
    shutil.rmtree(run / "checkpoints")
    (run / "env.json").unlink()
    assert report_run(run, judges=False) == str(run / "report.html")
    page = page_of(run / "report.html")
    assert page.titles == [*RECORDS, *SETUP]
    assert "no checkpoint yet" in page.text
    assert f"densenet-dist report {run}" in page.text
    assert not (run / "confusion.png").exists()


def test_names_are_escaped(run, page_of):
    text = (run / "env.json").read_text()
    (run / "env.json").write_text(text.replace('"host": "', '"host": "<script>alert(1)</script>'))
    report_run(run, judges=False)
    page = page_of(run / "report.html")
    assert "<script>alert" not in page.text
    assert "&lt;script&gt;alert(1)" in page.text


def test_a_run_on_an_object_store_has_its_page_there(run, s3, tmp_path, page_of):
    uri = s3 % "/reports/tiny"
    (run / "report.html").unlink()
    there = RunFolder(s3 % "/reports", "tiny")
    for name in ("config.yaml", "env.json", "metrics.jsonl", "summary.json", "checkpoints"):
        source = run / name
        target = there.path / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        there.publish(name)
    assert report_run(uri) == "s3://bucket/reports/tiny/report.html"
    filesystem, _ = fs.FileSystem.from_uri(s3 % "")
    names = {info.base_name for info in filesystem.get_file_info(fs.FileSelector("bucket/reports/tiny"))}
    assert names >= {"report.html", "curves.png", "confusion.png"}
    page = page_of(open_run(uri).fetch("report.html"))
    assert page.titles == [*RECORDS, *JUDGED, *SETUP]
    assert f"densenet-dist evaluate &#39;{uri.replace('&', '&amp;')}&#39;" in page.text  # it can be copied as it is


def test_several_runs_side_by_side(run, tmp_path, page_of, opened):
    folders = [run]
    for seed, gain in ((1, 0.02), (2, 0.04)):
        folders.append(shutil.copytree(run, tmp_path / "runs" / f"seed{seed}"))
        _change(folders[-1], f"seed: {seed}", gain)
    other = shutil.copytree(run, tmp_path / "runs" / "other")
    _change(other, "seed: 0", 0.0, lr="0.01")
    out = tmp_path / "compared.html"
    assert report_runs([*folders, other], out) == str(out)
    page = page_of(out)
    assert page.titles == ["Results", "Validation and training", "Runs", "Accuracy of each class"]
    assert page.needs_nothing_else()
    top1 = json.loads((run / "summary.json").read_text())["test/top1"] * 100
    first, second = lines(page, "settings")
    assert first[:3] == ["train.lr=0.05", "3", f"{top1 + 2:.2f} ± {4.302653 * 2 / 3**0.5:.2f}"]
    assert second[:3] == ["train.lr=0.01", "1", f"{top1:.2f}"]
    assert [row[0] for row in lines(page, "run")] == ["tiny", "seed1", "seed2", "other"]
    assert len(lines(page, "class")) == 10
    assert ">Results</h2>" in opened(out)


def _change(folder: Path, seed: str, gain: float, lr: str = "0.05") -> None:
    """Make another run of a copy: its seed, its learning rate, and how much better its test result is."""
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("seed: 0", seed).replace("lr: 0.05", f"lr: {lr}"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records[-1]["test/top1"] += gain
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_run_without_epochs_is_refused(run):
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(StorageError, match=r"has no epochs yet(.|\n)*--resume"):
        report_run(run)


def test_at_the_end_nothing_is_raised(run):
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    assert "could not be written" in report_at_end(open_run(run), judges=False)
    (run / "report.html").rmdir()
    weights = next((run / "checkpoints").glob("step-*/model.safetensors"))
    weights.write_bytes(b"damaged")
    assert "lacks the test images" in report_at_end(open_run(run), judges=True)
    assert "Accuracy and loss" in (run / "report.html").read_text()


def test_command(run, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["report", *arguments])
        return stop.value.code, *capsys.readouterr()

    assert command("tiny", "--no-judge") == (0, f"page: {run / 'report.html'}\n", "")
    assert command("tiny", "--no-judge", "--out", "x.html") == (0, "page: x.html\n", "")
    assert {"x.html", "curves.png"} <= {path.name for path in tmp_path.iterdir()}
    assert command("tiny", str(run), "--no-judge") == (0, "page: report.html\n", "")
    assert (tmp_path / "report.html").exists()
    code, _, err = command("nowhere")
    assert code == 5
    assert "there is no run at" in err
    assert command("tiny", "--out", "no/such/folder.html")[0] == 5
    assert command("tiny", "--out", "s3://bucket/page.html")[0] == 2


def test_trained_again_the_page_is_new(run):
    before = (run / "report.html").read_bytes()
    (run / "summary.json").unlink()
    config = tiny(run.parent, *(f"{key}" for key in ("train.epochs=2",)))
    assert load_config(run / "config.yaml").train == config.train
    fit(config, resume=True, listener=lambda event: None)
    assert (run / "report.html").read_bytes() != before  # the machine's time is on it

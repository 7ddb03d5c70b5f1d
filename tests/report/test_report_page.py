"""The pages of runs: what is on them, that they need nothing else and show all names as text, and where they go."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from photos import write_photos
from pyarrow import fs
from runs import TINY, tiny, train

from densenet_dist.cluster.launch import _write_page, fit
from densenet_dist.cluster.result import load_run
from densenet_dist.config import load_config, to_yaml
from densenet_dist.errors import ConfigError, StorageError
from densenet_dist.report.comparison import group
from densenet_dist.report.page import write_report
from densenet_dist.report.record import read_run
from densenet_dist.run_folder import RunFolder, open_run

RECORDS = ["Accuracy and loss", "Test images"]
TESTED = ["Confusion matrix", "Accuracy of each class", "Calibration", "Most confident mistakes"]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
SETUP = ["Model", "Configuration", "Environment"]
NASTY = "<img src=x onerror=alert(1)>"
CLASSES = (NASTY, "\"' onload='alert(1)", "<b>bold", "&amp;")


def lines(page, first):
    """The rows of the table whose first heading is so."""
    start = next(i for i, row in enumerate(page.rows) if row and row[0] == first)
    found = []
    for row in page.rows[start + 1 :]:
        if len(row) != len(page.rows[start]):
            break
        found.append(row)
    return found


@pytest.fixture
def no_evaluation(monkeypatch):
    """Evaluating anything fails."""
    for function in ("evaluate_model", "prepare_evaluation"):
        fail = Mock(side_effect=AssertionError("the test set is evaluated"))
        monkeypatch.setattr(f"densenet_dist.train.evaluation.{function}", fail)


def test_a_run_ends_with_its_page(finished, page_of):
    page = page_of(finished / "report.html")
    assert page.titles == [*RECORDS, *TESTED, *SETUP]
    assert page.needs_nothing_else()
    # A dense layer's bottleneck of 4k = 16 maps, then k = 4 maps.
    size = f"{4 * 8 + 8 * 16 + 4 * 16 + 16 * 4 * 9:,}"
    layers = [[row[0].strip("\xa0"), *row[1:]] for row in lines(page, "layer")]
    assert ["denseblock1", "DenseBlock", "(N, 12, 32, 32)", size] in layers
    assert page.pictures[0] == "top-1 accuracy (%) against epoch"
    assert len([picture for picture in page.pictures if "predicted" in picture]) == 24
    assert len([picture for picture in page.pictures if picture.startswith("heat map of ")]) == 24
    summary = json.loads((finished / "summary.json").read_text())
    results = json.loads((finished / "test_results.json").read_text())
    for name in ("loss", "top1", "top5"):
        assert results[name] == summary[f"test/{name}"]
    assert page.text.count(f"top-1 {summary['test/top1'] * 100:.2f}\xa0%, top-5") == 1
    assert f"<dd>{results['top1'] * 100:.2f}\xa0%, {results['top5'] * 100:.2f}\xa0%</dd>" in page.text
    environment = json.loads((finished / "env.json").read_text())
    assert environment["packages"]["torch"] in page.text
    assert (environment["git"] or "unknown").partition("+")[0] in page.text
    assert "growth_rate: 4" in page.text
    assert re.search(r"on 75 images.*images/s, [\d.e-]+ TFLOP/s.*GiB of memory per worker", page.text, re.DOTALL)
    hours = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-2])["perf/device_hours"]
    assert 0 < hours * 3600 < 600
    assert re.search(rf"{hours:.3g}&nbsp;(worker|GPU)-hours in total", page.text)


@pytest.mark.nightly
@pytest.mark.skipif(BROWSER is None, reason="there is no chromium here")
def test_pages_open_in_a_browser(finished, run, tmp_path):
    _change(run, "seed: 1", 0.0)
    write_report([finished, run], tmp_path / "compared.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    for page, titles in (
        (finished / "report.html", [*RECORDS, *TESTED, *SETUP]),
        (tmp_path / "compared.html", ["Results", "Runs"]),
    ):
        command = [BROWSER, *flags, "--enable-logging=stderr", "--dump-dom", page.absolute().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stderr.splitlines() if ":CONSOLE" in line] == []
        assert 'loading="lazy"' not in done.stdout  # what is printed, or photographed as a whole, would miss them
        assert all(f">{title}</h2>" in done.stdout for title in titles)


def test_the_page_of_a_finished_run_needs_no_data_and_no_evaluation(run, command, no_evaluation, page_of, monkeypatch):
    before = (run / "report.html").read_bytes()
    shutil.rmtree(run / "checkpoints")
    (run / "env.json").unlink()
    for name in ("curves.png", "confusion.png"):
        (run / name).write_text("the user's own")
    assert command("report", "tiny") == (0, f"report: {run / 'report.html'}\n", "")
    page = page_of(run / "report.html")
    assert page.titles == [*RECORDS, *TESTED, *SETUP]
    assert ["\xa0\xa0denseblock1", "DenseBlock"] in [row[:2] for row in lines(page, "layer")]
    assert [(run / name).read_text() for name in ("curves.png", "confusion.png")] == ["the user's own"] * 2
    assert (run / "report.html").read_bytes() != before
    monkeypatch.setenv("HOME", str(run.parent.parent))
    assert command("report", "tiny", "--out=~/x.html") == (0, f"report: {run.parent.parent / 'x.html'}\n", "")
    assert command("report", "tiny", run) == (0, "report: report.html\n", "")
    assert {path.name for path in run.parent.parent.glob("*.*")} == {"x.html", "report.html"}
    code, _, err = command("report", "nowhere")
    assert code == 5
    assert "there is no run at" in err
    assert command("report", "tiny", "--out", "no/such/folder.html")[0] == 5
    assert command("report", "tiny", "--out", "s3://bucket/page.html")[0] == 2


def test_evaluate_stores_the_test_results_that_a_run_lacks(run, command, page_of):
    stored = page_of(run / "report.html")
    (run / "test_results.json").unlink()
    assert command("report", "tiny") == (0, f"report: {run / 'report.html'}\n", "")
    page = page_of(run / "report.html")
    assert page.titles == [*RECORDS, *SETUP]
    assert f"densenet-dist evaluate {run}" in page.text
    with pytest.raises(StorageError, match=r"no test results yet\n  evaluate it first"):
        load_run(run).plot_confusion()
    for change in ("--split=val", "--checkpoint=last", "data.test_limit=10"):
        assert command("evaluate", run, change)[0] == 0
        assert not (run / "test_results.json").exists()
    code, out, _ = command("evaluate", "tiny", "--json", "data.root=/elsewhere")
    assert (code, json.loads(out)["images"]) == (0, 75)
    command("report", "tiny")
    page = page_of(run / "report.html")
    assert page.titles == stored.titles
    assert page.rows == stored.rows
    shutil.rmtree(run / "checkpoints")  # as before the first save, if checkpoint.every_epochs is above 1
    (run / "test_results.json").unlink()
    assert command("report", "tiny")[0] == 0


def test_a_run_on_an_object_store_has_its_page_there(s3, tmp_path, page_of):
    result = fit(tiny(s3 % "/reports", "train.epochs=1"), listener=lambda event: None)
    filesystem, _ = fs.FileSystem.from_uri(s3 % "")
    names = {info.base_name for info in filesystem.get_file_info(fs.FileSelector("bucket/reports/tiny"))}
    assert names >= {"test_results.json", "report.html"}
    filesystem.delete_file("bucket/reports/tiny/report.html")
    assert write_report([result.run]) == result.page == "s3://bucket/reports/tiny/report.html"
    page = page_of(open_run(result.run).fetch("report.html"))
    assert page.titles == [*RECORDS, *TESTED, *SETUP]
    assert f"densenet-dist evaluate &#39;{result.run.replace('&', '&amp;')}&#39;" in page.text  # as it is typed


def test_several_runs_side_by_side(run, tmp_path, page_of, no_evaluation):
    folders = [run]
    for seed, gain, other in ((1, 0.02, "cluster: {timeout_s: 5}"), (2, 0.04, "train: {profile: [1, 2]}")):
        folders.append(shutil.copytree(run, tmp_path / "runs" / f"seed{seed}"))
        _change(folders[-1], f"{{seed: {seed}, {other}}}", gain)
    other = shutil.copytree(run, tmp_path / "runs" / "other")
    _change(other, "train.lr: 0.01")
    out = tmp_path / "compared.html"
    assert write_report([*folders, other], out) == str(out)
    page = page_of(out)
    assert page.titles == ["Results", "Validation and training", "Runs"]
    assert page.needs_nothing_else()
    top1 = json.loads((run / "summary.json").read_text())["test/top1"] * 100
    first, second = lines(page, "settings")
    assert first[:3] == ["train.lr=0.05", "3", f"{top1 + 2:.2f} ± {4.302653 * 2 / 3**0.5:.2f}"]
    assert second[:3] == ["other: train.lr=0.01", "1", f"{top1:.2f}"]
    assert [row[0] for row in lines(page, "run")] == ["tiny", "seed1", "seed2", "other"]
    assert group(list(map(read_run, folders[:2])))[0].interval(lambda run: run.summary["test/loss"]).half is None
    for setting in ("cluster.workers: 1", "cluster.cpus_per_worker: 1", "checkpoint.monitor: val/loss"):
        shutil.copy(run / "config.yaml", other)
        _change(other, setting)
        assert len(group([read_run(run), read_run(other)])) == 2, setting
    assert len(group([read_run(folder) for folder in folders])) == 1
    _change(other, "data.name: cifar10")
    with pytest.raises(ConfigError, match=r"cannot be compared:\n  shapes: tiny, seed1, seed2\n  cifar10: other"):
        write_report([*folders, other], out)


def _change(folder: Path, settings: str, gain: float = 0.0) -> None:
    """Make another run of a copy: with other settings, and a test result that is better by so much."""
    config = load_config(folder / "config.yaml", yaml.safe_load(settings))
    (folder / "config.yaml").write_text(to_yaml(config))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records[-1]["test/top1"] += gain
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_trained_again_page_and_test_results_are_new(run):
    (run / "summary.json").unlink()
    (run / "test_results.json").write_text("old")
    (run / "report.html").write_text("old")
    result = fit(tiny(run.parent, "train.epochs=2"), resume=True, listener=lambda event: None)
    assert json.loads((run / "test_results.json").read_text())["top1"] == result.summary["test/top1"]
    assert "Confusion matrix" in (run / "report.html").read_text()


def test_a_page_that_cannot_be_made_is_an_error_but_not_at_the_end_of_training(run):
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    said: list[dict[str, object]] = []
    _write_page(RunFolder(str(run.parent), run.name), said.append)
    assert "could not be written" in str(said[0]["text"])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(StorageError, match=r"has no epochs yet(.|\n)*--resume"):
        write_report([run])


def test_nothing_on_the_pages_of_runs_becomes_html(tmp_path, monkeypatch, page_of):
    """Of a run on pictures whose class folders have such names, and whose records were written by anybody."""
    monkeypatch.setenv("DENSENET_DIST_CACHE", str(tmp_path / "cache"))
    write_photos(tmp_path / "data", CLASSES, 8)
    data = {"name": "folder", "root": str(tmp_path / "data"), "image_size": 32, "limit": None}
    train(load_config(TINY, {"storage": str(tmp_path), "data": data, "train": {"epochs": 1}}))
    run = tmp_path / "tiny"
    config = load_config(run / "config.yaml")
    (run / "config.yaml").write_text(to_yaml(config).replace(config.data.root, f"'/{NASTY}'"))
    facts = {"host": NASTY, "cpu": NASTY, "gpus": [NASTY], "git": NASTY, "packages": {NASTY: NASTY}}
    (run / "env.json").write_text(json.dumps(facts))
    (run / "summary.json").write_text((run / "summary.json").read_text().replace("finished", NASTY))
    page = page_of(write_report([run]))
    assert page.is_harmless()
    assert page.tags["img"] == page.text.count('src="data:image/png')
    assert all(name in page.shown for name in CLASSES)
    assert page.shown.count(NASTY) > page.shown.count(CLASSES[1])  # of settings, host and versions too
    copies = [shutil.copytree(run, tmp_path / f"{NASTY}{number}") for number in range(2)]
    (copies[1] / "env.json").write_text(json.dumps(facts | {"time": "later"}))
    page = page_of(write_report(copies, tmp_path / "all.html"))
    assert page.is_harmless()
    assert f"{NASTY}1" in page.shown

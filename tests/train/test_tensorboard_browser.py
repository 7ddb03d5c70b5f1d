"""What TensorBoard shows of a folder of runs, in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import next_second, records, run_of, tiny, train

from densenet_dist.schema import Config

SECONDS = 120
SHAPES = ("bar", "circle", "cross", "ell", "frame", "ring", "semicircle", "square", "star", "triangle")
RATES = {"whole": 0.05, "stopped": 0.01, "sweep/trial-000": 0.1, "sweep/trial-001": 0.02}
RUNS = {f"{name}/tb" for name in RATES}
EPOCHS = [5, 10, 15, 20]

TABLE = """grid => {
    const text = cell => cell.querySelector("slot").assignedNodes().map(node => node.innerText).join("").trim();
    return [...grid.shadowRoot.querySelectorAll("thead tr, tbody tr:not([hidden])")].map(
        row => [...row.querySelectorAll("th, td:not([part~=details-cell])")]
            .sort((one, other) => one.style.order - other.style.order).map(text));
}"""
"""The texts of a vaadin-grid by row, in the order of its columns."""


def configured(folder: Path, name: str) -> Config:
    *below, last = name.split("/")  # a trial's folder is in its sweep's, see densenet_dist/cluster/trial.py
    settings = [f"name={last}", f"train.lr={RATES[name]}", "train.epochs=4", "checkpoint.every_epochs=2"]
    return tiny(folder.joinpath(*below), *settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Configurations of finished runs in one folder, by their names there."""
    folder = tmp_path_factory.mktemp("runs")
    configs = {name: configured(folder, name) for name in RATES}

    def stop(event):
        if event["kind"] == "epoch" and event["global_step"] == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(configs["stopped"], listener=stop)
    manifest = json.loads((run_of(configs["stopped"]).path / "checkpoints" / "manifest.json").read_text())
    assert [entry["position"]["global_step"] for entry in manifest["checkpoints"]] == [10]
    assert len(records(configs["stopped"])) == 3  # the third epoch is on record, and comes again
    next_second()
    for config in configs.values():
        train(config)
    return configs


@pytest.fixture(scope="module")
def address(runs: dict[str, Config]) -> Iterator[str]:
    """Of the tensorboard beside this Python, on the runs' folder."""
    program = Path(sys.executable).with_name("tensorboard")
    command = [program, "--logdir", runs["whole"].storage, "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    killer = threading.Timer(5 * SECONDS, process.kill)
    killer.start()
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail("".join(said))
        yield found[0]
    finally:
        killer.cancel()
        process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium here")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, address) -> Iterator[Callable[[str], Any]]:
    """Opens a tab of TensorBoard's, such as ``images``; no script of its pages may fail, nor may a request."""
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 1300, "height": 1200})
    page.set_default_timeout(SECONDS * 1000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("response", lambda response: response.status >= 400 and complaints.append(response.url))

    def open_tab(name: str) -> Any:
        page.goto(f"{address}/#{name}")
        return page

    yield open_tab
    page.close()
    assert complaints == []


def card(page: Any, kind: str, name: str) -> Any:
    """The one card of a chart."""
    return page.locator(kind, has=page.locator("[itemprop=name]").get_by_text(name, exact=True))


def awaited(look: Callable[[], Any], wanted: Any) -> None:
    """Look until it is there; TensorBoard asks for its data bit by bit."""
    ends = time.monotonic() + SECONDS
    while (found := look()) != wanted and time.monotonic() < ends:
        time.sleep(0.2)
    assert found == wanted


def runs_of(chart: Any) -> int:
    """How many runs have lines in a chart: one colour is one run."""
    return len(set(chart.locator("path.line").evaluate_all("lines => lines.map(line => line.getAttribute('stroke'))")))


def test_every_run_has_one_name_and_its_curves(opened):
    page = opened("scalars&tagFilter=^(train|val)/loss$")
    for tag in ("train/loss", "val/loss"):
        chart = card(page, "tf-scalar-card", tag)
        awaited(lambda chart=chart: runs_of(chart), len(RUNS))
    names = page.locator("tf-runs-selector paper-checkbox[id^='checkbox-']")
    assert sorted(names.evaluate_all("boxes => boxes.map(box => box.id)")) == sorted(f"checkbox-{run}" for run in RUNS)


def test_training_and_validation_are_in_one_chart_without_a_seam(opened):
    page = opened("custom_scalars")
    chart = card(page, "tf-custom-scalar-multi-line-chart-card", "loss")
    found = chart.locator(".match-list-entry")
    found.nth(2 * len(RUNS) - 1).wait_for(state="attached")
    assert {text.strip("◼◆● \n") for text in found.all_text_contents()} == {
        f"{tag} ({run})" for tag in ("train/loss", "val/loss") for run in RUNS
    }
    symbols = chart.locator("path.symbol")
    awaited(symbols.count, 2 * len(RUNS) * (len(EPOCHS) + 1))  # the last points are drawn once more
    points = symbols.evaluate_all(
        "points => points.map(point => [point.getAttribute('fill'), +point.getAttribute('x')])"
    )
    places = sorted({round(place, 3) for _, place in points})
    assert len(places) == len(EPOCHS)
    for colour in {colour for colour, _ in points}:
        own = [round(place, 3) for fill, place in points if fill == colour]
        assert [own.count(place) for place in places] == [2, 2, 2, 4]
    titles = page.locator("tf-custom-scalar-dashboard .category-name").all_text_contents()
    assert [title.strip() for title in titles] == ["training and validation", "speed"]


def test_pictures_are_shown_once(opened):
    page = opened("images")
    pictures = page.locator("tf-image-loader")
    wanted = {("train/augmented", "0"), ("test/confusion", "20"), ("test/worst_mistakes", "20")}
    awaited(pictures.locator("img").count, len(wanted) * len(RUNS))
    shown = []
    for picture in pictures.all():
        assert picture.locator("img").evaluate("async image => (await image.decode(), image.naturalWidth)") > 0
        texts = [picture.locator(where).first.inner_text() for where in ("[itemprop=name]", "[itemprop=run]")]
        step = picture.locator(".heading-label", has_text="step").locator("span").inner_text()
        shown.append((*texts, step))
        assert picture.locator("#steps").count() == 0  # to choose among several of one name
    assert sorted(shown) == sorted((tag, run, step) for tag, step in wanted for run in RUNS)


def test_the_net_is_drawn(opened):
    page = opened("graphs")
    node = page.locator("g.node[data-name=features]")
    node.wait_for()
    names = page.locator("g.node").evaluate_all("nodes => nodes.map(node => node.getAttribute('data-name'))")
    assert sorted(names) == ["avg_pool2d", "classifier", "features", "flatten", "images", "logits"]
    node.dblclick()
    page.locator("g.node[data-name='features/denseblock2']").wait_for()


def test_settings_and_results_are_in_one_table(opened, runs):
    page = opened("hparams")
    grid = page.locator("vaadin-grid#sessionGroupsTable")
    page.locator("vaadin-grid-cell-content", has_text="sweep/trial-001/tb").first.wait_for()
    titles, *rows = grid.evaluate(TABLE)
    assert titles[2] == "train.lr"  # the setting that differs
    metrics = [title for title in titles if title.startswith("best/")]
    assert metrics == ["best/epoch", "best/test_loss", "best/test_top1", "best/val_loss", "best/val_top1"]
    assert {row[0].rstrip(".…") for row in rows} == RUNS
    for row in rows:
        name = row[0].removesuffix("/tb")
        shown = dict(zip(titles, row, strict=True))
        summary = json.loads((run_of(runs[name]).path / "summary.json").read_text())
        assert float(shown["train.lr"]) == RATES[name]
        best = max(records(runs[name])[:-1], key=lambda record: record["val/top1"])  # the first of equals
        wanted = {"best/epoch": best["epoch"]}
        wanted |= {f"best/test_{figure}": summary[f"test/{figure}"] for figure in ("loss", "top1")}
        wanted |= {f"best/val_{figure}": best[f"val/{figure}"] for figure in ("loss", "top1")}
        assert {key: float(shown[key]) for key in metrics} == pytest.approx(wanted, rel=1e-3)


def test_curves_of_precision_and_recall(opened):
    page = opened("pr_curves")
    for name in SHAPES:
        chart = card(page, "tf-pr-curve-card", f"test_pr/{name}")
        awaited(lambda chart=chart: runs_of(chart), len(RUNS))


def test_trials_stand_together_under_their_sweeps_name(opened):
    rows = opened("timeseries").locator("runs-data-table tb-data-table-content-row")
    awaited(lambda: [text.strip() for text in rows.all_inner_texts()], sorted(RUNS))


def test_all_settings_are_there_to_read(opened):
    page = opened("text")
    page.get_by_text("global_batch_size: 16").first.wait_for()

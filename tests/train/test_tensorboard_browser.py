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
RATES = {"whole": 0.05, "stopped": 0.01, "sweep/trial-001": 0.02}
RUNS = {f"{name}/tb" for name in RATES}

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
    assert len(records(configs["stopped"])) == 3  # the checkpoint is of the second: the third epoch comes again
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


@pytest.mark.parametrize(
    ("tab", "shown"),
    [
        ("images", "tf-image-loader img"),
        ("graphs", "g.node[data-name=features]"),
        ("pr_curves", "tf-pr-curve-card path.line"),
        ("custom_scalars", "tf-custom-scalar-multi-line-chart-card path.symbol"),
        ("timeseries", "runs-data-table tb-data-table-content-row"),
        ("text", "text=global_batch_size: 16"),
    ],
)
def test_the_other_tabs_show_something(opened, tab, shown):
    opened(tab).locator(shown).first.wait_for(state="attached")


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
        shown = dict(zip(titles, row, strict=True))
        config = runs[row[0].removesuffix("/tb")]
        summary = json.loads((run_of(config).path / "summary.json").read_text())
        assert float(shown["train.lr"]) == config.train.lr
        assert float(shown["best/test_top1"]) == pytest.approx(summary["test/top1"], rel=1e-3)

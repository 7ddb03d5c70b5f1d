"""What TensorBoard shows of a folder of runs, in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import run_of, tiny, train

from densenet_dist.schema import Config

pytestmark = pytest.mark.nightly  # that the data is there: test_board.py and test_logs.py
SECONDS = 120
RATES = {"whole": 0.05, "trial-001": 0.02}
TABS = {
    "scalars&tagFilter=^(train|val)/loss$": "tf-scalar-card path.line",
    "images": "tf-image-loader img",
    "graphs": "g.node[data-name=features]",
    "pr_curves": "tf-pr-curve-card path.line",
    "custom_scalars": "tf-custom-scalar-multi-line-chart-card path.symbol",
    "timeseries": "runs-data-table tb-data-table-content-row",
    "text": "text=global_batch_size: 16",
}
TABLE = """grid => {
    const text = cell => cell.querySelector("slot").assignedNodes().map(node => node.innerText).join("").trim();
    return [...grid.shadowRoot.querySelectorAll("thead tr, tbody tr:not([hidden])")].map(
        row => [...row.querySelectorAll("th, td:not([part~=details-cell])")]
            .sort((one, other) => one.style.order - other.style.order).map(text));
}"""
"""The texts of a vaadin-grid by row, in the order of its columns."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Configurations of finished runs in one folder, by their names there."""
    folder = tmp_path_factory.mktemp("runs")
    configs = {name: tiny(folder, f"name={name}", f"train.lr={rate}") for name, rate in RATES.items()}
    for config in configs.values():
        train(config)
    return configs


@pytest.fixture(scope="module")
def address(runs: dict[str, Config]) -> Iterator[str]:
    """Of the tensorboard beside this Python, on the runs' folder."""
    program = Path(sys.executable).with_name("tensorboard")
    command = [program, "--logdir", runs["whole"].storage, "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            found = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stderr)))
            yield found[0]
        finally:
            process.kill()


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    """A page of a browser; no script on it may fail, nor may a request."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium here")
    complaints: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1300, "height": 1200})
        page.set_default_timeout(SECONDS * 1000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("response", lambda response: response.status >= 400 and complaints.append(response.url))
        yield page
        browser.close()
    assert complaints == []


def test_every_tab_shows_something(page, address):
    for tab, shown in TABS.items():
        page.goto(f"{address}/#{tab}")
        page.locator(shown).first.wait_for(state="attached")


def test_settings_and_results_are_in_one_table(page, address, runs):
    page.goto(f"{address}/#hparams")
    page.locator("vaadin-grid-cell-content", has_text="trial-001/tb").first.wait_for()
    titles, *rows = page.locator("vaadin-grid#sessionGroupsTable").evaluate(TABLE)
    assert titles[2] == "train.lr"  # the setting that differs
    metrics = [title for title in titles if title.startswith("best/")]
    assert metrics == ["best/epoch", "best/test_loss", "best/test_top1", "best/val_loss", "best/val_top1"]
    assert {row[0].rstrip(".…") for row in rows} == {f"{name}/tb" for name in RATES}
    for row in rows:
        shown = dict(zip(titles, row, strict=True))
        config = runs[row[0].removesuffix("/tb")]
        summary = json.loads((run_of(config).path / "summary.json").read_text())
        assert float(shown["train.lr"]) == config.train.lr
        assert float(shown["best/test_top1"]) == pytest.approx(summary["test/top1"], rel=1e-3)

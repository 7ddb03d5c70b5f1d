"""What TensorBoard shows of a folder of runs, in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import tiny, train

pytestmark = pytest.mark.nightly  # that the data is there: test_board.py and test_logs.py
SECONDS = 120
TABS = {
    "scalars&tagFilter=^(train|val)/loss$": "tf-scalar-card path.line",
    "images": "tf-image-loader img",
    "graphs": "g.node[data-name=features]",
    "pr_curves": "tf-pr-curve-card path.line",
    "custom_scalars": "tf-custom-scalar-multi-line-chart-card path.symbol",
    "timeseries": "runs-data-table tb-data-table-content-row",
    "text": "text=global_batch_size: 16",
    "hparams": "vaadin-grid-cell-content >> text=best/test_top1",
}


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of the tensorboard beside this Python, on a folder of two runs."""
    for name in ("one", "two"):
        train(tiny(tmp_path, f"name={name}"))
    program = Path(sys.executable).with_name("tensorboard")
    command = [program, "--logdir", tmp_path, "--host", "127.0.0.1", "--port", "0"]
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

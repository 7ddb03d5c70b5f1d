"""Pages, read and opened; a tiny run that has come to its end."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from html_page import Page
from runs import tiny

from densenet_dist.cluster.launch import fit


@pytest.fixture(scope="session")
def page_of():
    """Reads a page's file."""
    return lambda path: Page(Path(path).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a tiny run, made by the command's own function; not to be changed."""
    events: list[dict] = []
    result = fit(tiny(tmp_path_factory.mktemp("finished"), "train.epochs=2"), listener=events.append)
    assert [event["text"] for event in events if event["kind"] == "note" and "report" in event["text"]] == []
    return Path(result.run)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "runs" / "tiny")


@pytest.fixture
def opened(tmp_path):
    """Opens a page from file:// in a browser without a window; gives the DOM after its scripts have run."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium here")

    def dump(path: Path) -> str:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command = [browser, *flags, "--enable-logging=stderr", "--dump-dom", path.absolute().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        assert complaints == [], complaints  # an error of a script, or something that the page's policy forbids
        return done.stdout

    return dump

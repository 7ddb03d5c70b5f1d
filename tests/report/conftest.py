"""Pages, read and opened; a tiny run that has come to its end."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from runs import tiny

from densenet_dist.cluster.launch import fit

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """A page whose tags are closed in the order in which they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.open = text, []
        self.links, self.titles, self.rows, self.pictures = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        found = dict(attrs)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag == "h2":
            self.titles.append("")
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag in ("img", "svg"):
            self.pictures.append(found.get("alt") or found.get("aria-label"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        elif "h2" in self.open:
            self.titles[-1] += data

    def needs_nothing_else(self) -> bool:
        """Whether nothing is loaded from anywhere, and every colour is in the style sheet."""
        inside = all(link.startswith(("#", "data:image/png;base64,")) for link in self.links)
        variables = set(re.findall(r"var\((--\w+)\)", self.text))
        outside = re.search(r"https?:|//[a-z]|@import", re.sub(r"base64,[^\"]*", "", self.text))
        return inside and not outside and variables <= set(re.findall(r"(--\w+):", self.text))


@pytest.fixture(scope="session")
def page_of():
    """Reads a page's file."""
    return lambda path: Page(Path(path).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a tiny run, made by the command's own function; not to be changed."""
    events: list[dict] = []
    result = fit(tiny(tmp_path_factory.mktemp("finished"), "train.epochs=2"), listener=events.append)
    assert [event["text"] for event in events if event["kind"] == "note" and "page" in event["text"]] == []
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

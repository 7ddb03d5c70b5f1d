"""Pages, read and opened; a tiny run that has come to its end."""

from __future__ import annotations

import shutil
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

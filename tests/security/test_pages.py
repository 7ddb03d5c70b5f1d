"""Pages of runs show names as text, whatever they hold: of classes, runs, hosts and values of settings.

Those of sweeps: tests/sweep/test_page.py.
"""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import runs
from PIL import Image

from densenet_dist.config import to_yaml
from densenet_dist.report.writing import write_report

NASTY = "<img src=x onerror=alert(1)>"
QUOTES = "\"' onload='alert(1)"


class Page(HTMLParser):
    """Its elements and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.handlers += [
            name for name, value in attrs if name.startswith("on") or (value or "").startswith("javascript:")
        ]
        self.text += "".join(value or "" for _, value in attrs)

    def handle_data(self, data):
        self.text += data

    def is_harmless(self) -> bool:
        known = {"script": 1, "iframe": 0, "object": 0, "embed": 0, "link": 0, "form": 0, "base": 0}
        return not self.handlers and all(self.tags.count(tag) <= most for tag, most in known.items())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pictures whose class folders have such names."""
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    for name in (NASTY, QUOTES, "<b>bold", "&amp;"):
        (folder / "data" / name).mkdir(parents=True)
        for number in range(8):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                folder / "data" / name / f"{number}.png"
            )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSENET_DIST_CACHE", str(folder / "cache"))
        config = runs.load_config(
            runs.TINY,
            {"storage": str(folder), "data": {"name": "folder", "root": str(folder / "data"), "image_size": 32,
                      "limit": None},
             "train": {"epochs": 1}},
        )  # fmt: skip
        runs.train(config)
        yield folder / "tiny"


def test_class_names(run: Path):
    page = Page(Path(write_report([run])).read_text())
    assert page.is_harmless()
    assert page.tags.count("img") == len(re.findall(r'<img[^>]*src="data:image/png', (run / "report.html").read_text()))
    for name in (NASTY, QUOTES, "<b>bold", "&amp;"):
        assert name in page.text


def test_names_of_runs_and_what_their_files_say(run: Path, tmp_path: Path):
    """A folder may have been renamed, and its records written by anybody."""
    copies = [tmp_path / f"{NASTY}{number}" for number in range(2)]
    for copy in copies:
        shutil.copytree(run, copy)
        for name in ("env.json", "summary.json", "config.yaml", "metrics.jsonl", "test_results.json"):
            path = copy / name
            if path.exists():
                text = path.read_text().replace("finished", NASTY).replace("Linux", NASTY)
                path.write_text(re.sub(r'("(?:host|cpu|command|python|git)": )"[^"]*"', rf'\1"{NASTY}"', text))
    page = Page(Path(write_report([copies[0]], evaluate=False)).read_text())
    assert page.is_harmless()
    assert NASTY in page.text
    write_report(copies, tmp_path / "all.html")
    page = Page((tmp_path / "all.html").read_text())
    assert page.is_harmless()
    assert NASTY in page.text


def test_values_of_settings(run: Path, tmp_path: Path):
    config = runs.load_config(run / "config.yaml")
    shutil.copytree(run, tmp_path / "tiny")
    (tmp_path / "tiny" / "config.yaml").write_text(to_yaml(config).replace(config.data.root, f"'/{NASTY}'"))
    page = Page(Path(write_report([tmp_path / "tiny"], evaluate=False)).read_text())
    assert page.is_harmless()
    assert NASTY in page.text

"""Pages of runs show names as text, whatever they hold: of classes, runs, hosts and values of settings.

Those of sweeps: tests/sweep/test_page.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import runs
from html_page import Page
from photos import write_photos

from densenet_dist.config import to_yaml
from densenet_dist.report.page import write_report

NASTY = "<img src=x onerror=alert(1)>"
CLASSES = (NASTY, "\"' onload='alert(1)", "<b>bold", "&amp;")


def test_nothing_on_the_pages_of_runs_becomes_html(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a run on pictures whose class folders have such names, and whose records were written by anybody."""
    monkeypatch.setenv("DENSENET_DIST_CACHE", str(tmp_path / "cache"))
    write_photos(tmp_path / "data", CLASSES, 8)
    data = {"name": "folder", "root": str(tmp_path / "data"), "image_size": 32, "limit": None}
    runs.train(runs.load_config(runs.TINY, {"storage": str(tmp_path), "data": data, "train": {"epochs": 1}}))
    run = tmp_path / "tiny"
    config = runs.load_config(run / "config.yaml")
    (run / "config.yaml").write_text(to_yaml(config).replace(config.data.root, f"'/{NASTY}'"))
    facts = {"host": NASTY, "cpu": NASTY, "gpus": [NASTY], "git": NASTY, "packages": {NASTY: NASTY}}
    (run / "env.json").write_text(json.dumps(facts))
    (run / "summary.json").write_text((run / "summary.json").read_text().replace("finished", NASTY))
    page = Page(Path(write_report([run])).read_text())
    assert page.is_harmless()
    assert page.tags["img"] == page.text.count('src="data:image/png')
    assert all(name in page.shown for name in CLASSES)
    assert page.shown.count(NASTY) > page.shown.count(CLASSES[1])  # of settings, host and versions too
    copies = [shutil.copytree(run, tmp_path / f"{NASTY}{number}") for number in range(2)]
    (copies[1] / "env.json").write_text(json.dumps(facts | {"time": "later"}))
    page = Page(Path(write_report(copies, tmp_path / "all.html")).read_text())
    assert page.is_harmless()
    assert f"{NASTY}1" in page.shown

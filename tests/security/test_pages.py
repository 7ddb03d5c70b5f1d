"""Pages of runs show names as text, whatever they hold: of classes, runs, hosts and values of settings.

Those of sweeps: tests/sweep/test_page.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
from html_page import Page
from PIL import Image

from densenet_dist.config import to_yaml
from densenet_dist.report import write_report

NASTY = "<img src=x onerror=alert(1)>"
CLASSES = (NASTY, "\"' onload='alert(1)", "<b>bold", "&amp;")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pictures whose class folders have such names; and whose records were written by anybody."""
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / "data" / name).mkdir(parents=True)
        for number in range(8):
            picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            picture.save(folder / "data" / name / f"{number}.png")
    data = {"name": "folder", "root": str(folder / "data"), "image_size": 32, "limit": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSENET_DIST_CACHE", str(folder / "cache"))
        runs.train(runs.load_config(runs.TINY, {"storage": str(folder), "data": data, "train": {"epochs": 1}}))
    run = folder / "tiny"
    config = runs.load_config(run / "config.yaml")
    (run / "config.yaml").write_text(to_yaml(config).replace(config.data.root, f"'/{NASTY}'"))
    facts = {"host": NASTY, "cpu": NASTY, "gpus": [NASTY], "git": NASTY, "packages": {NASTY: NASTY}}
    (run / "env.json").write_text(json.dumps(facts))
    (run / "summary.json").write_text((run / "summary.json").read_text().replace("finished", NASTY))
    return run


def test_nothing_on_the_page_of_a_run_becomes_html(run: Path):
    page = Page(Path(write_report([run])).read_text())
    assert page.is_harmless()
    assert page.tags["img"] == page.text.count('src="data:image/png')
    assert all(name in page.shown for name in CLASSES)
    assert page.shown.count(NASTY) > page.shown.count(CLASSES[1])  # of settings, host and versions too


def test_nothing_on_the_page_of_several_runs_becomes_html(run: Path, tmp_path: Path):
    copies = [shutil.copytree(run, tmp_path / f"{NASTY}{number}") for number in range(2)]
    page = Page(Path(write_report(copies, tmp_path / "all.html")).read_text())
    assert page.is_harmless()
    assert all(name in page.shown for name in CLASSES)
    assert f"{NASTY}1" in page.shown

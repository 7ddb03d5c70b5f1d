"""The site as it is built: nothing missing, nothing from elsewhere, every setting and command on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from pages import ROOT

from densenet_dist.cli import app
from densenet_dist.config import SETTINGS
from densenet_dist.schema import Config
from densenet_dist.sweep.definition import SETTINGS as SWEEP_SETTINGS
from densenet_dist.sweep.schema import SweepConfig
from densenet_dist.yaml_settings import flatten

pytest.importorskip("material", reason="needs mkdocs-material, of the extra docs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: any warning ends it."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_pages_load_nothing_from_elsewhere(site):
    """`mkdocs build --strict` has found every link and anchor."""
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|img|iframe|source|video|object|link)\b[^>]*>", page.read_text())
        loads = [tag for tag in tags if not re.search(r"rel=\"?(?:prev|next|canonical)", tag)]
        assert loads
        assert [tag for tag in loads if re.search(r"\s(?:src|data|href)=\"?(?:https?:)?//", tag)] == [], page
    sheets = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//\S{20}", sheets)


def test_every_setting_is_on_the_page(site):
    anchors = set(re.findall(r"\sid=\"?([^\s\">]+)", (site / "configuration.html").read_text()))
    keys = [*flatten(SETTINGS.to_dict(Config())), "train.schedule"]
    keys += [f"sweep.{key}" for key in flatten(SWEEP_SETTINGS.to_dict(SweepConfig()))]
    assert len(keys) > 100
    assert set(keys) <= anchors


def test_every_command_and_option_is_on_the_page(site):
    text = (site / "commands.html").read_text()
    waiting = [("", typer.main.get_command(app))]
    while waiting:
        name, command = waiting.pop()
        below = getattr(command, "commands", {})
        waiting += [(f"{name} {key}".strip(), one) for key, one in below.items()]
        section = text.partition(f'<h2 id="{name.replace(" ", "-")}"')[2].partition("<h2 ")[0]
        for option in [] if below else [each for parameter in command.params for each in parameter.opts]:
            assert not option.startswith("-") or option in section, (name, option)

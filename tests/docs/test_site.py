"""The site as it is built: nothing missing, nothing from elsewhere, every setting and command on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

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


class Page:
    """What a page loads, where its links lead, and its anchors."""

    def __init__(self, path: Path) -> None:
        text = path.read_text()
        links = re.findall(r"<link\b(?![^>]*rel=\"?(?:prev|next|canonical))[^>]*>", text)
        self.loads = re.findall(r"<(?:script|img|iframe|source|video|object)\b[^>]*\s(?:src|data)=\"?([^\s\">]+)", text)
        self.loads += re.findall(r"\shref=\"?([^\s\">]+)", "".join(links))
        self.links = re.findall(r"<a\b[^>]*\shref=\"?([^\s\">]+)", text)
        self.anchors = set(re.findall(r"<\w+\b[^>]*\s(?:id|name)=\"?([^\s\">]+)", text))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: any warning ends it."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def test_pages_link_to_and_load_only_what_is_there(site, pages):
    sources = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    assert set(pages) == sources | {"404.html", "launchers.html", "gpu.html"}
    assert all(page.loads and page.links for page in pages.values())
    broken = [(name, address) for name, page in pages.items() for address in page.loads if "//" in address]
    for name, page in pages.items():
        for address in {*page.links, *page.loads}:
            path, _, anchor = address.partition("#")
            if "://" in address or name == "404.html":  # its addresses begin at the server's root
                continue
            target = os.path.normpath(path or name)
            if not (site / target).exists() or (anchor and unquote(anchor) not in pages[target].anchors):
                broken.append((name, address))
    assert broken == []
    sheets = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//\S{20}", sheets)


def test_every_setting_is_on_the_page(pages):
    anchors = pages["configuration.html"].anchors
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

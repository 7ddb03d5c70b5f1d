"""The site builds without a warning and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from pages import ROOT

pytest.importorskip("material", reason="needs mkdocs-material, of the extra docs")


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    """As `make docs` builds it; any warning ends it, for instance of a link or an anchor that is not there."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'id="train.lr"' in (site / "configuration.html").read_text()
    assert "--checkpoint" in (site / "commands.html").read_text()
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|img|iframe|source|video|object|link)\b[^>]*>", page.read_text())
        loads = [tag for tag in tags if not re.search(r"rel=\"?(?:prev|next|canonical)", tag)]
        assert loads
        assert [tag for tag in loads if re.search(r"\s(?:src|data|href)=\"?(?:https?:)?//", tag)] == [], page
    sheets = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//\S{20}", sheets)

"""No locked dependency has a known weakness. That changes without a change here, so it is asked at night only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.nightly
LOCK = Path(__file__).parents[2] / "requirements.lock"


def audited(requirements: Path) -> list[dict[str, Any]]:
    """What pip-audit says of each package: its ``vulns``, or a ``skip_reason`` where nothing is known of it."""
    line = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--disable-pip", "--no-deps",
            "--format", "json", "--progress-spinner", "off"]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=500)
    last = (done.stderr.strip() or "no answer").splitlines()[-1]
    if not done.stdout and ("connect" in last.lower() or "timeout" in last.lower()):
        pytest.skip(f"no advisory database can be reached: {last}")
    found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    return found


def test_known_weaknesses(tmp_path: Path):
    (tmp_path / "weak.txt").write_text("pyyaml==5.3\n")  # CVE-2020-14343
    [weak] = audited(tmp_path / "weak.txt")
    if "skip_reason" in weak:
        pytest.skip(f"no advisory database can be reached: {weak['skip_reason']}")
    assert weak["vulns"]  # it would be found
    found = audited(LOCK)
    assert len(found) > 100
    assert [package for package in found if "skip_reason" in package or package["vulns"]] == []

"""Figures for Prometheus; tests/cluster/test_joined.py scrapes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from densenet_dist.cluster.telemetry import GAUGES, Telemetry
from densenet_dist.train.context import Event


def test_the_page_explains_each_figure():
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    assert re.findall(r"^\| `ray_(\w+)` \|", page, re.MULTILINE) == list(GAUGES)


def test_no_run_fails_for_its_figures(caplog: pytest.LogCaptureFixture):
    telemetry: Callable[[Event], None] = Telemetry("run")
    telemetry({"kind": "progress"})
    (record,) = caplog.records
    assert "no longer exported" in record.message
    telemetry({"kind": "progress"})
    assert len(caplog.records) == 1

"""Figures for Prometheus; tests/cluster/test_joined.py scrapes them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from densenet_dist.cluster.telemetry import GAUGES, Telemetry


def test_the_page_explains_each_figure():
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    assert re.findall(r"^\| `ray_(\w+)` \|", page, re.MULTILINE) == list(GAUGES)


def test_no_run_fails_for_its_figures(caplog: pytest.LogCaptureFixture):
    telemetry = Telemetry("run")
    for _ in range(2):
        telemetry({"kind": "progress"})
    (record,) = caplog.records
    assert "no longer exported" in record.message


def test_every_event_renews_what_earlier_ones_said(monkeypatch: pytest.MonkeyPatch):
    """Ray forgets a gauge that nobody has set for a while."""
    told: list[dict[str, float]] = []
    monkeypatch.setattr(Telemetry, "_export", lambda self: told.append(dict(self._current)))
    telemetry = Telemetry("run")
    telemetry({"kind": "start", "global_step": 0})
    telemetry({"kind": "epoch", "epoch": 1, "global_step": 9, "val/loss": 0.5})
    telemetry({"kind": "note", "text": "of no figures"})
    progress = {"rate": 1.0, "loss": 2.0, "epoch": 2, "step": 1, "steps": 4, "global_step": 10, "goodput": 0.5}
    telemetry({"kind": "progress", **progress})
    assert len(told) == 3
    assert (told[-1]["densenet_restarts"], told[-1]["densenet_val_loss"], told[-1]["densenet_epochs"]) == (0, 0.5, 1.25)

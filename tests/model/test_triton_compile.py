"""The Triton kernels compile for real GPUs, spill nothing, and come in few variants. No GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "triton_registers.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the benchmark writes for the first seven layers of each net: addresses then begin to repeat."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, SCRIPT, "--sm", "80", "90", "--layers", "7", "--out", folder / "out.json"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())["rows"]
    return found


def test_every_kernel_compiles(rows: list[dict[str, Any]]) -> None:
    pointwise = {"bn_relu", "write", "gather", "finish", "combine_moments", "reduce_sums"}
    convolutions = {"pack", "settle", "forward", "dgrad", "wgrad", "sum_parts"}
    for sm in (80, 90):
        assert {row["kernel"] for row in rows if row["sm"] == sm} == pointwise | convolutions


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["spills"] > 0] == []
    assert max(row["registers"] for row in rows) <= 192


def test_shared_memory_suffices(rows: list[dict[str, Any]]) -> None:
    """Two programs fit: a multiprocessor has 164 KiB on sm_80, 228 KiB on sm_90, less 1 KiB a program."""
    assert max(row["shared"] for row in rows if row["sm"] == 80) <= 81 * 1024
    assert max(row["shared"] for row in rows if row["sm"] == 90) <= 113 * 1024


def test_variants_are_few(rows: list[dict[str, Any]]) -> None:
    """Otherwise a net's first step would take minutes. Each layer's widths and addresses are others."""
    for net in {name for row in rows for name in row["nets"]}:
        assert sum(net in row["nets"] for row in rows if row["sm"] == 90) <= 30

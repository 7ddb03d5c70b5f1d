"""``benchmarks/visit.py``: the way that a GPU's figures come about, taken on a CPU with nets of two layers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def visit(folder: Path, official: Path, *arguments: str, timeout: float = 500) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "visit.py"), "--small", "--data", str(official)]
    command += ["--out", str(folder / "out"), "--runs", str(folder / "runs"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_goes_on_where_the_time_was_up(tmp_path, official):
    # A second for the first step: it is ended before anything is saved, then taken again.
    assert "to be continued" in visit(tmp_path, official, "notebook10", "--minutes", "0.01")
    assert visit(tmp_path, official, "notebook10").endswith("all done\n")
    summary = json.loads((tmp_path / "out" / "notebook10" / "summary.json").read_text())
    assert (summary["status"], summary["epochs"]) == ("finished", 2)
    shown = visit(tmp_path, official, "--table").splitlines()
    assert f"| {summary['test/top1']:.2%} |" in next(line for line in shown if line.startswith("| notebook10 "))
    assert "| not measured |" in next(line for line in shown if line.startswith("| best10 "))
    assert visit(tmp_path, official, "notebook10") == "all done\n"  # nothing is taken twice


@pytest.mark.nightly
def test_every_step_is_taken_on_a_cpu(tmp_path, official):
    steps = json.loads(subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, cwd=ROOT).stdout)
    for _ in range(3):
        shown = visit(tmp_path, official, *(step for step in steps if step != "tests"), "--minutes", "30", timeout=1700)
        if shown.endswith("all done\n"):
            break
    shown = visit(tmp_path, official, "--table")
    assert "not measured" not in shown
    assert " +- " in next(line for line in shown.splitlines() if line.startswith("| fast9266 "))


STEPS = """import json, sys
sys.path.insert(0, "benchmarks")
import visit
print(json.dumps([step.name for step in visit.STEPS]))"""

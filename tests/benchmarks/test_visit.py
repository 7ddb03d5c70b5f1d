"""The first visit to a GPU (``benchmarks/visit.py``), rehearsed on the CPU with nothing but the packages it names."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "numpy", "pillow", "pyyaml", "pydantic", "pytest")
PARTS = ["smoke", "ceilings", "tests", "profile", "model", "convolutions", "hopper"]


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The interpreter of an environment that has only `PACKAGES` and what they need; pydantic is beside it."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "wheels"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    left, done = [Requirement(name) for name in PACKAGES], set()
    while left:
        wanted = left.pop()
        for extra in {"", *wanted.extras} - {extra for name, extra in done if name == wanted.name}:
            done.add((wanted.name, extra))
            needs = map(Requirement, distribution(wanted.name).requires or ())
            left += [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
        folder = tmp_path / "wheels" if "pydantic" in wanted.name else site
        for file in distribution(wanted.name).files or ():
            if ".." not in file.parts and not (folder / file).is_symlink():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).symlink_to(file.locate())
    return tmp_path / "env/bin/python"


def state_of(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as tar:
        state = json.load(tar.extractfile("state.json"))
        names = tar.getnames()
    assert "summary.md" in names
    assert {f"{name}.json" for name in state if state[name]["status"] == "done"} <= set(names)
    return {name: about["status"] for name, about in state.items()}


@pytest.mark.timeout(1800)
@pytest.mark.nightly
def test_a_visit_is_stopped_continued_and_complete(tmp_path, python):
    assert subprocess.run([python, "-c", "import psutil"], capture_output=True, check=False).returncode == 1
    archive = tmp_path / "visit.tar.gz"
    command = [python, ROOT / "benchmarks/visit.py", archive, "--small", "--minutes"]
    first = subprocess.Popen([*command, "30"], env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    while not archive.exists():
        assert first.poll() is None
        time.sleep(0.2)
    time.sleep(1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 130
    assert state_of(archive) == {"smoke": "done", "ceilings": "interrupted"}

    short = subprocess.run([*command, "0"], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert short.returncode == 1
    assert set(state_of(archive)) == set(PARTS)
    assert "| tests | not begun: 0 s were left, it may take 120 |" in short.stdout

    last = subprocess.run([*command, "30"], cwd=tmp_path, check=False, capture_output=True, text=True)
    print(last.stdout, last.stderr)
    assert state_of(archive) == dict.fromkeys(PARTS, "done")
    assert last.returncode == 0
    assert "smoke: versions" not in last.stdout  # not repeated
    for shown in ("## profile", "dense_block_backward", "'passed': 1", "compiled for sm_90a", "TFLOP/s"):
        assert shown in last.stdout

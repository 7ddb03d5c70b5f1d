"""Whatever a configuration, a sweep file or a setting says: it is resolved, or refused in one message."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import pytest
import yaml
from fuzz_budget import budget
from fuzz_configs import KEYS, SWEEP_KEYS, TRAP, documents, overrides, sweeps
from hypothesis import given
from hypothesis import strategies as st

from densenet_dist.cli import main


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory):
    """An empty working folder, so that no setting happens to be the name of a file."""
    with contextlib.chdir(tmp_path_factory.mktemp("fuzz")):
        yield


def judged(*arguments: str) -> tuple[int, str]:
    """Exit code and output of ``densenet-dist config``, its streams those of a real process."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main(["config", *arguments])
    said = err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert stop.value.code in (0, 2), said
    if stop.value.code == 2:
        first, *more = said.splitlines()
        assert first.startswith("error: "), said
        assert len(first) > 20, said
        assert not any(line.startswith(("error:", "Traceback")) for line in more), said
        assert "fault of the program" not in said
        assert len(said) < 40_000, "a message for people"
    else:
        assert said == ""
    return stop.value.code, out.buffer.getvalue().decode()  # type: ignore[attr-defined]


def written(text: str, name: str) -> str:
    path = Path(name)
    path.write_text(text.replace("{canary}", "ran"), encoding="utf-8", errors="surrogatepass")
    return str(path)


def read_back(text: str, name: str) -> None:
    """What was printed is a configuration again, and the same one."""
    values = yaml.safe_load(text)
    Path(name).write_text(text)
    assert judged(name, f"name={values['name']}") == (0, text)


@budget(130, 3600)
@given(documents(KEYS))
def test_files(text):
    code, out = judged(written(text, "c.yaml"))
    assert not os.path.exists("ran")
    if code == 0 and "space" not in yaml.safe_load(out):
        read_back(out, "again.yaml")


@budget(130, 3600)
@given(st.lists(overrides(KEYS), min_size=1, max_size=3))
def test_settings(arguments):
    code, out = judged(*arguments)
    assert not os.path.exists("ran")
    if code == 0:
        read_back(out, "again.yaml")


@budget(60, 2000)
@given(sweeps(), st.lists(overrides([*SWEEP_KEYS, *(f"space.{key}" for key in KEYS)]), max_size=1))
def test_sweeps(text, arguments):
    code, out = judged(written(text, "s.yaml"), *arguments)
    assert not os.path.exists("ran")
    if code == 0:
        read_back(out, "again.yaml")


def test_the_trap_is_a_real_one():
    yaml.load(TRAP.replace("{canary}", "ran"), Loader=yaml.UnsafeLoader)
    assert os.path.exists("ran")
    os.unlink("ran")

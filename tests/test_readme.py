"""The README cannot drift: every path, command, setting and Python line in it is tried."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import densenet_dist
from densenet_dist.cli import app
from densenet_dist.config import load_config
from densenet_dist.sweep.definition import load_sweep

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    files = re.findall(r"(?<![\w/.-])((?:configs|docs|benchmarks|densenet_dist|tests)/[\w./-]+\.\w+)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    # What a command is told to write is not there yet.
    missing += [file for file in files if not (ROOT / file).exists() and f"--out {file}" not in text]
    assert missing == []


def test_commands_are_real():
    known = {command.name or command.callback.__name__ for command in app.registered_commands} | {"data"}
    commands = [line for block in blocks("bash") for line in block.splitlines() if "densenet" in line]
    assert len(commands) >= 5
    for line in commands:
        words = shlex.split(line, comments=True)
        start = next(i for i, word in enumerate(words) if word.endswith(("densenet-dist", "densenet_dist")))
        assert words[start + 1] in known
        sources = [word for word in words[start + 2 :] if not word.startswith("-")]
        load = load_sweep if words[start + 1] == "tune" else load_config
        load(*[str(ROOT / word) if word.endswith(".yaml") else word for word in sources])


def test_the_sweep_file_is_one(tmp_path):
    (text,) = [block for block in blocks("yaml") if "space:" in block]
    (tmp_path / "sweep.yaml").write_text(text.replace("base: ", f"base: {ROOT}/configs/"))
    assert len(load_sweep(tmp_path / "sweep.yaml").space) == 5


def test_make_targets_are_real():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"`make (\w+)`", (ROOT / "README.md").read_text())
    assert named
    assert set(named) <= set(targets)


def test_python_block_runs(tmp_path, monkeypatch):
    (code,) = blocks("python")
    # Small and without Ray, so that it takes seconds; everything else is as it stands in the README.
    small = '"train.epochs=1", "cluster.engine=local", "data.limit=128", "model.num_layers=[1,1]"'
    shortened = code.replace('"train.epochs=1"', small).replace("configs/", f"{ROOT}/configs/")
    assert shortened != code
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(shortened, scope)
    assert set(scope["result"].summary) >= {"test/top1", "best"}
    assert isinstance(scope["model"], densenet_dist.DenseNet)

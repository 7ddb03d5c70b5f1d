"""What TAB offers, in the shells' own words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from densenet_dist import bundled
from densenet_dist.cli import completion

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to work in: a configuration, a run and a sweep."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "net.yaml").touch()
    (tmp_path / "mine" / "notes.txt").touch()
    for name, file in (("k24", "config.yaml"), ("wide", "sweep.yaml")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / file).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(offers: list[completion.Offer]) -> list[str]:
    return [word for word, _ in offers]


def test_configurations_by_name_and_by_file(folder):
    assert "quickstart" in words(completion.sources("qu"))
    assert dict(completion.sources("qu"))["quickstart"].startswith("The first thing to run")
    assert all(len(meaning) <= 70 for _, meaning in completion.sources(""))
    assert words(completion.sources("sweep_")) == []  # not for train
    assert set(words(completion.sweep_sources("sweep_"))) == {
        name for name in bundled.names() if name.startswith("sweep_")
    }
    assert words(completion.sources("mi")) == ["mine/net.yaml"]  # no other way: no stop at the folder
    assert words(completion.sources("nothing-like-it")) == []


@pytest.mark.parametrize(
    ("start", "offered"),
    [
        ("train.l", ["train.lr=", "train.label_smoothing="]),
        ("train.lr", ["train.lr=", "train.lr=0.1"]),  # two, so that the shell puts no space after the =
        ("train.lr=", ["train.lr=0.1"]),
        ("data.loader=d", ["data.loader=dali"]),
        ("train.compile=", ["train.compile=true", "train.compile=false"]),
        ("model.growth_r", ["model.growth_rate=", "model.growth_rate=null"]),
        ("train.nothing", []),
    ],
)
def test_keys_and_values(folder, start, offered):
    assert words(completion.run_settings(start)) == offered


def test_every_key_can_be_reached(folder):
    from densenet_dist.config import load_config, to_dict
    from densenet_dist.yaml_settings import flatten

    def leaves(start: str) -> set[str]:
        offers = words(completion.run_settings(start))
        below = [leaves(offer) for offer in offers if offer.endswith(".")]
        return {offer[:-1] for offer in offers if offer.endswith("=")}.union(*below)

    assert leaves("") == set(flatten(to_dict(load_config())))


def test_runs_and_sweeps(folder):
    assert words(completion.runs("k")) == ["k24"]
    assert words(completion.runs("runs/")) == ["runs/k24", "runs/wide/"]
    assert words(completion.sweep_folders("w")) == ["wide"]


# The shells


def offered(env: dict[str, str], cwd: Path) -> str:
    code = "import sys\nfrom densenet_dist.cli import main\ntry: main([])\nfinally:\n"
    code += "    assert not {'torch', 'ray', 'numpy'} & set(sys.modules), 'that takes seconds'"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout


def test_zsh_and_fish_are_told_the_meaning_too(folder):
    env = {"_DENSENET_DIST_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "densenet-dist train quickstart train.sy"}
    assert offered(env, folder) == (
        '_arguments \'*: :(("train.sync_bn=":"default\\\\: false"\n"train.sync_bn=true"\n"train.sync_bn=false"))\'\n'
    )
    fish = {"_DENSENET_DIST_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert offered({**fish, "_TYPER_COMPLETE_ARGS": "densenet-dist evaluate k"}, folder) == "k24\trun in runs/\n"
    named = offered({**fish, "_TYPER_COMPLETE_ARGS": "densenet-dist train "}, folder).splitlines()
    assert {line.partition("\t")[0] for line in named} == set(words(completion.sources("")))


@pytest.fixture
def shell_env(folder) -> dict[str, str]:
    """What a shell needs to find the command."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "densenet-dist"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m densenet_dist "$@"\n')
    program.chmod(0o755)
    return {
        **os.environ,
        "HOME": str(folder),
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


def in_shell(command: list[str], env: dict[str, str], cwd: Path) -> list[str]:
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_in_bash(folder, shell_env):
    script = "source <(_DENSENET_DIST_COMPLETE=source_bash densenet-dist)\n"
    script += '[[ $(complete -p densenet-dist) == *"-o default"* ]]\n'
    lines = (
        "densenet-dist tra",
        "densenet-dist train quick",
        "densenet-dist train quickstart train.lr",
        "densenet-dist train quickstart train.lr =",  # words as bash parts them
        "densenet-dist train quickstart data.loader = d",
        "densenet-dist train --resume k",
        "densenet-dist train --js",
    )
    for line in lines:
        script += (
            f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _densenet_dist_completion densenet-dist\n"
        )
        script += 'echo "${COMPREPLY[*]}"\n'
    assert in_shell(["bash", "-euc", script], shell_env, folder) == [
        "train",
        "quickstart",
        "train.lr= train.lr=0.1",
        "0.1",
        "dali",
        "k24",
        "--json",
    ]


TYPED = {
    "tra": "train ",
    "train quick": "train quickstart ",
    "train quickstart train.sync": "train quickstart train.sync_bn=",
    "train quickstart train.lr=": "train quickstart train.lr=0.1 ",
    "train quickstart data.loader=d": "train quickstart data.loader=dali ",
    "train --resume k": "train --resume k24 ",
    "train --js": "train --json ",
    "train mi": "train mine/net.yaml ",
}
"""What stands after the command before TAB, and after it."""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_in_zsh(folder, shell_env):
    begin = "PS1=; autoload -Uz compinit; compinit -u -D; source <(_DENSENET_DIST_COMPLETE=source_zsh densenet-dist)"
    begin += r"; shown() { print -r -- \"<<\$BUFFER>>\"; BUFFER= }; zle -N shown; bindkey '^P' shown"
    script = f'zmodload zsh/zpty; zpty z zsh -f -i; zpty -w z "{begin}"\n'
    for typed in TYPED:
        script += f"zpty -w -n z 'densenet-dist {typed}'$'\\t\\C-p'\n"
        # the first of all is the echo of what is written above
        script += 'zpty -r -m z said "*<<densenet*>>*"; print -r -- "${${said##*<<}%%>>*}"\n'
    lines = in_shell(["zsh", "-fc", script], shell_env, folder)
    assert lines == [f"densenet-dist {line}" for line in TYPED.values()]


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
def test_in_fish(folder, shell_env):
    script = "_DENSENET_DIST_COMPLETE=source_fish densenet-dist | source\n"
    script += "\n".join(f"complete -C 'densenet-dist {typed}'; echo" for typed in TYPED)
    answers = "\n".join(in_shell(["fish", "--no-config", "-c", script], shell_env, folder)).strip().split("\n\n")
    offers = [{offer.partition("\t")[0] for offer in answer.split("\n")} for answer in answers]
    words = [line.split()[-1] for line in TYPED.values()]
    for offer, word in zip(offers, words, strict=True):
        assert offer == {word} | ({f"{word}true", f"{word}false"} if word.endswith("=") else set())

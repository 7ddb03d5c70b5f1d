"""The pages cannot drift: every link, path, command, setting, message and Python line in them is tried."""

from __future__ import annotations

import ast
import re
import shlex

import pytest
import typer
from pages import PAGES, ROOT, anchors, blocks, command_lines, name_of, prose, spans
from ray.scripts.scripts import cli as ray_cli

import densenet_dist
from densenet_dist.cli import app
from densenet_dist.config import SETTINGS, load_config
from densenet_dist.sweep.definition import SETTINGS as SWEEP_SETTINGS
from densenet_dist.sweep.definition import load_sweep
from densenet_dist.yaml_settings import read_override

PROGRAM = typer.main.get_command(app)
COMMANDS = PROGRAM.commands
GROUPS = "model|data|train|checkpoint|cluster|fault"
each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@each_page
def test_links_paths_and_make_targets_exist(page):
    broken = []
    for address in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = address.partition("#")
        target = (page.parent / path) if path else page
        if "://" not in path and not (target.exists() and (not anchor or anchor in anchors(target))):
            broken.append(address)
    text = page.read_text()
    named = re.findall(r"(?<![\w/.*-])((?:configs|docs|benchmarks|densenet_dist|tests|launch)/[\w./*-]*\w)", text)
    written = set(re.findall(r"--(?:out|plot|page) (\S+?)[`\s,]", text))  # by a command, so not there yet
    broken += [path for path in named if path not in written and not [*ROOT.glob(path)]]
    lines = [line for block in blocks(page, "bash") for line in block.text.splitlines()] + spans(page)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    broken += [line for line in lines if re.match(r"make [a-z]", line) and line.split()[1] not in targets]
    assert broken == []


@each_page
def test_commands_can_be_given(page):
    for words in command_lines(page):
        name, *rest = words
        if is_the_programs(name):
            continue
        if name == "submit":
            parsed = COMMANDS[name].make_context(name, list(rest)).params
            name, *rest = parsed["arguments"]
        command = COMMANDS[name]
        if hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        given = command.make_context(name, list(rest)).params  # raises on an option that there is not
        check_sources(name, given)


def test_commands_of_the_launchers_are_rays_and_watch_on_loopback_only():
    pages = (ROOT / "launch" / "README.md", ROOT / "docs" / "monitoring.md")
    lines = [line for page in pages for block in blocks(page, "bash") for line in block.text.splitlines()]
    commands = [words for line in lines if (words := shlex.split(line.removesuffix(" &"), comments=True))]
    of_ray = [words[1:] for words in commands if words[0] == "ray"]
    assert {words[0] for words in of_ray} >= {"up", "down", "job", "dashboard", "rsync-down", "get-auth-token"}
    for name, *rest in of_ray:
        command = ray_cli.commands[name]
        if name == "job":
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(name, list(rest))  # raises on an unknown option
    for words in commands:
        if words[0] == "sbatch" and (sources := words[words.index("launch/slurm/train.sbatch") + 1 :]):
            load_config(str(ROOT / sources[0]), *sources[1:])
        assert not {"--address=0.0.0.0", "--bind_all"} & set(words)
        addresses = [word.partition("=")[2] for word in words if word.startswith("--web.listen-address")]
        addresses += [words[index + 1] for index, word in enumerate(words) if word in ("-L", "--host")]
        assert {address.partition(":")[0] for address in addresses} <= {"127.0.0.1", "localhost"}


def is_the_programs(word):
    """Whether it is an option of the program itself; one that it does not have is an error."""
    assert not word.startswith("-") or word in {name for parameter in PROGRAM.params for name in parameter.opts}, word
    return word.startswith("-")


def check_sources(name, given):
    """Whether a command line's settings are ones, its files there, and all of it makes a configuration."""
    sources = list(given.get("sources") or given.get("settings") or [])
    files = [source for source in sources if "=" not in source]
    if name == "tune" and not files:  # a sweep that is resumed
        for source in sources:
            SWEEP_SETTINGS.validate(read_override(source), combinations=False)
    elif all((ROOT / file).exists() for file in files):
        paths = [str(ROOT / source) if source in files else source for source in sources]
        is_sweep = any("space:" in (ROOT / file).read_text() for file in files)
        (load_sweep if is_sweep else load_config)(*paths)
    else:  # what a run has written, or a name that stands for one
        assert all(file.startswith(("runs/", "/shared", "s3://")) or file.isupper() for file in files), files
        if name != "tune":
            load_config(*(source for source in sources if source not in files))


@each_page
def test_commands_in_sentences_exist(page):
    for span in spans(page):
        if not span.startswith("densenet-dist ") or span.startswith(("densenet-dist COMMAND", "densenet-dist …")):
            continue
        words = span.replace("[", " ").replace("]", " ").split()
        if is_the_programs(words[1]):
            continue
        command = COMMANDS[words[1]]
        if hasattr(command, "commands"):
            command = command.commands[words[2]] if len(words) > 2 else command
        known = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
        options = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}
        assert words[1] == "submit" or options <= known, span


@each_page
def test_settings_in_sentences_exist(page):
    for span in spans(page):
        for word in [span] if "{" in span else [word.rstrip(",;") for word in span.split()]:
            found = re.match(rf"((?:{GROUPS})\.[a-z_.]+)(?:=(.+))?$", word)
            if not found or word.endswith((".py", ".md", ".html", ".json", ".safetensors")):
                continue
            problem = SETTINGS.unknown_key(found[1])
            assert problem is None or "is a group" in problem, span
            if found[2] and not re.search(r"\.\.\.|…|[A-Z]{3}|/k", found[2]):
                SETTINGS.validate(read_override(word), combinations=False)


def smaller(*sources):
    """`load_config` of a run that takes a second."""
    small = ["data.limit=75", "data.test_limit=75", "data.loader=torch", "model.num_layers=[1,1]", "train.epochs=1"]
    return load_config(*sources, *small, "cluster.engine=local", "cluster.device=cpu")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page one after the other, as a reader would type them, with a net of two layers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(densenet_dist, "load_config", smaller, raising=False)
    scope: dict[str, object] = {}
    for number, block in enumerate(blocks(page, "python")):
        code = compile(block.text, f"{page.name}, block {number}", "exec")
        if block.tried:
            exec(code, scope)
    if page.name == "README.md":
        assert set(scope["result"].summary) >= {"test/top1", "best"}
        assert isinstance(scope["model"], densenet_dist.DenseNet)


@each_page
def test_sweep_files_are_ones(page, tmp_path):
    for block in blocks(page, "yaml"):
        if "space:" in block.text:
            (tmp_path / "sweep.yaml").write_text(block.text.replace("base: ", f"base: {ROOT}/configs/"))
            assert load_sweep(tmp_path / "sweep.yaml").space


def texts_of(tree: ast.Module) -> list[str]:
    """Every text of a module, with … for what is filled in when it is said."""
    parts = [node.values for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts += [[node] for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return ["".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in text) for text in parts]


def pattern(text: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, text.split("…"))), re.DOTALL)


def test_messages_are_those_of_the_code():
    texts = [text for path in (ROOT / "densenet_dist").rglob("*.py") for text in texts_of(ast.parse(path.read_text()))]
    messages = re.findall(r"^#### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) >= 15
    unknown = [message for message in messages if not any(map(pattern(message).search, texts))]
    fillable = [pattern(text) for text in texts if len(text.replace("…", "")) > 20]
    assert [message for message in unknown if not any(each.fullmatch(message) for each in fillable)] == []

"""Every command as Markdown, from the application itself."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

import typer

from densenet_dist.cli import app


def commands() -> str:
    """A section for each command: what it does, what it takes, examples."""
    return "\n".join(_section(name, command) for name, command in walk(typer.main.get_command(app), "densenet-dist"))


def walk(command: Any, name: str) -> list[tuple[str, Any]]:
    """All commands with their full names, those that only hold others left out."""
    below = getattr(command, "commands", None)
    return [found for key, one in below.items() for found in walk(one, f"{name} {key}")] if below else [(name, command)]


def _section(name: str, command: Any) -> str:
    shown = [parameter for parameter in command.params if not parameter.hidden]
    arguments = [parameter for parameter in shown if not parameter.opts[0].startswith("-")]
    options = [parameter for parameter in shown if parameter not in arguments]
    usage = " ".join([name, "[OPTIONS]", *(_metavar(argument) for argument in arguments)])
    rows = [_row(f"`{_metavar(argument)}`", argument) for argument in arguments]
    rows += [_row(_spelled(option), option) for option in options]
    text, examples = _help(command.help)
    title = name.removeprefix("densenet-dist ")
    parts = [
        f"## {title}",
        text,
        f"```text\n{usage}\n```",
        "| takes | meaning | |\n| --- | --- | --- |\n" + "\n".join(rows),
    ]
    return "\n\n".join([*parts, *([f"```bash\n{examples}\n```"] if examples else [])]) + "\n"


def _help(text: str) -> tuple[str, str]:
    """A command's docstring: its prose, and the lines of it that are commands."""
    lines = [line.strip() for line in text.splitlines()]
    examples = [line for line in lines if line.startswith("densenet-dist ")]
    examples = [re.sub(r"\s{2,}\((.*)\)$", r"    # \1", line) for line in examples]
    return "\n".join(line for line in lines if not line.startswith("densenet-dist ")).strip(), "\n".join(examples)


def _metavar(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


def _spelled(option: Any) -> str:
    *others, last = [*option.opts, *option.secondary_opts]
    if not getattr(option, "is_flag", False):
        last += f" {option.metavar or _kind(option.type_descriptor.annotation)}"
    return ", ".join(f"`{name}`{{ .option }}" for name in [*others, last])


def _kind(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "|".join(str(choice.value) for choice in annotation)
    return {int: "NUMBER", float: "NUMBER", str: "TEXT"}.get(annotation, "PATH")


def _row(spelled: str, parameter: Any) -> str:
    default = parameter.default if getattr(parameter, "default", None) not in (None, (), []) else ""
    if isinstance(default, Enum):
        default = default.value
    if isinstance(default, bool):
        default = (parameter.opts if default else parameter.secondary_opts or [""])[0]
    said = "required" if parameter.required else f"default `{default}`" if str(default) not in ("", ".") else ""
    escaped = (part.replace("|", r"\|") for part in (spelled, " ".join((parameter.help or "").split()), said))
    return f"| {' | '.join(escaped)} |"

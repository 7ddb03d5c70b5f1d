"""The project's pages as their source: blocks, code spans, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "launch" / "README.md",
    *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "log.md"),  # it tells of what was
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
_FENCED = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_NOT = re.compile(r"<!-- not (?:run|here)[^>]*-->\s*$")


class Block(NamedTuple):
    """A fenced block without the fences' own indent; `tried` unless a comment before it says that it cannot be."""

    language: str
    text: str
    tried: bool


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, of one language or of all."""
    text = page.read_text()
    found = [
        Block(
            block[2], re.sub(rf"^{block[1]}", "", block[3], flags=re.MULTILINE), not _NOT.search(text[: block.start()])
        )
        for block in _FENCED.finditer(text)
    ]
    return [block for block in found if language is None or block.language == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks and comments."""
    return re.sub(r"<!--.*?-->", "", _FENCED.sub("", page.read_text()), flags=re.DOTALL)


def spans(page: Path) -> list[str]:
    """The code within sentences and tables, lines joined."""
    return [re.sub(r"\s*\n\s*", " ", span) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+?)(?: \{.*\})?$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def command_lines(page: Path) -> Iterator[list[str]]:
    """Every command line of ours in the page's blocks that is to be tried, as words from its command on."""
    begins = {"bash": "", "console": "$ ", "": "densenet-dist "}  # in a transcript the rest is output
    for block in blocks(page):
        if not block.tried or block.language not in begins:
            continue
        for line in block.text.replace("\\\n", "").splitlines():
            if not line.startswith(begins[block.language]) or "densenet" not in line.partition("#")[0]:
                continue
            words = shlex.split(line.removeprefix("$ ").removesuffix(" &"), comments=True)
            for sign in ("|", ">"):
                words = words[: words.index(sign)] if sign in words else words
            own = [i for i, word in enumerate(words) if word.endswith(("densenet-dist", "densenet_dist"))]
            if own and words[own[0] + 1 :]:
                yield words[own[0] + 1 :]

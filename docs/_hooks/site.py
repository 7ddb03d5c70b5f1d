"""What the site has beside the pages in docs/: pages of other folders, parts of the README, and what is made from code.

    <!-- readme: Start -->            in a page becomes that section of the README (intro: what is before the first one)
    <!-- generated: settings -->      what `GENERATED` makes

Links are written as they hold in the repository. Those that lead out of docs/ are turned to the page on the site that
shows the file; where there is none, the name stands without a link.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import measured_tables
from command_pages import commands
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from model_tables import configurations, variants
from settings_page import run_settings, sweep_settings

ROOT: Final = Path(__file__).parents[2]
OUTSIDE: Final = {
    "launch/README.md": "launchers.md",
    "benchmarks/gpu.md": "gpu.md",
    "benchmarks/results/scaling.png": "assets/scaling.png",
}
"""Files of the repository, and where they are on the site."""
GENERATED: Final[dict[str, Callable[[], str]]] = {
    "settings": run_settings,
    "sweep-settings": sweep_settings,
    "commands": commands,
    "variants": variants,
    "configurations": configurations,
    "peers": measured_tables.peers,
    "inputs": measured_tables.inputs,
    "loaders": measured_tables.loaders,
    "ray-overhead": measured_tables.ray_overhead,
    "scaling": measured_tables.scaling,
}
_HOME: Final = {"README.md": "index.md"} | OUTSIDE
_FENCED: Final = re.compile(r"(^ *```.*?^ *```[^\S\n]*$)", re.DOTALL | re.MULTILINE)
_CODE: Final = re.compile(r"`[^`\n]+`")
_LINK: Final = re.compile(r"(!?)\[((?:[^\]\[]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files that lie outside of docs/."""
    for path, place in OUTSIDE.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in what the page asks for, and turn its links."""
    place = page.file.src_uri
    source = next((path for path, other in OUTSIDE.items() if other == place), f"docs/{place}")
    markdown = turn_links(markdown, posixpath.dirname(source), place, files)
    markdown = re.sub(
        r"<!-- readme: (.+?) -->", lambda found: turn_links(readme_section(found[1]), "", place, files), markdown
    )
    markdown = re.sub(r"<!-- generated: (.+?) -->", lambda found: generated(found[1]), markdown)
    # GitHub wants a | escaped in a table's code, Python-Markdown shows the backslash.
    return _outside_fences(markdown, lambda part: _CODE.sub(lambda found: found[0].replace(r"\|", "|"), part))


def generated(name: str) -> str:
    """What code makes of itself."""
    if name not in GENERATED:
        raise PluginError(f"nothing generates {name!r}; known: {', '.join(GENERATED)}")
    return GENERATED[name]()


def readme_section(title: str) -> str:
    """The text of a section of the README, without its heading."""
    intro, *sections = re.split(r"^## ", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    texts = {"intro": intro.split("\n", 1)[1]} | {head: text for head, _, text in (s.partition("\n") for s in sections)}
    if title not in texts:
        raise PluginError(f"README.md has no section {title!r}; it has {', '.join(texts)}")
    return texts[title].strip()


def turn_links(markdown: str, folder: str, place: str, files: Files) -> str:
    """Links of Markdown that lies in `folder` of the repository, as they are from `place` on the site."""

    def turned(found: re.Match[str]) -> str:
        bang, text, address = found.groups()
        path, hash_, anchor = address.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return found[0]
        target = posixpath.normpath(posixpath.join(folder, path))
        home = _HOME.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if home is not None and files.get_file_from_path(home) is not None:
            return f"{bang}[{text}]({posixpath.relpath(home, posixpath.dirname(place) or '.')}{hash_}{anchor})"
        if not (ROOT / target).exists():
            raise PluginError(f"{place}: a link leads to {address}, which does not exist")
        return text if "`" in text or " " in text else f"`{text}`"

    return _outside_fences(markdown, lambda part: _LINK.sub(turned, part))


def _outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    return "".join(part if i % 2 else change(part) for i, part in enumerate(_FENCED.split(markdown)))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Sphinx's roles in docstrings, which the Python page would show as they are written."""
    return re.sub(r":(?:func|class|data|mod|meth):(?=<code>)", "", html)

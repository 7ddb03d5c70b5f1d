"""The frame of a page: head, style, tables that sort by a click, sections with pictures."""

from __future__ import annotations

import html
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

BEST: Final = ' class="best"'
"""Of the row that came out best."""
NUMBER: Final = ' class="number"'


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """The whole page.

    Args:
        title: as plain text.
        parts: what the page shows, in HTML.
        style: rules beside those that all pages have.
    """
    named = {"name": escape(title), "style": _STYLE + style, "script": _SCRIPT, "body": "\n".join(parts)}
    return _PAGE % named


def facts(rows: Mapping[str, str]) -> str:
    """Names and what is said of them, in HTML."""
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows.items()) + "</dl>"


def section(title: str, caption: str, pictures: Sequence[str] = (), legend: Sequence[tuple[str, str, str]] = ()) -> str:
    """Pictures side by side below a heading.

    Args:
        title: its heading.
        caption: how to read it; where there is no picture, why.
        pictures: elements of HTML.
        legend: signs, each with the name of its colour, the sign and its meaning.
    """
    signs = "".join(
        f'<li><span style="color:var(--{colour})" aria-hidden="true">{sign}</span> {escape(text)}</li>'
        for colour, sign, text in legend
    )
    parts = [f"<h2>{escape(title)}</h2>"]
    if pictures:
        parts.append(f'<ul class="legend">{signs}</ul>' if signs else "")
        parts.append(f'<div class="pictures">{"".join(pictures)}</div>')
    return f"<figure>{''.join(parts)}<figcaption>{escape(caption)}</figcaption></figure>"


def details(title: str, content: str) -> str:
    """HTML that is shown after a click."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def table(heads: Sequence[tuple[str, bool]], rows: Iterable[str]) -> str:
    """A table that sorts by a click on a heading.

    Args:
        heads: the headings, and whether the column has numbers.
        rows: elements `tr`.
    """
    head = "".join(
        f'<th scope="col"{NUMBER if numbers else ""}><button>{escape(text)}</button></th>' for text, numbers in heads
    )
    lines = "\n".join(rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>'


def cell(text: str, value: Any = None) -> str:
    """A cell that sorts by its number where it has one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td{NUMBER} data-value="{value!r}">{escape(text)}</td>'
    return f"<td>{escape(text)}</td>"


def code(*words: str) -> str:
    """A command."""
    return f"<code>{escape(shlex.join(words))}</code>"


def escape(text: str) -> str:
    """Text for HTML, whatever it holds."""
    clean = "".join(
        letter if letter.isprintable() or letter in "\n\t\xa0" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    return html.escape(clean)


_PAGE: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%(name)s</title>
<style>
%(style)s</style>
</head>
<body>
%(body)s
<script>
%(script)s</script>
</body>
</html>
"""
_STYLE: Final = """\
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --ink: #1d1d1b; --muted: #6e6d69; --grid: #e3e2de; --raised: #f3f2ee;
  --best: #e0570c; --finished: #2a78d6; --stopped: #8a8983; --interrupted: #6a4fc4; --running: #12906a;
  --failed: #c62f3f;
  --shade0: #bfd5ef; --shade1: #a3c4ea; --shade2: #82afe2; --shade3: #5f97d6; --shade4: #3f7dc6; --shade5: #2463ae;
  --shade6: #10407c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #191918; --ink: #ecebe7; --muted: #a2a19b; --grid: #343431; --raised: #242422;
    --best: #f08a3c; --finished: #5a9ff0; --stopped: #8f8e88; --interrupted: #a48df0; --running: #3bbd93;
    --failed: #f0697a;
    --shade0: #34506f; --shade1: #365880; --shade2: #3a6799; --shade3: #4178b8; --shade4: #5c95d6; --shade5: #89b7eb;
    --shade6: #c6defa;
  }
}
body {
  max-width: 76rem; margin: 0 auto; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif;
}
h1 { margin: 0.5rem 0; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 0.4rem; font-size: 1.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1.2rem; margin: 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: 0.88rem/1.5 ui-monospace, monospace; }
pre { margin: 0.4rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
p, figcaption { max-width: 48rem; color: var(--muted); font-size: 0.9rem; margin: 0.4rem 0; }
figure { margin: 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; overflow-x: auto; }
.pictures svg { flex: none; max-width: 100%; height: auto; }
.pictures svg.wide { max-width: none; }
svg * { stroke-linejoin: round; }
svg text {
  font-family: inherit !important; paint-order: stroke; stroke: var(--paper); stroke-width: 3px;
}
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 1.2rem; margin: 0; padding: 0; list-style: none; }
.legend { font-size: 0.9rem; }
.table { max-height: 32rem; overflow: auto; }
thead th { position: sticky; top: 0; background: var(--paper); }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--grid); text-align: left; }
th, td { vertical-align: top; white-space: nowrap; }
td.number, th.number { text-align: right; }
td details { min-width: 18rem; white-space: normal; }
tr.best { background: var(--raised); font-weight: 600; }
th button { padding: 0; border: 0; background: none; color: var(--muted); font: inherit; cursor: pointer; }
th[aria-sort] button { color: var(--ink); }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
details { margin-top: 1.5rem; }
td details { margin-top: 0; }
summary { cursor: pointer; }
@media print { .table { max-height: none; } }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.5rem; } }
"""
_SCRIPT: Final = """\
for (const button of document.querySelectorAll("th button")) {
  button.onclick = () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => {
      const cell = row.cells[head.cellIndex];
      return cell.dataset.value ? Number(cell.dataset.value) : cell.textContent.replace("★ ", "");
    };
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");  // what is missing is last either way
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  };
}
"""

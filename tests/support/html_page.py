"""A page of a run or a sweep, read."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser

_VOID = {"meta", "br", "img"}
_FORBIDDEN = {"iframe", "object", "embed", "link", "form", "base"}


class Page(HTMLParser):
    """A page whose tags are closed in the order in which they were opened; `shown` is its text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.shown, self.tags = text, "", Counter()
        self.titles, self.pictures, self.rows = [], [], []
        self._open, self._attributes = [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        found = dict(attrs)
        self.tags[tag] += 1
        self._attributes += attrs
        self.shown += "".join(value or "" for value in found.values())
        if tag == "h2":
            self.titles.append("")
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag in ("img", "svg"):
            self.pictures.append(found.get("alt") or found.get("aria-label"))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.shown += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data
        elif "h2" in self._open:
            self.titles[-1] += data

    def needs_nothing_else(self) -> bool:
        """Whether nothing is loaded from anywhere, and signs and colors that are referred to are there."""
        links = [value for name, value in self._attributes if name in ("src", "href", "xlink:href", "action")]
        ids = [value for name, value in self._attributes if name == "id"]
        inside = all(link.startswith("data:image/png;base64,") or link[1:] in ids for link in links)
        signs = {url[1:] for url in re.findall(r"url\((.*?)\)", self.text)}
        outside = re.search(r"https?:|//[a-z]|@import", re.sub(r"base64,[^\"]*", "", self.text))
        colors = set(re.findall(r"var\((--\w+)\)", self.text)) <= set(re.findall(r"(--\w+):", self.text))
        return inside and not outside and colors and signs <= set(ids) and len(ids) == len(set(ids))

    def is_harmless(self) -> bool:
        """Whether no name on it became an element that does something."""
        handlers = [name for name, value in self._attributes if name.startswith("on") or "javascript:" in (value or "")]
        return not handlers and self.tags["script"] == 1 and not _FORBIDDEN & set(self.tags)

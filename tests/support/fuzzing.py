"""For tests/fuzz: how many inputs are tried, and inputs that are damaged or forged."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, configuration, settings
from hypothesis import strategies as st

nightly = False  # set by tests/fuzz/conftest.py
# Hypothesis keeps a folder .hypothesis where it was started, even where told to remember nothing.
configuration.set_hypothesis_home_dir(os.path.join(tempfile.gettempdir(), f"hypothesis-{os.getuid()}"))


def fuzz(examples: int) -> Callable[[Any], Any]:
    """So many new inputs with ``-m nightly``; in an ordinary run a hundredth of them, the same every time."""
    limits = settings(
        max_examples=examples if nightly else max(5, examples // 100),
        derandomize=not nightly,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    if not nightly:
        return limits
    return lambda test: pytest.mark.nightly(pytest.mark.timeout(7200)(limits(test)))


WORDS = (b"\x00" * 8, b"\xff" * 8, b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"..", b"/")


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The same bytes, damaged in one to three places; near the beginning, where formats say lengths, more often."""
    for _ in range(draw(st.integers(1, 3))):
        last = max(0, len(data) - 1)
        place = draw(st.integers(0, min(last, 120)) | st.integers(0, last) | st.integers(max(0, last - 200), last))
        length = draw(st.sampled_from([1, 2, 4, 8, 64, 1000]))
        word = draw(st.sampled_from(WORDS) | st.binary(min_size=1, max_size=8))
        before, after = data[:place], data[place:]
        flipped = bytes([byte ^ (1 << draw(st.integers(0, 7))) for byte in after[:1]])
        results = {
            "overwrite": before + word + after[len(word) :],
            "flip": before + flipped + after[1:],
            "cut": before,
            "insert": before + word + after,
            "delete": before + after[length:],
            "double": before + after[:length] + after,
            "zero": before + bytes(length) + after[length:],
            "append": data + word,
        }
        data = results[draw(st.sampled_from(list(results)))]
    return data


NASTY_JSON = (
    *(None, True, False, 0, -1, 1, 2**63, 10**30, -(2**31), 0.5, 1e308, float("nan"), float("inf"), "", "x", "..", "/"),
    *("../../outside", "/etc/passwd", ".", "\x00", "\ud800", "a" * 5000, "step-00000001", [], {}, [1], [[]], {"": 1}),
    *({"epoch": 1}, {"epoch": 1, "step": 0, "global_step": 5}, {"epoch": "1", "step": 0, "global_step": 5}),
)
OTHER_DOCUMENTS = ("", "null", "[]", "{}", "1", '"x"', "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "\ufeff{}", "{}{}")


@st.composite
def forged(draw: st.DrawFn, text: str) -> str:
    """A JSON document with one or two values replaced or removed, by somebody who means harm; or another document."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(OTHER_DOCUMENTS))
    document = json.loads(text)
    for _ in range(draw(st.integers(1, 2))):
        holder, key = draw(st.sampled_from(list(_places(document)) or [({"": 0}, "")]))
        if draw(st.integers(0, 3)) == 0:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(draw(st.sampled_from(NASTY_JSON)))
    return json.dumps(document)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def alias_bomb(levels: int, brackets: str) -> str:
    """YAML of a value that is small as text, and 9**levels values when written out."""
    left, right = brackets
    text = f"[&a0 {left}x: 1{right}" if left == "{" else "[&a0 [x]"
    for level in range(1, levels):
        few = ", ".join(f"*a{level - 1}" if left == "[" else f"k{i}: *a{level - 1}" for i in range(9))
        text += f", &a{level} {left}{few}{right}"
    return f"{text}]"


def merge_bomb(levels: int) -> str:
    """The same by merge keys."""
    text = "[&m0 {x: 1}"
    for level in range(1, levels):
        text += f", &m{level} {{<<: [{', '.join([f'*m{level - 1}'] * 9)}]}}"
    return f"{text}]"
